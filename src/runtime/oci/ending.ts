import { spawn } from "node:child_process";
import { join } from "node:path";
import type { Logger } from "pino";
import { offerCheckpoint, withdrawOffer } from "../../checkpoint/resume.ts";
import { NotFound, RuntimeFailed, TimedOut, WrongState } from "../../errors/index.ts";
import type { Cgroup } from "../../linux/cgroup.ts";
import { isAlive } from "../../linux/proc.ts";
import { placeForSignal, type SignalCheckpoint } from "../checkpoint-on.ts";
import { readSpec } from "../spec.ts";
import { type Conversation, type OciCall, ownGlobalArgv, type RunOptions } from "./call.ts";
import { checkpointInTurn } from "./checkpoint.ts";
import { type EndingRecord, type Marker, readMarker, writeMarker } from "./marker.ts";
import { endOf, runEngineHere } from "./own-engine.ts";
import { cgroupOf, namespaceOf } from "./state.ts";
import { inTurn } from "./turns.ts";

/** cedana-exit needs the time in which the kernel stops a thread, or thaws it. */
const exitPatienceMs = 10_000;

export interface Ending {
  readonly call: OciCall;
  readonly marker: Marker & { ending: EndingRecord };
  readonly log: Logger;
  readonly signal: AbortSignal;
}

/**
 * Checkpoints a container and ends it; see endings.ts.
 * @throws what keeps it from that; it may be frozen then
 */
export async function end(ending: Ending): Promise<void> {
  const { call, marker, log, signal } = ending;
  const { pid, startTime: started, sent, whole } = marker.ending;
  let path = whole;
  let wanted: SignalCheckpoint | undefined;
  try {
    signal.throwIfAborted();
    const cgroup = await cgroupOf(marker, pid);
    wanted = await placeForSignal(await readSpec(marker.bundle!), namespaceOf(call.root), call.id);
    if (!wanted) throw new NotFound(`container ${call.id} no longer asks for a checkpoint`);
    const [asked, place] = [wanted, join(wanted.place.directory, wanted.place.generation)];
    path ??= place;
    if (whole === undefined)
      await inTurn(call.marker, signal, async () => await dumpFrozen(ending, cgroup, asked, place));
    else if (!(await cgroup.isFrozen()))
      throw new WrongState(`container ${call.id} has run on after its checkpoint`);
    if (wanted.resumable) await offerCheckpoint(path, { pid, startTime: started });
    signal.throwIfAborted();
    await endFrozen(ending, cgroup, 128 + sent);
  } catch (error) {
    if (!isAlive(pid, started)) throw error; // by somebody else: it goes on where it was dumped all the same
    if (path !== undefined) await withdrawOffer(path);
    throw error;
  }
  log.info({ path, signal: sent }, "checkpointed instead of being sent the signal");
  await wanted.store
    .prune(wanted.owner, wanted.name, wanted.keep)
    .catch((error) => log.warn({ err: error }, "remove older checkpoints"));
}

/** From here on no instruction of the container's is executed; that the checkpoint is whole comes on record. */
async function dumpFrozen(
  ending: Ending,
  cgroup: Cgroup,
  wanted: SignalCheckpoint,
  path: string,
): Promise<void> {
  const { call, marker, signal } = ending;
  if (!(await cgroup.isFrozen())) await cgroup.freeze(undefined, signal);
  const globalArgv = ownGlobalArgv(call);
  const argv = [`--image-path=${path}`, "--leave-running", "--", call.id];
  const dumping = { ...call, command: "checkpoint", globalArgv, argv, cwd: "/", pid: process.pid };
  await checkpointInTurn(dumping, new OwnConversation(ending), wanted);
  if (readMarker(call.marker))
    writeMarker(call.marker, { ...marker, ending: { ...marker.ending, whole: path } });
}

/** Ends the frozen container with a status of our choice; what fails ends it with SIGKILL's. */
async function endFrozen({ marker, log }: Ending, cgroup: Cgroup, status: number): Promise<void> {
  const { helper, pid, startTime: started } = marker.ending;
  try {
    for (const other of await cgroup.pids()) if (other !== pid) killIfThere(other);
    await exitFrozen(helper, pid, status, async () => await cgroup.thaw());
  } catch (error) {
    log.warn({ err: error, status }, "the container ends with the status of SIGKILL instead");
    await cgroup.kill();
    await cgroup.thaw().catch(() => {}); // NotFound: it has gone
  }
  for (let attempt = 0; isAlive(pid, started); attempt++) {
    if (attempt > 1000) throw new TimedOut(`process ${pid} doesn't end`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

function killIfThere(pid: number): void {
  try {
    process.kill(pid, "SIGKILL");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
  }
}

/**
 * Makes a process of a frozen cgroup end with a status, without running on (addon/keeper/exit.c).
 * @param thaw  called when it is held
 * @throws RuntimeFailed, TimedOut; then it runs, or has been killed
 */
async function exitFrozen(
  helper: string,
  pid: number,
  status: number,
  thaw: () => Promise<void>,
): Promise<void> {
  const child = spawn(helper, [String(pid), String(status)], {
    argv0: "cedana-exit",
    stdio: ["ignore", "pipe", "pipe"],
  });
  const timer = setTimeout(() => child.kill("SIGKILL"), exitPatienceMs);
  try {
    let words = "";
    child.stderr.on("data", (chunk) => (words += chunk));
    const ended = endOf(child);
    const held = new Promise<void>((resolve) => child.stdout.once("data", () => resolve()));
    await Promise.race([held, ended]);
    if (child.exitCode === null && child.signalCode === null) await thaw();
    const exitStatus = await ended;
    if (exitStatus !== 0)
      throw new RuntimeFailed(`end process ${pid} with status ${status}: ${words.trim()}`, { exitStatus });
  } finally {
    clearTimeout(timer);
  }
}

/** Runs engines as our own children: of a dump, nobody has to be the ancestor. */
class OwnConversation implements Conversation {
  readonly log: Logger;
  readonly signal: AbortSignal;
  readonly #helper: string;

  constructor({ marker, log, signal }: Ending) {
    this.#helper = marker.ending.helper;
    this.log = log;
    this.signal = signal;
  }

  async program(): Promise<string> {
    return this.#helper;
  }

  async run(argv: readonly string[], options: RunOptions = {}): Promise<number> {
    return await runEngineHere(argv, { ...options, signal: this.signal });
  }

  /** Nobody waits for it. */
  answer(): void {}

  become(argv: readonly string[]): void {
    throw new NotFound(`the container has ended: ${argv.slice(-2).join(" ")} is not possible`);
  }
}
