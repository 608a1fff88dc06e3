// Random and malformed bytes from both sides, under the sanitizers. Seeded, so that a failure can be had again:
//   CEDANA_FUZZ_SECONDS=60 CEDANA_FUZZ_SEED=7 vitest run --project unit test/keeper/fuzz.test.ts
// In what cedanad's side sends, values that name files or programs come from a harmless list: a keeper does what it is told.

import fs from "node:fs";
import { connect, type Socket } from "node:net";
import { beforeAll, describe, expect, it } from "vitest";
import { fieldKey, MessageReader, messageType } from "../../src/shim/keeper-protocol.ts";
import { encodeRequest } from "../../src/ttrpc/index.ts";
import { Random } from "../ttrpc/random.ts";
import { BUILD_TIMEOUT_MS, buildKeeper, isAlive, type Link, Pod, type } from "./harness.ts";

beforeAll(buildKeeper, BUILD_TIMEOUT_MS);

const seconds = Number(process.env.CEDANA_FUZZ_SECONDS ?? 2);
const seed = Number(process.env.CEDANA_FUZZ_SEED ?? Date.now() % 1_000_000);
const TIMEOUT_MS = seconds * 1_000 + 60_000;

/** Everything must still work: containerd's side and cedanad's. */
async function expectWell(pod: Pod): Promise<void> {
  expect(isAlive(pod.pid), `the keeper lives; seed ${seed}; ${pod.findings()}`).toBe(true);
  const client = await pod.client();
  const outcome = client.call("probe", "Probe", Buffer.from("probe"));
  const link = await pod.cedanad.keeper();
  const request = await link.take(type.REQUEST, (message) => message.bytes("frame").includes("Probe"));
  link.respond(request, "well");
  expect(Buffer.from(await outcome).toString(), `seed ${seed}`).toBe("well");
  client.close();
}

function ttrpcBytes(random: Random): Buffer {
  const header = Buffer.alloc(10);
  const payload =
    random.int(2) === 0
      ? Buffer.from(random.bytes(random.int(200)))
      : Buffer.from(
          encodeRequest({
            service: ["containerd.task.v2.Task", "x", ""][random.int(3)]!,
            method: ["Connect", "Pids", "Create", ""][random.int(4)]!,
            payload: random.bytes(random.int(60)),
            timeoutMs: [undefined, 1, 1e12][random.int(3)],
          }),
        );
  for (let flips = random.int(4); flips > 0 && payload.length > 0; flips--)
    payload[random.int(payload.length)]! ^= 1 << random.int(8);
  const lies = [
    payload.length,
    payload.length,
    payload.length,
    random.int(300),
    4 << 20,
    (4 << 20) + 1,
    0xffffffff,
  ];
  header.writeUInt32BE(lies[random.int(lies.length)]!, 0);
  header.writeUInt32BE(random.int(2) === 0 ? 1 : random.int(2 ** 31), 4);
  header[8] = random.int(5);
  header[9] = random.int(256);
  return random.int(8) === 0
    ? Buffer.from(random.bytes(random.int(4_000)))
    : Buffer.concat([header, payload]);
}

const { IO_OPEN, IO_FREE, IO_DRAIN, SPAWN } = messageType;
/** Those with the most state behind them come more often. */
const operations = [IO_OPEN, IO_OPEN, IO_OPEN, IO_FREE, IO_FREE, IO_DRAIN, SPAWN, SPAWN, SPAWN];

/** A frame of cedanad's: any type, any fields, some of them damaged. Never one that could harm the machine. */
function frameBytes(random: Random, pod: Pod, damage = true): Buffer {
  const types = [...Object.values(messageType).filter((one) => one !== messageType.LEAVE), ...operations];
  const chosen = random.int(12) === 0 ? random.int(65_536) : types[random.int(types.length)]!;
  if (chosen === messageType.LEAVE) return Buffer.alloc(0);
  const paths = [
    "",
    pod.path("fifo"),
    pod.path("file"),
    pod.path("no/such"),
    "relative",
    "x".repeat(5_000),
    pod.dir,
  ];
  const harmless: Partial<Record<keyof typeof fieldKey, readonly string[]>> = {
    argv: ["true", "false", "", "/no/such", "--flag"],
    driverArgv: [pod.path("slow"), pod.path("slow"), "true", "/no/such", ""],
    env: ["A=b", "", "=", "NOPE"],
    driverEnv: ["A=b", ""],
    cwd: ["", pod.dir, "/no/such"],
    io: ["a", "b", ""],
    step: ["s", "t", ""],
    id: ["c1", "c2", ""],
    eventKey: ["k", "l", ""],
    mountType: ["nofs", ""],
    consoleSocket: ["", pod.path("console")],
    outputPath: ["", pod.path("file")],
    target: ["", "/", "relative", pod.path("target")],
    stdin: ["", "", "", ...paths],
    stdout: paths,
    stderr: paths,
    source: paths,
    path: paths,
    mountData: ["", "x".repeat(5_000), "a=b,,c"],
    bundle: ["", pod.bundle],
  };
  const integers = new Set([
    "pid",
    "request",
    "signal",
    "sequence",
    "nonce",
    "uid",
    "gid",
    "loop",
    "mountFlags",
  ]);
  const names = Object.keys(fieldKey) as (keyof typeof fieldKey)[];
  const parts: Buffer[] = [];
  const field = (key: number, value: Uint8Array, length = value.length) => {
    const header = Buffer.alloc(8);
    header.writeUInt16LE(key, 0);
    header.writeUInt32LE(length, 4);
    parts.push(header, Buffer.from(value));
  };
  const fitting = (relevant[chosen] ?? []).filter(() => random.int(8) > 0);
  for (let count = random.int(4); count > 0; count--) fitting.push(names[random.int(names.length)]!);
  for (const name of fitting) {
    if (["mountFlags", "loop", "uid", "gid"].includes(name)) continue;
    const values = harmless[name];
    if (values) {
      field(fieldKey[name], Buffer.from(values[random.int(values.length)]!));
    } else if (integers.has(name) || random.int(2) === 0) {
      const value = Buffer.alloc(8);
      const few = name.endsWith("Kind") ? 4 : 7;
      const number = [0n, 1n, 2n, 3n, -1n, 2n ** 62n, BigInt(random.int(1_000))][random.int(few)]!;
      value.writeBigInt64LE(number);
      field(fieldKey[name], value.subarray(0, random.int(20) === 0 ? random.int(8) : 8));
    } else {
      field(fieldKey[name], random.bytes(random.int(40)));
    }
  }
  if (damage && random.int(10) === 0) field(random.int(100) + 100, random.bytes(5), random.int(2 ** 31)); // runs over the frame
  if (damage && random.int(20) === 0) parts.push(Buffer.from(random.bytes(random.int(7)))); // ends inside a header
  const payload = Buffer.concat(parts);
  const header = Buffer.alloc(8);
  header.writeUInt32LE(damage && random.int(20) === 0 ? random.int(2 ** 31) : payload.length, 0);
  header.writeUInt16LE(chosen, 4);
  return Buffer.concat([header, payload]);
}

const tag = ["request", "step"] as const;
/** What each message of cedanad's may carry: most frames are nearly right, or they would test no more than the decoder. */
const relevant: { [type: number]: readonly (keyof typeof fieldKey)[] } = {
  [messageType.WELCOME]: ["version", "pid", "errno", "message"],
  [messageType.TASK]: ["id", "bundle", "pid", "execPid"],
  [messageType.TASK_GONE]: ["id"],
  [messageType.RESPONSE]: ["request", "frame"],
  [messageType.PARKED]: ["request"],
  [messageType.TAKEN]: ["request"],
  [messageType.ACK]: ["sequence"],
  [messageType.SPAWN]: [
    ...tag,
    "argv",
    "argv",
    "env",
    "cwd",
    "io",
    "consoleSocket",
    "outputPath",
    "timeoutMs",
  ],
  [messageType.SIGNAL]: [...tag, "pid", "signal"],
  [messageType.MOUNT]: [...tag, "mountType", "source", "target", "mountData", "cwd"],
  [messageType.UNMOUNT]: [...tag, "target"],
  [messageType.IO_OPEN]: [
    ...tag,
    ...(["io", "terminal", "stdin", "stdout", "stderr", "stdoutKind", "stderrKind", "driverArgv"] as const),
    ...(["driverArgv", "driverEnv", "timeoutMs"] as const),
  ],
  [messageType.IO_RESIZE]: [...tag, "io", "width", "height"],
  [messageType.IO_CLOSE_STDIN]: [...tag, "io"],
  [messageType.IO_DRAIN]: [...tag, "io", "timeoutMs"],
  [messageType.IO_FREE]: [...tag, "io"],
  [messageType.EVENT]: ["id", "eventKey", "frame"],
  [messageType.WATCH_OOM]: [...tag, "id", "path", "flags"],
};

describe.concurrent("hostile bytes", () => {
  it(
    "on the pod's socket neither end the keeper nor reach anything but their own connection",
    async () => {
      await using pod = await Pod.start({ CEDANA_KEEPER_PATIENCE_MS: "400" });
      const random = new Random(seed);
      const end = Date.now() + seconds * 1_000;
      for (let round = 0; Date.now() < end; round++) {
        if (round % 40 === 39) {
          await pod.cedanad.die(); // what comes now is answered alone
          await new Promise((resolve) => setTimeout(resolve, 30));
          await pod.cedanad.listen();
        }
        const socket: Socket = connect(pod.socketPath);
        socket.on("error", () => {});
        socket.resume();
        for (let part = 1 + random.int(6); part > 0; part--) socket.write(ttrpcBytes(random));
        if (random.int(2) === 0) await new Promise((resolve) => setTimeout(resolve, random.int(3)));
        if (random.int(2) === 0) socket.end();
        else socket.destroy();
        for (const link of pod.cedanad.links) // answers, or the bounds are all that is tested
          for (const request of link.log.splice(0))
            if (request.type === type.REQUEST) respond(link, request.int("request"), random);
      }
      pod.link = await pod.cedanad.keeper().catch(() => pod.link);
      await expectWell(pod);
    },
    TIMEOUT_MS,
  );

  it(
    "from cedanad's side end their connection at most",
    async () => {
      await using pod = await Pod.start();
      const random = new Random(seed + 1);
      const end = Date.now() + seconds * 1_000;
      fs.writeFileSync(pod.path("file"), "");
      pod.mkfifo("fifo");
      pod.script("slow", "exec sleep 0.05");
      const client = await pod.client();
      for (let i = 0; i < 20; i++)
        client.call("x", "Y", new Uint8Array(), { timeoutMs: 1e9 }).catch(() => {});
      while (Date.now() < end) {
        const link = await pod.cedanad.keeper();
        // A connection that ends within a second makes the keeper pause: it ends by its last frames, after many good ones.
        const enough = Date.now() + 1_050;
        for (let count = 1; !link.closed && Date.now() < end + 1_000; count++) {
          link.socket.write(frameBytes(random, pod, Date.now() > enough));
          if (count % 20 === 0) await new Promise((resolve) => setTimeout(resolve, random.int(3)));
        }
        link.log.splice(0, link.log.length - 1);
        expect(isAlive(pod.pid), `seed ${seed}; ${pod.findings()}`).toBe(true);
      }
      await pod.cedanad.die();
      pod.link = await pod.returnCedanad();
      await expectWell(pod);
    },
    TIMEOUT_MS,
  );

  it("from a keeper's side are taken apart or refused by cedanad's reader, however they are cut", () => {
    const random = new Random(seed + 2);
    const end = Date.now() + seconds * 250;
    const ground = { path: (name: string) => `/tmp/${name}`, dir: "/tmp", bundle: "/tmp" } as Pod;
    while (Date.now() < end) {
      const bytes = Buffer.concat(Array.from({ length: 20 }, () => frameBytes(random, ground)));
      const outcome = (cut: () => number) => {
        const reader = new MessageReader();
        const seen: string[] = [];
        try {
          for (let at = 0; at < bytes.length; ) {
            const next = at + cut();
            for (const message of reader.push(bytes.subarray(at, next)))
              seen.push(
                `${message.type} ${message.int("pid")} ${message.string("id")} ${message.ints("execPid")}`,
              );
            at = next;
          }
        } catch (error) {
          seen.push((error as Error).message);
        }
        return seen;
      };
      expect(
        outcome(() => 1 + random.int(9)),
        `seed ${seed}`,
      ).toEqual(outcome(() => bytes.length));
    }
  });
});

function respond(link: Link, request: number, random: Random): void {
  if (!link.closed) link.send(type.RESPONSE, { request, frame: random.bytes(random.int(30)) });
}
