import { spawn } from "node:child_process";
import { once } from "node:events";
import { closeSync } from "node:fs";
import { join } from "node:path";
import { Seqpacket } from "../linux/addon.ts";
import { fileIdentity } from "../linux/file-identity.ts";

/*
 * What CRIU answers when an engine asks for its version, byte for byte. Both engines start CRIU for that before each dump; the gate
 * gives the answer in its place, as long as CRIU is the file that gave it.
 */

const TIMEOUT_MS = 10_000;
/** A request of nothing but its type, VERSION. Source: CRIU images/rpc.proto, criu_req. */
const QUESTION = new Uint8Array([0x08, 0x0a]);

export interface VersionAnswer {
  /** the file of CRIU, as `fileIdentity` says it */
  readonly of: string;
  readonly answer: Uint8Array;
}

let known: VersionAnswer | undefined;
let underWay = false;

/** undefined until it has been learned of the CRIU that is first in this PATH. */
export function versionAnswer(path: string): VersionAnswer | undefined {
  return known?.of === criuIn(path)?.of ? known : undefined;
}

/**
 * Asks the first CRIU of a PATH, where its answer isn't known yet: in its own time, for the dumps to come.
 * @param failed  told why it doesn't answer; nothing depends on it
 */
export function learnVersionAnswer(path: string, failed: (error: Error) => void): void {
  const criu = criuIn(path);
  if (!criu || underWay || known?.of === criu.of) return;
  underWay = true;
  void ask(criu.file)
    .then((answer) => {
      if (fileIdentity(criu.file) === criu.of) known = { of: criu.of, answer };
    })
    .catch(failed)
    .finally(() => {
      underWay = false;
    });
}

function criuIn(path: string): { file: string; of: string } | undefined {
  for (const directory of path.split(":")) {
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
