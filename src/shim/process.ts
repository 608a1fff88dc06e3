import { NotFound, WrongState } from "../errors/index.ts";

/** States of a container's init, and what leads from one to the next. An exit is possible wherever a pid exists. */
export const initTransitions = {
  created: { start: "running", exit: "stopped", delete: "deleted" },
  createdFromCheckpoint: { start: "running", fail: "stopped", exit: "stopped", delete: "deleted" }, // restoring is a way to start
  running: { pause: "paused", checkpoint: "running", exit: "stopped" }, // a dump that stops it: exit follows
  paused: { resume: "running", checkpoint: "paused", exit: "stopped" },
  stopped: { delete: "deleted" },
  deleted: {},
} as const;

/** States of an exec'd process. It is paused and resumed with its container. */
export const execTransitions = {
  created: { start: "running", exit: "stopped", delete: "deleted" },
  running: { exit: "stopped" },
  stopped: { delete: "deleted" },
  deleted: {},
} as const;

export type ProcessState = keyof typeof initTransitions;
export type ProcessVerb = "start" | "pause" | "resume" | "checkpoint" | "exit" | "fail" | "delete";

type Table = { readonly [state: string]: { readonly [verb: string]: string } };

export interface Exit {
  /** exit code, or 128 + signal */
  status: number;
  atNs: bigint;
}

/** Nanoseconds since 1970. */
export function nowNs(): bigint {
  return BigInt(Date.now()) * 1_000_000n;
}

export interface ProcessStdio {
  terminal: boolean;
  stdin: string;
  stdout: string;
  stderr: string;
}

/**
 * A container's init or an exec'd process: its state, its exit, and who waits for it. The transitions are data above; nothing
 * else changes `state`.
 */
export class Process {
  /** "" for the container's init */
  readonly execId: string;
  readonly stdio: ProcessStdio;
  /** key of its io object in the keeper */
  readonly io: string;
  pid = 0;
  exit: Exit | undefined;
  /** Start is under way: an exit is published after the start event */
  starting = false;
  /** seen, but not yet published */
  heldExit: (Exit & { sequence: number }) | undefined;
  /** an exec's: whether its output has been delivered, or the limit has passed; undefined when nobody has asked since its end */
  drained: Promise<boolean> | undefined;
  #state: ProcessState;
  readonly #exited = Promise.withResolvers<Exit>();
  #turn: Promise<unknown> = Promise.resolve();

  constructor(execId: string, io: string, stdio: ProcessStdio, state: ProcessState) {
    this.execId = execId;
    this.io = io;
    this.stdio = stdio;
    this.#state = state;
  }

  get state(): ProcessState {
    return this.#state;
  }

  get isInit(): boolean {
    return this.execId === "";
  }

  /** What people call it in messages. */
  get name(): string {
    return this.isInit ? "init process" : `exec ${this.execId}`;
  }

  /** @throws WrongState when the verb doesn't lead anywhere from here; nothing has changed then */
  check(verb: ProcessVerb): ProcessState {
    const table: Table = this.isInit ? initTransitions : execTransitions;
    const next = table[this.#state]?.[verb];
    if (next === undefined) throw new WrongState(`${refusal(verb, this.#state)}: ${this.name}`);
    return next as ProcessState;
  }

  move(verb: ProcessVerb): void {
    this.#state = this.check(verb);
  }

  /** The process has ended; waiters are answered. */
  markExited(exit: Exit): void {
    this.exit = exit;
    this.heldExit = undefined;
    if (this.#state !== "deleted" && this.#state !== "stopped") this.move("exit");
    this.#exited.resolve(exit);
  }

  /** @throws NotFound when it is deleted without ever having run */
  waitForExit(): Promise<Exit> {
    return this.#exited.promise;
  }

  /** Deleted before it ran: there is no exit to wait for. */
  neverRan(): void {
    this.#exited.promise.catch(() => undefined); // nobody need be waiting
    this.#exited.reject(new NotFound(`process does not exist: ${this.name} was deleted before it ran`));
  }

  /** One call that changes this process at a time, in the order of arrival. */
  inTurn<T>(work: () => Promise<T>): Promise<T> {
    const result = this.#turn.then(work);
    this.#turn = result.catch(() => undefined); // the caller gets the error; the next in line must not
    return result;
  }
}

/** In the words of containerd's own shim, which clients look for. */
export function refusal(verb: ProcessVerb | "exec" | "update", state: ProcessState): string {
  if (state === "createdFromCheckpoint") return `cannot ${verb} a process that is created from a checkpoint`;
  if (verb === "exec") return `cannot exec in a ${state} state`;
  const aboutProcess = verb === "start" || verb === "delete" || (verb === "resume" && state === "running");
  if (state === "created" && !aboutProcess) return `cannot ${verb} a task in created state`;
  return `cannot ${verb} a ${state} ${aboutProcess ? "process" : "container"}`;
}
