// The gate before CRIU, the native program itself and cedanad's side of it, with a script for CRIU and ourselves for the engine.

import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import {
  closeSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import type { Logger } from "pino";
import { afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { Gate, isPassed, removeGate } from "../../src/criu/gate.ts";
import { criuPath } from "../../src/criu/tools.ts";
import { learnVersionAnswer } from "../../src/criu/version-answer.ts";
import { Seqpacket } from "../../src/linux/addon.ts";
import { Request, RequestType } from "../../src/proto/generated/criu_rpc.ts";
import { BUILD_TIMEOUT_MS, buildKeeper, keeperBinary } from "../keeper/harness.ts";
import { until } from "../live/harness/until.ts";

let work: string;
let gate: Gate;
let engine: Seqpacket;
const started: ChildProcess[] = [];

beforeAll(buildKeeper, BUILD_TIMEOUT_MS);
beforeEach(async () => {
  // More than a socket's address has room for.
  work = mkdtempSync(join(tmpdir(), "cedana-gate-"));
  const deep = join(work, "d".repeat(100));
  mkdirSync(deep);
  mkdirSync(join(work, "bin"));
  // Says what it was given, and what the engine has asked for.
  writeFileSync(
    join(work, "bin/criu"),
    '#!/bin/sh\necho "criu $*"\nenv | grep -E "^(PATH|CRIU|CEDANA|OWN)" | sort\n[ "$*" = "swrk 3" ] && dd bs=4096 count=1 <&3 2>/dev/null | od -An -tx1\nexit 7\n',
    { mode: 0o755 },
  );
  gate = await Gate.forDump(
    deep,
    { program: keeperBinary, path: `${work}/bin:/usr/bin:/bin` },
    join(work, "dump.log"),
  );
});
afterEach(async () => {
  gate[Symbol.dispose]();
  engine?.[Symbol.dispose]();
  for (const child of started.splice(0)) child.kill("SIGKILL");
  rmSync(work, { recursive: true });
});

interface Ended {
  status: number | null;
  stdout: string;
  stderr: string;
}

/** As an engine finds it: by PATH. */
function start(args: string[], env: NodeJS.ProcessEnv = {}): Promise<Ended> {
  engine?.[Symbol.dispose]();
  const pair = Seqpacket.pair();
  engine = pair.ours;
  const child = spawn("criu", args, {
    env: { OWN: "kept", ...gate.env, ...env },
    stdio: ["ignore", "pipe", "pipe", pair.theirs],
  });
  closeSync(pair.theirs);
  started.push(child);
  return Promise.all([once(child, "close"), text(child.stdout!), text(child.stderr!)]).then(
    ([[status], stdout, stderr]) => ({ status, stdout, stderr }),
  );
}

/** Of the variables by which an engine is told of a gate. */
const withoutGate = { CEDANA_CRIU_GATE: undefined, CRIU_CONFIG_FILE: undefined };

const ask = (type: RequestType) => engine.send(Request.encode({ type }));
/** What the script says when it is CRIU. */
const criuSays = (args: string, request?: string) =>
  [
    `criu ${args}`,
    `CRIU_CONFIG_FILE=${gate.directory}/criu.conf`,
    "OWN=kept",
    `PATH=${work}/bin:/usr/bin:/bin`,
    ...(request === undefined ? [] : [request]),
    "",
  ].join("\n");

describe("the gate", () => {
  it("lets a dump go when it is opened, with its request, its environment, and the configuration of that moment", async () => {
    expect(gate.isSeen).toBe(false);
    const ended = start(["swrk", "3"]);
    ask(RequestType.DUMP);
    await gate.arrived;
    expect([gate.isSeen, gate.isPassed]).toEqual([true, false]);
    gate.open("network-lock skip\n");
    expect(await ended).toEqual({ status: 7, stdout: criuSays("swrk 3", " 08 01"), stderr: "" });
    expect(gate.isPassed).toBe(true);
    expect(readFileSync(join(gate.directory, "criu.conf"), "utf8")).toBe("network-lock skip\n");
  });

  it("lets through at once what only asks, and every other command", async () => {
    for (const type of [RequestType.VERSION, RequestType.FEATURE_CHECK, RequestType.CHECK]) {
      const ended = start(["swrk", "3"]);
      ask(type);
      const request = ` 08 ${type.toString(16).padStart(2, "0")}`;
      expect(await ended).toEqual({ status: 7, stdout: criuSays("swrk 3", request), stderr: "" });
    }
    for (const args of [["--version"], ["check", "--all"], ["swrk"], ["swrk", "three"]])
      expect((await start(args)).stdout, args.join(" ")).toContain(criuSays(args.join(" ")).trim());
    expect(gate.isPassed).toBe(false);
  });

  it("answers for the version what this CRIU has answered, with a gate and without, and asks another one", async () => {
    process.env.CEDANA_RUN_DIR = work;
    const tools = join(work, "criu-tools");
    const criu = join(work, "bin/criu");
    const says = '#!/bin/sh\ndd bs=4096 count=1 <&3 >/dev/null 2>&1\nprintf "\\010\\012\\020\\001" >&3\n';
    writeFileSync(criu, says);
    const answer = Buffer.from([0x08, 0x0a, 0x10, 0x01]);
    const failures: Error[] = [];
    const log = { info: ({ err }: { err: Error }) => void failures.push(err) } as unknown as Pick<
      Logger,
      "info"
    >;
    try {
      const path = await criuPath(keeperBinary, `${work}/bin:/usr/bin:/bin`);
      learnVersionAnswer(path, log);
      await until(() => existsSync(join(tools, "version")), { what: () => `CRIU's answer (${failures})` });
      gate[Symbol.dispose]();
      removeGate(gate.directory);
      gate = await Gate.forDump(work, { program: keeperBinary, path }, join(work, "dump.log"));
      for (const env of [gate.env, { PATH: path }]) {
        const answered = start(["swrk", "3"], { ...withoutGate, ...env });
        ask(RequestType.VERSION);
        expect(await answered).toEqual({ status: 0, stdout: "", stderr: "" });
        expect(engine.receive()?.data).toEqual(answer);
      }

      writeFileSync(criu, `${says}exit 9\n`); // an upgrade
      const asked = start(["swrk", "3"]);
      ask(RequestType.VERSION);
      expect((await asked).status).toBe(9);
      learnVersionAnswer(path, log);
      await until(() => failures.length > 0, { what: () => "the failure" });
      expect(failures[0]!.message).toMatch(/bin\/criu does not say its version: it ended with status 9/);
    } finally {
      delete process.env.CEDANA_RUN_DIR;
    }
  });

  it("is not there for what an engine asks without one: a restore goes through, with its environment as it is", async () => {
    const path = `${gate.directory}:${work}/bin:/usr/bin:/bin`;
    const ended = start(["swrk", "3"], { ...withoutGate, PATH: path, CRIU_CONFIG_FILE: "/its/own" });
    ask(RequestType.RESTORE);
    const said = criuSays("swrk 3", " 08 02").replace(`${gate.directory}/criu.conf`, "/its/own");
    expect(await ended).toEqual({
      status: 7,
      stdout: said.replace(`PATH=${work}`, `PATH=${gate.directory}:${work}`),
      stderr: "",
    });
  });

  it.each([
    ["that it doesn't know", new Uint8Array([0x08, 0x7f])],
    ["that is none", new Uint8Array([0xff, 0xff, 0xff])],
    [
      "longer than what is looked at",
      Request.encode({ type: RequestType.DUMP, opts: { imagesDirFd: 1, logFile: "x".repeat(9000) } }),
    ],
    ["whose type isn't first", new Uint8Array([0x12, 0x00, 0x08, 0x01])],
  ])("stops a request %s", async (_what, request) => {
    const ended = start(["swrk", "3"]);
    engine.send(request);
    await gate.arrived;
    gate[Symbol.dispose]();
    expect(await ended).toMatchObject({ status: 1, stdout: "" });
    expect(gate.isPassed).toBe(false);
  });

  it("sends CRIU away when it is closed, also one that comes later", async () => {
    const early = start(["swrk", "3"]);
    ask(RequestType.DUMP);
    await gate.arrived;
    gate[Symbol.dispose]();
    const no = { status: 1, stdout: "", stderr: expect.stringMatching(/does not want it any more/) };
    expect(await early).toEqual(no);
    const late = start(["swrk", "3"]);
    ask(RequestType.DUMP);
    expect(await late).toEqual(no);
    expect(isPassed(gate.directory)).toBe(false);
    removeGate(gate.directory);
    const latest = spawn(keeperBinary, ["swrk", "3"], { argv0: "criu", env: gate.env, stdio: "ignore" });
    expect((await once(latest, "exit"))[0]).toBe(1);
  });

  it("ends with the engine, before and after its request", async () => {
    const silent = start(["swrk", "3"]);
    engine[Symbol.dispose]();
    expect(await silent).toMatchObject({
      status: 1,
      stderr: expect.stringMatching(/read the engine's request/),
    });
    const waiting = start(["swrk", "3"]);
    ask(RequestType.DUMP);
    await gate.arrived;
    engine[Symbol.dispose]();
    expect(await waiting).toEqual({ status: 1, stdout: "", stderr: "" }); // nobody is there to hear it
    gate.open(""); // to nobody
    expect(gate.isPassed).toBe(false);
  });

  it("doesn't wait for ever", async () => {
    const ended = start(["swrk", "3"], { CEDANA_CRIU_GATE_MS: "50" });
    ask(RequestType.DUMP);
    expect(await ended).toMatchObject({
      status: 1,
      stderr: expect.stringMatching(/wait for cedanad: .*timed out/i),
    });
    expect(gate.isPassed).toBe(false);
  });

  it("is no way to a CRIU that isn't there, nor to itself", async () => {
    rmSync(join(work, "bin/criu"));
    symlinkSync(keeperBinary, join(work, "bin/criu"));
    for (const PATH of [`${gate.directory}:/nowhere`, `${gate.directory}:${work}/bin`]) {
      const child = spawn(join(gate.directory, "criu"), ["--version"], { env: { ...gate.env, PATH } });
      started.push(child);
      expect(await text(child.stderr)).toMatch(/there is no criu in PATH/);
      if (child.exitCode === null) await once(child, "exit");
      expect(child.exitCode).toBe(1);
    }
    const child = spawn(join(gate.directory, "criu"), [], { env: { CEDANA_CRIU_GATE: "here" } });
    expect(await text(child.stderr)).toMatch(/CEDANA_CRIU_GATE names no directory/);
  });

  it("leaves nothing open, and nothing in its place", async () => {
    gate[Symbol.dispose]();
    gate[Symbol.dispose]();
    expect(existsSync(join(gate.directory, "socket"))).toBe(false);
    removeGate(gate.directory);
    expect(existsSync(gate.directory)).toBe(false);
    expect(existsSync(join(work, "dump.log"))).toBe(false);
  });

  it("that can't be made leaves nothing, and nobody's log is gone with it", async () => {
    const [inside, log] = [join(work, "inside"), join(work, "theirs.log")];
    mkdirSync(inside);
    mkdirSync(log);
    await expect(Gate.forDump(inside, { program: keeperBinary, path: "/bin" }, log)).rejects.toThrow(
      /EEXIST/,
    );
    expect(readdirSync(inside)).toEqual([]);
    expect(existsSync(log)).toBe(true);
  });

  it("bars CRIU's log until the way is cleared, and takes nothing away that isn't its own", async () => {
    const log = join(work, "dump.log");
    expect(() => writeFileSync(log, "")).toThrow("EISDIR");
    gate.unbar();
    gate.unbar();
    writeFileSync(log, "CRIU's\n");
    removeGate(gate.directory);
    expect(readFileSync(log, "utf8")).toBe("CRIU's\n");
  });
});

describe("the gate of a restore", () => {
  const options = () => ({ program: keeperBinary, path: `${work}/bin:/usr/bin:/bin` });
  const config = () => readFileSync(join(gate.directory, "criu.conf"), "utf8");
  /** What the script says when nothing was between the engine and it. */
  const byItself = (request: string) =>
    [
      "criu swrk 3",
      `CEDANA_CRIU_GATE=${gate.directory}`,
      "CEDANA_CRIU_GATE_HOLDS=first",
      `CRIU_CONFIG_FILE=${gate.directory}/criu.conf`,
      "OWN=kept",
      `PATH=${gate.directory}:${work}/bin:/usr/bin:/bin`,
      request,
      "",
    ].join("\n");

  beforeEach(async () => {
    gate[Symbol.dispose]();
    removeGate(gate.directory);
    gate = await Gate.forRestore(work, options());
  });

  it("holds whatever comes first until it is opened, and is not in the way after that", async () => {
    expect(existsSync(join(work, "dump.log"))).toBe(false); // another's may be there
    const asked = start(["swrk", "3"]);
    ask(RequestType.VERSION);
    await gate.arrived;
    expect(config()).toMatch(/closed/);
    expect([gate.isSeen, gate.isPassed]).toEqual([true, false]);
    gate.open("tcp-close\n");
    expect(await asked).toEqual({ status: 7, stdout: criuSays("swrk 3", " 08 0a"), stderr: "" });
    expect(gate.isPassed).toBe(true);
    const restored = start(["swrk", "3"]);
    ask(RequestType.RESTORE);
    expect(await restored).toEqual({ status: 7, stdout: byItself(" 08 02"), stderr: "" });
    expect(config()).toBe("tcp-close\n");
  });

  it("sends away who comes first when it is closed", async () => {
    const asked = start(["swrk", "3"]);
    ask(RequestType.VERSION);
    await gate.arrived;
    gate[Symbol.dispose]();
    expect(await asked).toMatchObject({ status: 1, stdout: "", stderr: expect.stringMatching(/cedanad/) });
    expect(gate.isPassed).toBe(false);
    expect(await gate.hasRefused()).toBe(false);
  });

  it("tells of a CRIU that came by another way and refused its configuration", async () => {
    writeFileSync(join(work, "bin/criu"), '#!/bin/sh\ncat "$CRIU_CONFIG_FILE" >/dev/null\nexit 1\n');
    const other = start(["swrk", "3"], { PATH: `${work}/bin:/usr/bin:/bin` });
    expect((await other).status).toBe(1);
    expect([gate.isSeen, await gate.hasRefused()]).toEqual([false, true]);
  });

  it("is open from the start where nobody is to wait, and tells that somebody came", async () => {
    gate[Symbol.dispose]();
    gate = Gate.openFromStart(work, options(), "tcp-close\n");
    expect([gate.isSeen, gate.isPassed]).toEqual([false, true]);
    const asked = start(["swrk", "3"]);
    ask(RequestType.VERSION);
    expect(await asked).toEqual({ status: 7, stdout: criuSays("swrk 3", " 08 0a"), stderr: "" });
    expect(gate.isSeen).toBe(true);
    const restored = start(["swrk", "3"]);
    ask(RequestType.RESTORE);
    expect((await restored).stdout).toBe(byItself(" 08 02"));
    expect(config()).toBe("tcp-close\n");
  });
});
