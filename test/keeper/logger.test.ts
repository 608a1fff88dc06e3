// Log programs: their ready sign, their death, and their end.

import fs from "node:fs";
import { beforeAll, describe, expect, it } from "vitest";
import type { FieldValues } from "../../src/shim/keeper-protocol.ts";
import { until } from "../live/harness/until.ts";
import { BUILD_TIMEOUT_MS, buildKeeper, isAlive, Pod, type } from "./harness.ts";

beforeAll(buildKeeper, BUILD_TIMEOUT_MS);

const logProgram = 3;
const ECHILD = 10;
const ETIMEDOUT = 110;
const ECANCELED = 125;

const opening = (program: string, more: FieldValues = {}): FieldValues => ({
  io: "a",
  stdoutKind: logProgram,
  stderrKind: logProgram,
  driverArgv: [program, "key", "value"],
  driverEnv: ["CONTAINER_ID=c1", "CONTAINER_NAMESPACE=test"],
  ...more,
});
const run = async (pod: Pod, script: string) => await pod.link.run({ io: "a", argv: ["sh", "-c", script] });
const drain = async (pod: Pod, timeoutMs = 10_000) =>
  (await pod.link.operate(type.IO_DRAIN, { io: "a", timeoutMs })).int("errno");

describe.concurrent("a log program", () => {
  it("gets arguments, environment and both streams; Delete waits until it has written all", async () => {
    await using pod = await Pod.start();
    const log = pod.path("log");
    const program = pod.script(
      "logger",
      `echo "$@ $CONTAINER_ID $CONTAINER_NAMESPACE" > ${log}
exec 5>&-
cat <&3 > ${pod.path("out")} & cat <&4 > ${pod.path("err")} &
exec 3<&- 4<&-; wait; sleep 0.2; echo done >> ${log}`,
    );
    expect((await pod.link.operate(type.IO_OPEN, opening(program))).int("errno")).toBe(0);
    expect(fs.readFileSync(log, "utf8")).toBe("key value c1 test\n");
    expect(await run(pod, "seq 0 9999; echo oops >&2")).toBe(0);
    expect(await drain(pod)).toBe(0);
    expect(fs.readFileSync(log, "utf8")).toMatch(/done\n$/);
    expect(fs.readFileSync(pod.path("out"), "utf8").split("\n").length).toBe(10_001);
    expect(fs.readFileSync(pod.path("err"), "utf8")).toBe("oops\n");
    expect((await pod.link.operate(type.IO_FREE, { io: "a" })).int("errno")).toBe(0);
    expect(pod.link.count(type.EXIT)).toBe(0); // its end is nobody's business
  });

  it("that isn't ready keeps only its own container waiting, and fails it in time", async () => {
    await using pod = await Pod.start();
    const program = pod.script("logger", `echo $$ > ${pod.path("pid")}; exec sleep 1000`);
    pod.link.send(type.IO_OPEN, { request: 0, step: "open", ...opening(program, { timeoutMs: 1_500 }) });
    for (let i = 0; i < 3; i++) expect(await pod.link.run({ argv: ["true"] })).toBe(0);
    expect(pod.link.log.filter((m) => m.string("step") === "open")).toEqual([]);
    const result = await pod.link.result(0, "open");
    expect([result.int("errno"), result.string("message")]).toEqual([
      ETIMEDOUT,
      `log program ${program} is not ready in time`,
    ]);
    const pid = Number(fs.readFileSync(pod.path("pid"), "utf8"));
    await until(() => !isAlive(pid), { what: () => "its end" });
    expect((await pod.link.operate(type.IO_OPEN, { io: "a" })).int("errno")).toBe(0); // the key is free
  });

  it("that ends before it is ready is an error with its exit code", async () => {
    await using pod = await Pod.start();
    const program = pod.script("logger", "exit 4");
    for (let round = 0; round < 10; round++) {
      const result = await pod.link.operate(type.IO_OPEN, opening(program));
      expect([result.int("errno"), result.string("message")]).toEqual([
        ECHILD,
        `log program ${program} ended before it was ready (exit code 4)`,
      ]);
    }
    const missing = await pod.link.operate(type.IO_OPEN, opening("/no/such"));
    expect(missing.string("message")).toBe("start log program /no/such: No such file or directory");
    const none = await pod.link.operate(type.IO_OPEN, { io: "a", stdoutKind: logProgram });
    expect(none.string("message")).toBe("no log program is named");
  });

  it("that is freed before it is ready is no success", async () => {
    await using pod = await Pod.start();
    const program = pod.script("logger", "exec sleep 1000");
    pod.link.send(type.IO_OPEN, { request: 0, step: "open", ...opening(program) });
    expect((await pod.link.operate(type.IO_FREE, { io: "a" })).int("errno")).toBe(0);
    expect((await pod.link.result(0, "open")).int("errno")).toBe(ECANCELED);
  });

  it("that dies is told, and doesn't take the container along", async () => {
    await using pod = await Pod.start();
    const program = pod.script("logger", `echo x >&5; sleep 0.1; exit 7`);
    expect((await pod.link.operate(type.IO_OPEN, opening(program))).int("errno")).toBe(0);
    await until(() => /log program .*logger \(pid \d+\) ended with exit code 7/.test(pod.log()), {
      what: () => "the log",
    });
    expect(await run(pod, "for i in 1 2 3; do echo still here; done; exit 5")).toBe(5 << 8);
    expect(await drain(pod)).toBe(0);
    expect((await pod.link.operate(type.IO_FREE, { io: "a" })).int("errno")).toBe(0);
  });

  it("that stays after the end of its streams is asked to end, and then made to", async () => {
    await using pod = await Pod.start({ CEDANA_KEEPER_LOGGER_MS: "200" });
    for (const [trap, marker] of [
      [`trap 'echo term > ${pod.path("mark")}; exit 0' TERM`, "term\n"],
      ["trap '' TERM", undefined],
    ] as const) {
      fs.rmSync(pod.path("mark"), { force: true });
      const program = pod.script(
        "logger",
        `${trap}; echo $$ > ${pod.path("pid")}; exec 5>&-; cat <&3 >/dev/null; while :; do sleep 0.02; done`,
      );
      expect((await pod.link.operate(type.IO_OPEN, opening(program))).int("errno")).toBe(0);
      const pid = Number(fs.readFileSync(pod.path("pid"), "utf8"));
      await run(pod, "echo bye");
      expect(await drain(pod)).toBe(0); // it has had nothing to read for a second
      expect(isAlive(pid)).toBe(true);
      expect((await pod.link.operate(type.IO_FREE, { io: "a" })).int("errno")).toBe(0);
      expect(isAlive(pid)).toBe(false);
      expect(fs.existsSync(pod.path("mark")) ? fs.readFileSync(pod.path("mark"), "utf8") : undefined).toBe(
        marker,
      );
    }
  });

  it("is told of the end of its streams though a background process holds them, when they are freed", async () => {
    await using pod = await Pod.start({ CEDANA_KEEPER_LOGGER_MS: "200" });
    const program = pod.script("logger", "exec 5>&-; exec cat <&3 >/dev/null");
    await pod.link.operate(type.IO_OPEN, opening(program));
    await run(pod, `sleep 1000 & echo $! > ${pod.path("holder")}`);
    pod.pids.push(Number(fs.readFileSync(pod.path("holder"), "utf8")));
    expect(await drain(pod, 100)).toBe(ETIMEDOUT);
    expect((await pod.link.operate(type.IO_FREE, { io: "a" })).int("errno")).toBe(0);
  });

  it("may be one of many", async () => {
    await using pod = await Pod.start();
    const program = pod.script("logger", `exec 5>&-; exec cat <&3 >> ${pod.path("all")}`);
    const keys = Array.from({ length: 20 }, (_, i) => `io${i}`);
    for (const io of keys)
      expect((await pod.link.operate(type.IO_OPEN, opening(program, { io }))).int("errno")).toBe(0);
    for (const io of keys) expect(await pod.link.run({ io, argv: ["sh", "-c", `echo ${io}`] })).toBe(0);
    for (const io of keys)
      expect((await pod.link.operate(type.IO_DRAIN, { io, timeoutMs: 10_000 })).int("errno")).toBe(0);
    for (const io of keys) await pod.link.operate(type.IO_FREE, { io });
    expect(fs.readFileSync(pod.path("all"), "utf8").split("\n").filter(Boolean).sort()).toEqual(
      keys.toSorted(),
    );
    expect(pod.link.count(type.EXIT)).toBe(0);
  });
});
