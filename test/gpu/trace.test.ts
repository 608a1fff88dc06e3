import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { InvalidRequest, NotFound } from "../../src/errors/index.ts";
import { parseTrace, readTraces, summaryOf } from "../../src/gpu/trace.ts";

let place: string;
beforeEach(() => {
  place = mkdtempSync(join(tmpdir(), "cedana-gpu-trace-"));
});
afterEach(() => rmSync(place, { recursive: true }));

const head = '{"displayTimeUnit":"ns","traceEvents":[';
const meta = '{"name":"process_name","ph":"M","pid":7,"tid":7,"args":{"name":"train"}}';
const call = (name: string, ts: number) =>
  `{"name":"${name}","ph":"X","ts":${ts}.000,"dur":1.500,"pid":7,"tid":9,"args":{"bytes":64}}`;
const end = (calls: object, dropped = 0) => `],"otherData":${JSON.stringify({ dropped, calls })}}\n`;
const total = { calls: 2, bytes: 128, ns: 3000, errors: 0 };
const whole = [
  head,
  [meta, call("cuMemcpyHtoD_v2", 1), call("cuMemcpyHtoD_v2", 2)].join(",\n"),
  end({ cuMemcpyHtoD_v2: total }),
].join("\n");

describe("a trace", () => {
  it("that is whole is read as it is", () => {
    expect(parseTrace(whole)).toEqual({
      ...JSON.parse(whole),
      otherData: { ...JSON.parse(whole).otherData, broken: 0 },
    });
  });

  it("that was cut off anywhere is mended: what is whole of it stays", () => {
    for (let length = head.length; length < whole.length; length++) {
      const { traceEvents, otherData } = parseTrace(whole.slice(0, length));
      expect(traceEvents.length).toBe(
        [meta, call("cuMemcpyHtoD_v2", 1), call("cuMemcpyHtoD_v2", 2)].filter((_, index, events) =>
          whole.slice(0, length).includes(events.slice(0, index + 1).join(",\n")),
        ).length,
      );
      expect(otherData.broken).toBeLessThanOrEqual(1);
    }
  });

  it.each([["", "[]", "{}", '{"traceEvents":[]}', "\0".repeat(100)]].flat())("is not %j", (text) => {
    expect(() => parseTrace(text)).toThrow(InvalidRequest);
  });

  it("may hold what is no event: it is left out and counted", () => {
    const text = [
      head,
      meta,
      '{"name":1},',
      "null",
      '{"name":"x","ph":"X","pid":"1","tid":1}',
      end({ __proto__: 1, a: 3 }),
    ];
    const { traceEvents, otherData } = parseTrace(text.join("\n"));
    expect(traceEvents).toHaveLength(1);
    expect(otherData).toMatchObject({ broken: 3, calls: {} });
  });
});

describe("a directory of traces", () => {
  it("is one trace: parts of one process are summed once", async () => {
    writeFileSync(join(place, "gpu-7-1.old.json"), whole);
    writeFileSync(join(place, "gpu-7-1.json"), whole);
    writeFileSync(join(place, "gpu-8-1.json"), whole.replaceAll('"pid":7', '"pid":8'));
    writeFileSync(join(place, "other.json"), "not ours");
    const trace = await readTraces(place);
    expect(trace.traceEvents).toHaveLength(9);
    expect(trace.otherData.calls).toEqual({
      cuMemcpyHtoD_v2: { calls: 4, bytes: 256, ns: 6000, errors: 0 },
    });
    expect(summaryOf(trace).split("\n")).toEqual([
      expect.stringMatching(/^entry point +calls +bytes +ms +errors$/),
      expect.stringMatching(/^cuMemcpyHtoD_v2 +4 +256 +0\.006 +0$/),
      "6 events, 0 dropped, 0 broken",
    ]);
  });

  it("has the sums of a process whose newer part has none yet", async () => {
    writeFileSync(join(place, "gpu-7-1.old.json"), whole);
    expect((await readTraces(place)).otherData.calls.cuMemcpyHtoD_v2?.calls).toBe(2);
    writeFileSync(join(place, "gpu-7-1.json"), `${head}\n${meta}`);
    expect((await readTraces(place)).otherData.calls.cuMemcpyHtoD_v2?.calls).toBe(2);
  });

  it("may hold links and other things that a container has put there: none is followed or waited for", async () => {
    symlinkSync("/etc/passwd", join(place, "gpu-1-1.json"));
    execFileSync("mkfifo", [join(place, "gpu-2-1.json")]);
    await expect(readTraces(place)).rejects.toThrow(NotFound);
    await expect(readTraces(join(place, "gpu-1-1.json"))).rejects.toThrow(/is a symbolic link/);
    await expect(readTraces(join(place, "gpu-2-1.json"))).rejects.toThrow(/is not a file/);
    await expect(readTraces(join(place, "gpu-3-1.json"))).rejects.toThrow(NotFound);
  });
});
