import { describe, expect, it } from "vitest";
import { Metrics } from "../../src/proto/generated/cgroups_v2.ts";
import {
  bootstrap,
  events,
  google,
  isOfType,
  nsFromTimestamp,
  pack,
  Reader,
  runcOptions,
  task,
  taskTypes,
  timestampFromNs,
  types,
  unpack,
  WireError,
  Writer,
} from "../../src/proto/index.ts";

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString("hex");
const bytes = (text: string) => Buffer.from(text.replaceAll(" ", ""), "hex");

describe("messages", () => {
  it("have these bytes", () => {
    const exited = { pid: 300, exitStatus: 137, exitedAt: { seconds: 1_700_000_000, nanos: 5 } };
    expect(hex(task.DeleteResponse.encode(exited))).toBe("08ac02108901" + "1a08" + "0880e2cfaa06" + "1005");
    expect(hex(events.TaskExit.encode({ containerId: "c", id: "e", pid: 1, exitStatus: 0 }))).toBe(
      "0a01631201651801",
    );
    expect(hex(task.StateResponse.encode({}))).toBe("");
  });

  it("come back with every field set", () => {
    expect(task.StateResponse.decode(new Uint8Array(0))).toEqual({
      id: "",
      bundle: "",
      pid: 0,
      status: taskTypes.Status.UNKNOWN,
      stdin: "",
      stdout: "",
      stderr: "",
      terminal: false,
      exitStatus: 0,
      exitedAt: undefined,
      execId: "",
    });
  });

  it("carry lists, maps and messages in messages", () => {
    const request: task.CreateTaskRequest = {
      ...task.CreateTaskRequest.decode(new Uint8Array(0)),
      id: "c1",
      rootfs: [
        { type: "overlay", source: "overlay", target: "", options: ["lowerdir=/a", "x".repeat(5000)] },
        { type: "bind", source: "/é", target: "t", options: [] },
      ],
      options: pack(runcOptions.Options, { binaryName: "crun", ioUid: 0xffff_ffff }),
    };
    expect(task.CreateTaskRequest.decode(task.CreateTaskRequest.encode(request))).toEqual(request);

    const update = {
      id: "c1",
      resources: undefined,
      annotations: { "cedana.io/tcp": "close", "": "" },
    };
    const decoded = task.UpdateTaskRequest.decode(task.UpdateTaskRequest.encode(update));
    expect({ ...decoded.annotations }).toEqual(update.annotations);
  });

  it("keep a map's keys apart from what objects inherit", () => {
    const encoded = bytes("1a 0f 0a 09 5f5f70726f746f5f5f 12 02 6869"); // annotations: { "__proto__": "hi" }
    const { annotations } = task.UpdateTaskRequest.decode(encoded);
    expect(Object.entries(annotations)).toEqual([["__proto__", "hi"]]);
    expect(annotations.toString).toBeUndefined();
  });

  it("carry 64 bits exactly", () => {
    const memory = {
      usage: 2n ** 64n - 1n,
      usageLimit: 9223372036854771712n,
      maxUsage: 2n ** 53n + 1n,
      anon: 2n ** 49n,
      file: 2n ** 35n - 1n,
    };
    expect(Metrics.decode(Metrics.encode({ memory })).memory).toMatchObject(memory);
    for (const seconds of [-1n, -(2n ** 63n), 2n ** 63n - 1n, 0n])
      expect(google.Timestamp.decode(google.Timestamp.encode({ seconds })).seconds).toBe(seconds);
    expect(google.Timestamp.decode(google.Timestamp.encode({ nanos: -1 })).nanos).toBe(-1);
  });

  it("carry doubles", () => {
    const psi = { some: { avg10: 1.25, avg60: Number.NaN, avg300: -0, total: 7n } };
    const { some } = Metrics.decode(Metrics.encode({ cpu: { psi } })).cpu!.psi!;
    expect(some).toEqual({ avg10: 1.25, avg60: Number.NaN, avg300: -0, total: 7n });
  });

  it("take numbers of enums that have no name", () => {
    expect(task.StateResponse.decode(task.StateResponse.encode({ status: 99 })).status).toBe(99);
    const params = bootstrap.BootstrapParams.encode({ logLevel: -4, instanceId: "c" });
    expect(bootstrap.BootstrapParams.decode(params).logLevel).toBe(-4);
  });

  it("take lists packed and unpacked", () => {
    const packed = bytes("22 03 01 02 03");
    const unpacked = bytes("20 01 20 02 20 03");
    expect(bootstrap.BootstrapResult.decode(packed).capabilities).toEqual([1, 2, 3]);
    expect(bootstrap.BootstrapResult.decode(unpacked).capabilities).toEqual([1, 2, 3]);
    expect(hex(bootstrap.BootstrapResult.encode({ capabilities: [1, 2, 3] }))).toBe("2203010203");
  });

  it("take the last of what comes twice, and skip a known field of another type", () => {
    expect(task.StartRequest.decode(bytes("0a0161 0a0162")).id).toBe("b");
    expect(task.StartRequest.decode(bytes("0801 0a0162")).id).toBe("b");
  });

  it("refuse a value of the wrong type instead of sending nonsense", () => {
    expect(() => task.StartRequest.encode({ id: 5 as unknown as string })).toThrow(TypeError);
  });
});

describe("Any and Timestamp", () => {
  it("count nanoseconds both ways, also before 1970", () => {
    for (const ns of [0n, 1n, 1_700_000_000_123_456_789n, -1n, -1_000_000_000n, -1_500_000_000n])
      expect(nsFromTimestamp(timestampFromNs(ns))).toBe(ns);
    expect(timestampFromNs(-1n)).toEqual({ seconds: -1n, nanos: 999_999_999 });
  });

  it("pack under the bare name, and unpack with and without a host", () => {
    const any = pack(runcOptions.ProcessDetails, { execId: "e1" });
    expect(any.typeUrl).toBe("containerd.runc.v1.ProcessDetails");
    for (const typeUrl of [any.typeUrl, `type.googleapis.com/${any.typeUrl}`])
      expect(unpack({ ...any, typeUrl }, runcOptions.ProcessDetails)).toEqual({ execId: "e1" });
    expect(isOfType(any, runcOptions.Options)).toBe(false);
    expect(isOfType(undefined, runcOptions.Options)).toBe(false);
    expect(() => unpack(any, runcOptions.Options)).toThrow(WireError);
  });
});

describe("Writer and Reader", () => {
  it("move a nested message of any length to where its length fits", () => {
    for (const size of [0, 1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152]) {
      const writer = new Writer(1);
      const start = writer.open(10);
      for (let left = size; left > 0; left -= 4096)
        for (let i = Math.min(left, 4096); i > 0; i--) writer.bool(true);
      writer.close(start);
      writer.uint32(16).uint32(7);
      const reader = new Reader(writer.finish());
      expect(reader.tag()).toBe(10);
      const inner = reader.bytesField();
      expect(inner.length).toBe(size);
      expect(inner.every((byte) => byte === 1)).toBe(true);
      expect([reader.tag(), reader.uint32(), reader.done]).toEqual([16, 7, true]);
    }
  });

  it("agree on every kind of number", () => {
    const writer = new Writer(1)
      .sint32(-2147483648)
      .sint64(-(2n ** 63n))
      .fixed32(0xffff_ffff)
      .sfixed32(-2)
      .fixed64(2n ** 64n - 1n)
      .sfixed64(-2)
      .float(0.5)
      .double(Math.PI)
      .int32(-1)
      .bool(false);
    const reader = new Reader(writer.finish());
    expect([
      reader.sint32(),
      reader.sint64(),
      reader.fixed32(),
      reader.sfixed32(),
      reader.fixed64(),
      reader.sfixed64(),
      reader.float(),
      reader.double(),
      reader.int32(),
      reader.bool(),
    ]).toEqual([-2147483648, -(2n ** 63n), 0xffff_ffff, -2, 2n ** 64n - 1n, -2n, 0.5, Math.PI, -1, false]);
    expect(reader.done).toBe(true);
    expect(() => reader.double()).toThrow(WireError);
  });
});

it("describes the services with their calls", () => {
  expect(Object.keys(task.Task.methods)).toHaveLength(17);
  expect(task.Task.name).toBe("containerd.task.v2.Task");
  expect(task.Task.methods.Kill.request).toBe(task.KillRequest);
  expect(task.Task.methods.Kill.response).toBe(google.Empty);
  expect(types.RuntimeInfo.name).toBe("containerd.types.RuntimeInfo");
});
