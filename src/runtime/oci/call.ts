import type { Logger } from "pino";
import { InvalidRequest } from "../../errors/index.ts";

/** One command of cedana-runtime, as the wrapper tells it (addon/keeper/PROTOCOL.md, RUNTIME). */
export interface OciCall {
  /** "checkpoint", "kill", … */
  readonly command: string;
  /** what follows the command; of checkpoint and restore the options as `--name` or `--name=value`, then `--` and the id */
  readonly argv: readonly string[];
  /** the engine's options before the command */
  readonly globalArgv: readonly string[];
  /** path of the engine's binary */
  readonly engine: string;
  /** directory of the engine's state */
  readonly root: string;
  readonly id: string;
  /** file that makes the container ours, whether it exists or not */
  readonly marker: string;
  readonly cwd: string;
  /** of the wrapper */
  readonly pid: number;
  /** a cedanad before us has ended in the middle of it */
  readonly repeated?: boolean;
}

export interface RunOptions {
  /** added to the wrapper's environment */
  readonly env?: Readonly<Record<string, string>> | undefined;
  /** stdout and stderr go there, stdin is /dev/null; else all three are the caller's */
  readonly outputPath?: string | undefined;
}

/** The wrapper at the other end: it does what it is told, as the caller's child. */
export interface Conversation {
  readonly log: Logger;
  /** aborted when the wrapper has gone */
  readonly signal: AbortSignal;
  /** Path of our native program, which the wrapper is. */
  program(): Promise<string>;
  /**
   * Runs a program as the wrapper's child, and waits for its end.
   * @returns exit status, 128 + signal for one that was killed
   * @throws SyscallFailed when it could not be started, Cancelled when the wrapper has gone
   */
  run(argv: readonly string[], options?: RunOptions): Promise<number>;
  /** The caller has this answer at once, before what is left to do is done; what is answered at the end is dropped. */
  answer(answer: OciAnswer): void;
  /** The wrapper becomes this program; nothing more is heard of it. */
  become(argv: readonly string[], options?: Pick<RunOptions, "env">): void;
}

/** What the wrapper ends with. */
export interface OciAnswer {
  readonly status: number;
  /** for stderr and the caller's log */
  readonly message?: string | undefined;
  /** for stdout */
  readonly output?: string | undefined;
}

/** The engine's own command line for this call, as the caller gave it. */
export function asGiven(call: OciCall): string[] {
  return [call.engine, ...call.globalArgv, call.command, ...call.argv];
}

/** The engine's options before the command, for a call whose errors aren't the caller's to hear. */
export function withoutLog(globalArgv: readonly string[]): string[] {
  return globalArgv.filter((argument, at) => {
    const names = /^--?(log|log-format|log-level)$/;
    return !(/^--?(log|log-format|log-level)(=.*)?$/s.test(argument) || names.test(globalArgv[at - 1] ?? ""));
  });
}

/**
 * The engine's options before the command where cedanad runs it itself: without the caller's log, whose errors these aren't, and with its root.
 * A relative one, and crun's default, mean something else here.
 */
export function ownGlobalArgv({ globalArgv, root }: Pick<OciCall, "globalArgv" | "root">): string[] {
  return [...withoutLog(globalArgv), `--root=${root}`];
}

/** Whether the engine is told of a CRIU of its own, past PATH (runc's `--criu`). */
export function namesCriu(globalArgv: readonly string[]): boolean {
  return globalArgv.some((argument) => /^--?criu(=|$)/.test(argument));
}

/** Whether a flag is set by what stands behind its `=`. Source: Go's strconv.ParseBool, by which runc reads it. */
export function isSet(value: string | undefined): boolean {
  return value === undefined || /^(1|t|T|true|TRUE|True)$/.test(value);
}

/** Whether the engine was told to have systemd make its cgroups. crun has an option of its own for it, too. */
export function usesSystemd(globalArgv: readonly string[]): boolean {
  let systemd = false;
  for (const [at, argument] of globalArgv.entries()) {
    const [, name, value] = /^--?([a-z-]+)(?:=(.*))?$/s.exec(argument) ?? [];
    if (name === "systemd-cgroup") systemd = isSet(value);
    if (name === "cgroup-manager") systemd = (value ?? globalArgv[at + 1]) === "systemd";
  }
  return systemd;
}

/** Options of checkpoint and restore, as the wrapper has put them: a flag's value is `true`, an option may be given more than once. */
export class Options {
  readonly #values = new Map<string, (string | true)[]>();

  constructor(argv: readonly string[]) {
    for (const argument of argv) {
      if (argument === "--") break;
      const [, name, value] = /^--([a-z][a-z-]*)(?:=(.*))?$/s.exec(argument) ?? [];
      if (name === undefined)
        throw new InvalidRequest(
          `option ${JSON.stringify(argument)} is not in the form that the wrapper gives`,
        );
      this.#values.set(name, [...(this.#values.get(name) ?? []), value ?? true]);
    }
  }

  has(name: string): boolean {
    return this.#values.has(name);
  }

  /** The last one given; undefined for an option without a value, and for an empty one, which the engines take for none. */
  value(name: string): string | undefined {
    const last = this.#values.get(name)?.at(-1);
    return last === true || last === "" ? undefined : last;
  }

  values(name: string): string[] {
    return (this.#values.get(name) ?? []).filter((value) => value !== true);
  }

  names(): string[] {
    return [...this.#values.keys()];
  }
}
