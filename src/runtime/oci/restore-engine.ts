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
  processTree,
  programOf,
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
  /** when the wrapper was started, as `startTime` has it */
  readonly #since: number;
  /** which directory the engine has made, or left */
  #state: string | undefined;
  #early: EarlyEngine | undefined;

  constructor(call: OciCall, wrapper: Conversation, gate: GateOptions, scratch: string) {
    this.#call = call;
    this.#wrapper = wrapper;
    this.#gate = gate;
    this.#scratch = scratch;
    this.#stateDirectory = join(call.root, call.id);
    this.#since = startTime(call.pid) ?? 0;
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
    end.catch(() => {}); // looked at in `run` and `drop`
    void gate.arrived.then(() => this.#noteState());
    this.#early = { command, gate, end };
  }

  /**
   * Runs it to its end, or lets the one go that was started early.
   * @param config  of CRIU, as lines of its configuration file
   * @param undo    removes what an engine has left that failed
   * @returns exit status, 128 + signal for one that was killed
   * @throws AlreadyExists; RuntimeFailed when an early one has gone its own way; and as `Conversation.run`
   */
  async run(
    command: readonly string[],
    config: readonly string[],
    undo: () => Promise<void>,
  ): Promise<number> {
    const text = (await this.#callersConfig()) + config.map((line) => `${line}\n`).join("");
    if (this.#early) {
      const { gate, end } = this.#early;
      const ended = await Promise.race([gate.arrived.then(() => undefined), end]);
      const fits = ended !== undefined || this.ownsState; // somebody has removed it, and may have the id himself
      if (fits && isDeepStrictEqual(this.#early.command, command)) {
        const status = await this.#letGo(this.#early, ended, text);
        if (status !== undefined) return status;
        await undo(); // crun leaves its state, and a scope of systemd's, where CRIU fails
      } else {
        const left = await this.drop();
        if (left === "restored")
          throw new RuntimeFailed(`the engine restored container ${this.#call.id} ${PAST}`);
        if (left === "failed") await undo();
      }
      this.#state = undefined;
    }
    if (existsSync(this.#stateDirectory)) throw alreadyExists(this.#call); // since we have looked
    return await this.#runAtOpenGate(command, text);
  }

  /**
   * @param ended  its exit status, where it has ended without coming to the gate
   * @returns exit status; undefined when it has come by another way, and nothing was begun
   */
  async #letGo(
    { command, gate, end }: EarlyEngine,
    ended: number | undefined,
    config: string,
  ): Promise<number | undefined> {
    if (ended === undefined) gate.open(config);
    this.#early = undefined;
    try {
      const status = await this.#endOf(command, end);
      if (ended === undefined) return status;
      comers.delete(this.#call.engine); // it doesn't come any more, or has failed before
      if (ended === 0) this.#wrapper.log.warn(`the engine restored container ${this.#call.id} ${PAST}`);
      return ended !== 0 && !gate.isSeen && (await gate.hasRefused()) ? undefined : ended;
    } finally {
      gate[Symbol.dispose]();
      removeGate(gate.directory);
    }
  }

  /** Whether there is a directory of the engine's state, and it is the one that our engine has left. */
  get ownsState(): boolean {
    return this.#state !== undefined && directoryIdentity(this.#stateDirectory) === this.#state;
  }

  /** Whether there is one, and it is somebody else's: so is all that goes by the container's id. */
  get isAnothers(): boolean {
    return existsSync(this.#stateDirectory) && !this.ownsState;
  }

  /**
   * Ends an early one that nobody lets go.
   * @returns what became of it where it has come to its end by itself: what it has made is to be undone
   * @throws TimedOut when it doesn't end
   */
  async drop(): Promise<"nothing" | "failed" | "restored"> {
    if (!this.#early) return "nothing";
    const { command, gate, end } = this.#early;
    this.#early = undefined;
    try {
      const status = await Promise.race([
        gate.arrived,
        end.catch(() => undefined), // the wrapper has gone, and takes it along
        sleep(END_MS, undefined, { ref: false }), // it isn't what a refusal has to wait for
      ]);
      if (typeof status === "number") {
        comers.delete(this.#call.engine); // it went past the gate, or has failed before
        this.#noteState(status);
        return status === 0 ? "restored" : "failed";
      }
      // All of it before the gate sends its CRIU away: it would say that it has failed, and undo what may be another's by then.
      const found = await this.#kill(command);
      this.#noteState(FAILED);
      if (this.ownsState) await removeWithoutMounts(this.#stateDirectory);
      if (found === 0) gate[Symbol.dispose](); // one that can't be told from others ends by itself
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

  /**
   * Once: what is there now is the engine's.
   * @param status  it has failed with that: then it has undone what it did, and only what says nothing of a container is its own
   */
  #noteState(status = 0): void {
    const failed = status > 0 && status < KILLED;
    if (failed && OF_CONTAINERS.some((name) => existsSync(join(this.#stateDirectory, name)))) return;
    this.#state ??= directoryIdentity(this.#stateDirectory);
  }

  /** Waits for its end. Where the wrapper has gone, which takes it along, it is seen to that it has come to it. */
  async #endOf(command: readonly string[], end: Promise<number>): Promise<number> {
    try {
      const status = await end;
      this.#noteState(status);
      return status;
    } catch (error) {
      if (this.#wrapper.signal.aborted)
        await this.#kill(command).catch((cause) =>
          this.#wrapper.log.error({ err: cause }, "end the engine of a restore that was cut off"),
        );
      this.#noteState(KILLED);
      throw error;
    }
  }

  /** The engine, with all below it. @returns how many there were. @throws TimedOut */
  async #kill([, ...argv]: readonly string[]): Promise<number> {
    const words = `\0${argv.join("\0")}\0`;
    const { aborted } = this.#wrapper.signal;
    const { breathe } = new Slices();
    const pids = new Set<number>();
    // Whose parent has gone is somebody else's child.
    for (const pid of aborted ? allPids() : childrenOf(this.#call.pid)) {
      const isEngine =
        isFromHere(pid) &&
        (startTime(pid) ?? 0) >= this.#since && // not who has called us, with the same words
        (await commandLineOf(pid)).endsWith(words) &&
        (await runs(pid)) !== this.#gate.program;
      if (isEngine) for (const { pid: one } of await processTree(pid, breathe)) pids.add(one);
    }
    await Promise.all([...pids].map(endProcess));
    return pids.size;
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

  /** … where nobody waits. */
  async #runAtOpenGate(command: readonly string[], config: string): Promise<number> {
    const { engine } = this.#call;
    if (!this.#hasGate) {
      const env = await criuConfigFile(join(this.#scratch, "criu.conf"), [config]);
      return await this.#endOf(
        command,
        this.#wrapper.run(command, { env: { PATH: this.#gate.path, ...env } }),
      );
    }
    const gate = Gate.openFromStart(this.#scratch, this.#gate, config);
    try {
      const identity = fileIdentity(engine);
      const status = await this.#endOf(command, this.#wrapper.run(command, { env: gate.env }));
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
  try {
    const found = statSync(path, { bigint: true, throwIfNoEntry: false });
    return found && `${found.dev}:${found.ino}:${found.birthtimeNs}`;
  } catch {
    return undefined; // EIO, ESTALE: nobody can say
  }
}

/** Path of the program; undefined when it has ended. */
const runs = (pid: number) => programOf(pid).catch(() => undefined);

/** Files by which an engine says that there is a container: runc, crun. */
const OF_CONTAINERS = ["state.json", "status"];
/** Exit statuses: any failure, and from here on a signal. */
const FAILED = 1;
const KILLED = 128;

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
