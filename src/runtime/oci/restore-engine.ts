import { existsSync, statSync } from "node:fs";
import { join, resolve } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { isDeepStrictEqual } from "node:util";
import { Gate, type GateOptions, removeGate } from "../../criu/gate.ts";
import { kill } from "../../criu/leftovers.ts";
import { AlreadyExists, InvalidRequest, RuntimeFailed, TimedOut } from "../../errors/index.ts";
import { readApart } from "../../linux/apart.ts";
import { commandLineOf, isFromHere } from "../../linux/command-line.ts";
import { fileIdentity } from "../../linux/file-identity.ts";
import { removeWithoutMounts } from "../../linux/mount-options.ts";
import {
  allPids,
  childrenOf,
  environmentOf,
  isAlive,
  type ProcessStat,
  processTree,
  startTime,
} from "../../linux/proc.ts";
import { Slices } from "../../linux/slices.ts";
import { engineName } from "../engine.ts";
import { type Conversation, namesCriu, type OciCall } from "./call.ts";
import { criuConfigFile } from "./criu-options.ts";

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
  readonly #stateDirectory: string;
  /** which directory was there when the engine had come to the gate, or to its end */
  #state: string | undefined;
  #early: EarlyEngine | undefined;

  constructor(call: OciCall, wrapper: Conversation, gate: GateOptions, scratch: string) {
    this.#call = call;
    this.#wrapper = wrapper;
    this.#gate = gate;
    this.#scratch = scratch;
    this.#stateDirectory = join(call.root, call.id);
  }

  /**
   * Starts it, where it is known to come to the gate. `drop` must follow, whatever happens.
   * @param command  as `run` will be given it, unless something turns out otherwise
   */
  async startEarly(command: readonly string[]): Promise<void> {
    const { engine, globalArgv } = this.#call;
    if (!isComer(engine) || !this.#hasGate || namesCriu(globalArgv)) return;
    if (existsSync(this.#stateDirectory)) return; // since we have looked; `run` says so
    const gate = await Gate.forRestore(this.#scratch, this.#gate);
    const end = this.#wrapper.run(command, { env: gate.env });
    const note = () => this.#noteState();
    Promise.race([gate.arrived, end]).then(note, note);
    this.#early = { command, gate, end };
  }

  /**
   * Runs it to its end, or lets the one go that was started early.
   * @param config  of CRIU, as lines of its configuration file
   * @param undo    removes what an engine has left that failed
   * @returns exit status, 128 + signal for one that was killed
   * @throws AlreadyExists; RuntimeFailed when an early one can't be ended; and as `Conversation.run`
   */
  async run(
    command: readonly string[],
    config: readonly string[],
    undo: () => Promise<void>,
  ): Promise<number> {
    const text = (await this.#callersConfig()) + config.map((line) => `${line}\n`).join("");
    if (this.#early && !isDeepStrictEqual(this.#early.command, command) && (await this.drop()) === "begun")
      throw new RuntimeFailed(`the engine began to restore container ${this.#call.id} ${PAST}`);
    if (!this.#early) return await this.#runNow(command, text);
    const { gate, end } = this.#early;
    const ended = await Promise.race([gate.arrived, end]);
    if (ended === undefined) gate.open(text);
    this.#early = undefined;
    try {
      if (ended === undefined) return await end;
      comers.delete(this.#call.engine); // it doesn't come any more, or has failed before
      if (ended === 0) this.#wrapper.log.warn(`the engine restored container ${this.#call.id} ${PAST}`);
      if (ended === 0 || gate.isSeen || !(await gate.hasRefused())) return ended;
    } finally {
      gate[Symbol.dispose]();
      removeGate(gate.directory);
    }
    await undo(); // crun leaves its state, and a scope of systemd's, where CRIU fails
    this.#state = undefined;
    return await this.#runNow(command, text);
  }

  /** Whether there is a directory of the engine's state, and it is the one that our engine has left. */
  get ownsState(): boolean {
    return this.#state !== undefined && directoryIdentity(this.#stateDirectory) === this.#state;
  }

  /**
   * Ends an early one that nobody lets go.
   * @returns "begun" when it went past the gate, or has come to its end by itself: what it has made is to be undone
   * @throws TimedOut when it doesn't end
   */
  async drop(): Promise<"nothing" | "begun"> {
    if (!this.#early) return "nothing";
    const { command, gate, end } = this.#early;
    this.#early = undefined;
    try {
      const status = await Promise.race([
        gate.arrived,
        end.catch(() => undefined), // the wrapper has gone, and takes it along
        sleep(END_MS, undefined, { ref: false }), // it isn't what a refusal has to wait for
      ]);
      if (typeof status === "number") return "begun";
      // All of it before the gate sends its CRIU away: it would say that it has failed, and undo what may be another's by then.
      await Promise.all((await this.#processesOf(command)).map(endProcess));
      if (this.ownsState) await removeWithoutMounts(this.#stateDirectory);
      // From here on the wrapper can run another.
      await Promise.race([end.catch(() => {}), sleep(END_MS, undefined, { ref: false })]);
      return "nothing";
    } finally {
      gate[Symbol.dispose]();
      removeGate(gate.directory);
    }
  }

  /** One that an upgrade has just removed is of another version, which may know another gate. */
  get #hasGate(): boolean {
    return !this.#gate.program.startsWith("/proc/");
  }

  #noteState(): void {
    this.#state ??= directoryIdentity(this.#stateDirectory);
  }

  /** The engine's, with all below them. */
  async #processesOf([, ...argv]: readonly string[]): Promise<number[]> {
    const words = `\0${argv.join("\0")}\0`;
    const among = async (pids: readonly number[]) => {
      const found: number[] = [];
      for (const pid of pids)
        if (isFromHere(pid) && (await commandLineOf(pid)).endsWith(words)) found.push(pid);
      return found;
    };
    const children = this.#wrapper.signal.aborted ? [] : await among(childrenOf(this.#call.pid));
    const engines = children.length > 0 ? children : await among(allPids()); // who lost his parent is somebody else's
    const { breathe } = new Slices();
    const trees: ProcessStat[] = [];
    for (const pid of engines) trees.push(...(await processTree(pid, breathe)));
    return [...new Set(trees.map(({ pid }) => pid))];
  }

  /** Lines of CRIU's that the caller's environment names. */
  async #callersConfig(): Promise<string> {
    const { cwd, pid } = this.#call;
    const named = environmentOf(pid).CRIU_CONFIG_FILE;
    if (!named) return "";
    // His own, which we aren't.
    const file = named
      .replace(/^\/dev\/fd\//, `/proc/${pid}/fd/`)
      .replace(/^\/proc\/self\//, `/proc/${pid}/`);
    const text = await readApart(resolve(cwd, file), MAX_CONFIG_BYTES).catch((error) => {
      throw new InvalidRequest(`read CRIU_CONFIG_FILE ${named}: ${error.message}`, { cause: error });
    });
    return `${text.toString("utf8")}\n`;
  }

  async #runNow(command: readonly string[], config: string): Promise<number> {
    if (existsSync(this.#stateDirectory)) throw alreadyExists(this.#call); // since we have looked
    try {
      return await this.#runAtOpenGate(command, config);
    } finally {
      this.#noteState();
    }
  }

  async #runAtOpenGate(command: readonly string[], config: string): Promise<number> {
    const { engine } = this.#call;
    if (!this.#hasGate) {
      const env = await criuConfigFile(join(this.#scratch, "criu.conf"), [config]);
      return await this.#wrapper.run(command, { env: { PATH: this.#gate.path, ...env } });
    }
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

/** In the engine's words. */
export function alreadyExists({ engine, id }: OciCall): AlreadyExists {
  return new AlreadyExists(
    engineName(engine) === "crun"
      ? `container \`${id}\` already exists`
      : "container with given ID already exists",
  );
}

/** Which one it is, whatever is in it; undefined: there is none. The number of one that was removed may be given again at once. */
function directoryIdentity(path: string): string | undefined {
  const found = statSync(path, { bigint: true, throwIfNoEntry: false });
  return found && `${found.dev}:${found.ino}:${found.birthtimeNs}`;
}

const END_MS = 5_000;
const POLL_MS = 5;

async function endProcess(pid: number): Promise<void> {
  const started = startTime(pid);
  if (started === undefined) return;
  kill(pid);
  for (const until = Date.now() + END_MS; isAlive(pid, started); await sleep(POLL_MS))
    if (Date.now() >= until)
      throw new TimedOut(`the engine (pid ${pid}) of a restore that is not to be doesn't end`);
}
