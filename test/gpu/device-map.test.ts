import { describe, expect, it } from "vitest";
import { InvalidRequest, Unsupported } from "../../src/errors/index.ts";
import { deadlines } from "../../src/gpu/deadlines.ts";
import { mapDevices } from "../../src/gpu/device-map.ts";
import { parseUuid, uuidText } from "../../src/gpu/means.ts";
import { UUIDS } from "./harness.ts";

const [a0, a1, b0, b1] = UUIDS;
const gpu = (uuid: string, name = "one") => ({ uuid, name, memoryBytes: 1 });

describe("the map of GPUs", () => {
  it("is empty when each is where it was, whatever else is there", () => {
    expect(mapDevices([gpu(a0), gpu(a1)], [gpu(b0), gpu(a1), gpu(a0)])).toEqual([]);
    expect(mapDevices([], [])).toEqual([]);
  });

  it("keeps those that are there, and gives the others what is left of their model, by index", () => {
    expect(mapDevices([gpu(a0), gpu(a1)], [gpu(b0, "other"), gpu(a1), gpu(b1)])).toEqual([
      [a1, a1],
      [a0, b1],
    ]);
    expect(mapDevices([gpu(a0), gpu(a1)], [gpu(b0), gpu(b1)])).toEqual([
      [a0, b0],
      [a1, b1],
    ]);
  });

  it("follows what it is told, by UUID or index, and fills up the rest", () => {
    const [from, to] = [
      [gpu(a0), gpu(a1)],
      [gpu(b0), gpu(b1), gpu(a0)],
    ];
    expect(mapDevices(from, to, { map: `0=1` })).toEqual([
      [a0, b1],
      [a1, b0],
    ]);
    expect(mapDevices(from, to, { map: ` ${uuidText(a1)}=${b1} , 0=2` })).toEqual([
      [a1, b1],
      [a0, a0],
    ]);
    expect(mapDevices(from, [gpu(a0), gpu(a1)], { map: "0=1,1=0" })).toEqual([
      [a0, a1],
      [a1, a0],
    ]);
  });

  it("refuses what doesn't fit, by its name", () => {
    expect(() => mapDevices([gpu(a0)], [])).toThrow(/GPU-a0a0.*\(one\): there is none/);
    expect(() => mapDevices([gpu(a0)], [gpu(b0, "other")])).toThrow(Unsupported);
    expect(() => mapDevices([gpu(a0)], [gpu(b0, "other")], { map: "0=0" })).toThrow(/wants the same model/);
    expect(() => mapDevices([gpu(a0), gpu(a1)], [gpu(b0)])).toThrow(/GPU-a1a1.*taken/);
    for (const map of ["0", "0=1=2", "5=0", "0=7", `${b1}=0`, "0=0,0=1", "0=1,1=1", "x=0"])
      expect(() => mapDevices([gpu(a0), gpu(a1)], [gpu(b0), gpu(b1)], { map }), map).toThrow(InvalidRequest);
  });

  it("doesn't miss a GPU that nobody used", () => {
    expect(mapDevices([gpu(a0), gpu(a1)], [gpu(b1)], { used: [a0] })).toEqual([[a0, b1]]);
    expect(() => mapDevices([gpu(a0), gpu(a1)], [gpu(b1)], { used: [a0, a1] })).toThrow(Unsupported);
  });
});

describe("UUIDs of GPUs", () => {
  it("are read as they are written", () => {
    expect(uuidText(a0)).toBe("GPU-a0a0a0a0-a0a0-a0a0-a0a0-a0a0a0a0a0a0");
    for (const text of [a0, uuidText(a0), a0.toUpperCase(), "gpu-a0a0a0a0-a0a0-a0a0-a0a0-a0a0a0a0a0a0"])
      expect(parseUuid(text)).toBe(a0);
    for (const text of ["", "GPU-", `${a0}0`, "MIG-a0"]) expect(parseUuid(text)).toBeUndefined();
  });
});

describe("the deadlines", () => {
  it("are changed one by one; what makes no sense changes nothing", () => {
    expect(deadlines("lock=5,restore=7")).toEqual({ ...deadlines(""), lock: 5, restore: 7 });
    expect(deadlines("lock=x,unlock=-1,nothing=3,checkpoint")).toEqual(deadlines(""));
  });
});
