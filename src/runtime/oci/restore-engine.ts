import { join, resolve } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { isDeepStrictEqual } from "node:util";
import { Gate, type GateOptions, removeGate } from "../../criu/gate.ts";
import { kill } from "../../criu/leftovers.ts";
import { InvalidRequest, TimedOut } from "../../errors/index.ts";
import { readApart } from "../../linux/apart.ts";
import { commandLineOf, isFromHere } from "../../linux/command-line.ts";
import { fileIdentity } from "../../linux/file-identity.ts";
import { removeWithoutMounts } from "../../linux/mount-options.ts";
import { allPids, childrenOf, environmentOf, isAlive, startTime } from "../../linux/proc.ts";
import type { Conversation, OciCall } from "./call.ts";

/*
 * The engine of a restore. It takes some 10 ms until it asks CRIU anything, in which the checkpoint can be looked at: so it is started
 * early, and waits with its first question at a gate (src/criu/gate.ts), when it has mounted nothing and made nothing but the directory
 * of its state. Where the restore is not to be, it is killed there, and the caller hears nothing of it.
 */

/** Engines that have come to a gate, and as which file: another may be a script that changes its environment. */
const comers = new Map<string, string>();

function isComer(engine: string): boolean {
  const known = comers.get(engine);
  return known !== undefined && known === fileIdentity(engine);
}

const PAST =
  "past cedana's gate, and its CRIU did not get what cedana had to tell it. If it is a script that calls the real one, let it leave PATH, CRIU_CONFIG_FILE and CEDANA_CRIU_GATE as they are";

const MAX_CONFIG_BYTES = 1 << 20;

interface EarlyEngine {
  readonly command: readonly string[];
  readonly gate: Gate;
  /** exit status; rejects as `Conversation.run` */
  readonly end: Promise<number>;
}

export class RestoreEngine {
  readonly #call: OciCall;
  readonly #wrapper: Conversation;
  readonly #gate: GateOptions;
  /** where the gate is made */
  readonly #scratch: string;
  #early: EarlyEngine | undefined;

  constructor(call: OciCall, wrapper: Conversation, gate: GateOptions, scratch: string) {
    this.#call = call;
    this.#wrapper = wrapper;
    this.#gate = gate;
    this.#scratch = scratch;
  }

  /**
   * Starts it, where it is known to come to the gate. `drop` must follow, whatever happens.
   * @param command  as `run` will be given it, unless something turns out otherwise
   */
  async startEarly(command: readonly string[]): Promise<void> {
    if (!isComer(this.#call.engine)) return;
    const gate = await Gate.forRestore(this.#scratch, this.#gate);
    const end = this.#wrapper.run(command, { env: gate.env });
    end.catch(() => {}); // looked at in `run` and `drop`
    this.#early = { command, gate, end };
  }

  /**
   * Runs it to its end, or lets the one go that was started early.
   * @param config  of CRIU, as lines of its configuration file
   * @returns exit status, 128 + signal for one that was killed
   * @throws as `Conversation.run`
   */
  async run(command: readonly string[], config: readonly string[]): Promise<number> {
    const text = (await this.#callersConfig()) + config.map((line) => `${line}\n`).join("");
    if (this.#early && !isDeepStrictEqual(this.#early.command, command)) await this.drop();
    if (!this.#early) return await this.#runNow(command, text);
    const { gate, end } = this.#early;
    try {
      const ended = await Promise.race([gate.arrived, end]);
      if (ended === undefined) {
        gate.open(text);
        return await end;
      }
      comers.delete(this.#call.engine); // it doesn't come any more, or has failed before
      if (ended === 0) this.#wrapper.log.warn(`the engine restored container ${this.#call.id} ${PAST}`);
      else if (!gate.isSeen && (await gate.hasRefused())) {
        await this.#removeState(); // crun leaves it where CRIU fails
        return await this.#runNow(command, text);
      }
      return ended;
    } finally {
      this.#early = undefined;
      gate[Symbol.dispose]();
      removeGate(gate.directory);
    }
  }

  /**
   * Ends an early one that nobody lets go.
   * @returns "restored" when it went past the gate, and there is a container to be undone
   */
  async drop(): Promise<"nothing" | "restored"> {
    if (!this.#early) return "nothing";
    const { command, gate, end } = this.#early;
    this.#early = undefined;
    try {
      const status = await Promise.race([
        gate.arrived.then(() => "at the gate" as const),
        end.catch(() => "the wrapper has gone" as const),
      ]);
      if (status === 0) return "restored";
      const { pid } = this.#call;
      const pids = this.#wrapper.signal.aborted ? await enginesWith(command) : childrenOf(pid);
      await Promise.all(pids.map(endProcess));
      await this.#removeState();
      return "nothing";
    } finally {
      gate[Symbol.dispose]();
      await end.catch(() => {}); // the wrapper can run another from here on, or has gone
      removeGate(gate.directory);
    }
  }

  /** Of an engine that has ended without having restored anything. */
  async #removeState(): Promise<void> {
    await removeWithoutMounts(join(this.#call.root, this.#call.id));
  }

  /** Lines of CRIU's that the caller's environment names. */
  async #callersConfig(): Promise<string> {
    const { cwd, pid } = this.#call;
    const file = environmentOf(pid).CRIU_CONFIG_FILE;
    if (!file) return "";
    const text = await readApart(resolve(cwd, file), MAX_CONFIG_BYTES).catch((error) => {
      throw new InvalidRequest(`read CRIU_CONFIG_FILE ${file}: ${error.message}`, { cause: error });
    });
    return `${text.toString("utf8")}\n`;
  }

  async #runNow(command: readonly string[], config: string): Promise<number> {
    const { engine } = this.#call;
    const gate = Gate.openFromStart(this.#scratch, this.#gate, config);
    try {
      const identity = fileIdentity(engine);
      const status = await this.#wrapper.run(command, { env: gate.env });
      if (gate.isSeen && identity !== undefined) comers.set(engine, identity);
      return status;
    } finally {
      removeGate(gate.directory);
    }
  }
}

/** Whose parent has gone. */
async function enginesWith([, ...argv]: readonly string[]): Promise<number[]> {
  const words = `\0${argv.join("\0")}\0`;
  const found: number[] = [];
  for (const pid of allPids())
    if (isFromHere(pid) && (await commandLineOf(pid)).endsWith(words)) found.push(pid);
  return found;
}

const END_MS = 5_000;
const POLL_MS = 5;

async function endProcess(pid: number): Promise<void> {
  const started = startTime(pid);
  kill(pid);
  for (
    const until = Date.now() + END_MS;
    started !== undefined && isAlive(pid, started);
    await sleep(POLL_MS)
  )
    if (Date.now() >= until)
      throw new TimedOut(`the engine (pid ${pid}) of a restore that is not to be doesn't end`);
}
