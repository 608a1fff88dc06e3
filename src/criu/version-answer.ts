import { spawn } from "node:child_process";
import { once } from "node:events";
import { closeSync } from "node:fs";
import { readFile, rename, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { Logger } from "pino";
import { Seqpacket } from "../linux/addon.ts";
import { fileIdentity } from "../linux/file-identity.ts";
import { toolsDirectory } from "./tools.ts";

/*
 * What CRIU answers when an engine asks for its version, byte for byte. Both engines start CRIU for that before each dump and restore; our
 * `criu` (tools.ts) gives the answer in its place, as long as CRIU is the file that gave it.
 */

const TIMEOUT_MS = 10_000;
/** A request of nothing but its type, VERSION. Source: CRIU images/rpc.proto, criu_req. */
const QUESTION = new Uint8Array([0x08, 0x0a]);

/** The file of CRIU whose answer is there, as `fileIdentity` says it. */
let known: string | undefined;
let underWay = false;

/**
 * Asks the CRIU of an engine's PATH, where its answer isn't there yet: in its own time, for the dumps and restores to come.
 * @param path    as `criuPath` gave it
 * @param log     told why it doesn't answer; nothing depends on it
 */
export function learnVersionAnswer(path: string, log: Pick<Logger, "info">): void {
  const [tools, ...others] = path.split(":");
  if (tools !== toolsDirectory()) return; // left out
  const criu = criuIn(others);
  if (!criu || underWay || known === criu.of) return;
  underWay = true;
  void learn(criu, join(tools, "version"))
    .catch((error) => log.info({ err: error }, "CRIU's answer for its version is not kept"))
    .finally(() => {
      underWay = false;
    });
}

async function learn({ file, of }: { file: string; of: string }, place: string): Promise<void> {
  const there = await readFile(place, "latin1").catch(() => ""); // ENOENT: the first in this run directory
  if (!there.startsWith(`${of}\n`)) {
    const answer = await ask(file);
    if (fileIdentity(file) !== of) return; // an upgrade meanwhile
    await writeFile(`${place}.${process.pid}`, Buffer.concat([Buffer.from(`${of}\n`), answer]), {
      mode: 0o600,
    });
    await rename(`${place}.${process.pid}`, place);
  }
  known = of;
}

function criuIn(directories: readonly string[]): { file: string; of: string } | undefined {
  for (const directory of directories) {
    const file = join(directory || ".", "criu");
    const of = fileIdentity(file);
    if (of !== undefined) return { file, of };
  }
  return undefined;
}

async function ask(criu: string): Promise<Uint8Array> {
  const { ours, theirs } = Seqpacket.pair();
  using socket = ours;
  const child = spawn(criu, ["swrk", "3"], { stdio: ["ignore", "ignore", "ignore", theirs] });
  closeSync(theirs);
  const timer = setTimeout(() => child.kill("SIGKILL"), TIMEOUT_MS);
  try {
    await once(child, "spawn");
    const ended = once(child, "exit");
    socket.send(QUESTION);
    const answer = await new Promise<Uint8Array>((resolve) =>
      socket.onReadable(() => {
        const packet = socket.receive();
        if (packet === undefined) return;
        socket.ended();
        resolve(packet.data);
      }),
    );
    const [status] = await ended;
    if (status !== 0 || answer.length === 0)
      throw new Error(`${criu} does not say its version: it ended with status ${status}`);
    return answer;
  } finally {
    clearTimeout(timer);
  }
}
