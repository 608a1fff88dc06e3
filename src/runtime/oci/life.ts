import { resolve } from "node:path";
import type { Logger } from "pino";
import { InvalidRequest, Unsupported } from "../../errors/index.ts";
import { Pidfd } from "../../linux/addon.ts";
import { startTime } from "../../linux/proc.ts";
import { checkHooks } from "../hooks.ts";
import { type EscalationStep, execKillPolicy, killPolicy, planKill, signalNumber } from "../kill-policy.ts";
import { annotationsOf, readSpec } from "../spec.ts";
import { asGiven, type Conversation, type OciAnswer, type OciCall } from "./call.ts";
import { type Marker, markersIn, readMarker, removeMarker, writeMarker } from "./marker.ts";
import { containerState } from "./state.ts";

/*
 * The life of a container whose annotations ask for something of us: create and run leave a marker beside what the engine does, kill
 * follows the container's policy, delete takes the marker away. start and state are the engine's.
 *
 * The engine runs as the wrapper's child, so the container's init is a descendant of conmon or the shim, and what the engine
 * says on stdout, stderr and in its log is what the caller sees.
 */

/** Annotations that a container may have, but that need what isn't there: said at create, not when it is too late. */
const needsStore = ["checkpoint-on", "auto-resume", "restore-from"];

export async function create(call: OciCall, wrapper: Conversation): Promise<OciAnswer> {
  const bundle = resolve(call.cwd, bundleOf(call.argv));
  const spec = await readSpec(bundle);
  const kill = killPolicy(spec);
  execKillPolicy(spec, {});
  await checkHooks(spec);
  const unknown = Object.keys(annotationsOf(spec)).find((key) =>
    needsStore.some((name) => key === `cedana.io/${name}` || key.startsWith(`cedana.io/${name}.`)),
  );
  if (unknown !== undefined)
    throw new Unsupported(
      `annotation ${unknown} of container ${call.id} by cedana-runtime: it needs a store of checkpoints`,
    );
  const { id, root, engine, globalArgv } = call;
  const known = readMarker(call.marker);
  // The marker first: a kill right after create must find it. One that is there may be of a container that the engine still has, or
  // of one that somebody deleted past us.
  writeMarker(call.marker, { version: 1, id, root, engine, globalArgv, kill });
  const status = await wrapper.run(asGiven(call));
  // `run` without --detach has deleted its container when it ends; a create that failed has none.
  const over =
    call.command === "run" ? !call.argv.some((argument) => /^(-d|--?detach)(=true)?$/.test(argument)) : false;
  if (status !== 0 && known !== undefined && (await containerState(call)) !== undefined)
    writeMarker(call.marker, known);
  else if (status !== 0 || over) removeMarker(call.marker);
  return { status };
}

export async function remove(call: OciCall, wrapper: Conversation, escalator: Escalator): Promise<OciAnswer> {
  const status = await wrapper.run(asGiven(call));
  // Whether it is gone, the engine says best: a forced delete succeeds where there is none, others fail.
  if (status === 0 || (await containerState(call)) === undefined) {
    escalator.forget(call.marker);
    removeMarker(call.marker);
  }
  return { status };
}

/** `kill [--all] ID [SIGNAL]`, TERM without one. */
export async function kill(
  call: OciCall,
  wrapper: Conversation,
  escalator: Escalator,
): Promise<OciAnswer | undefined> {
  const marker = readMarker(call.marker);
  const after = call.argv.filter((argument) => argument !== "--" && !argument.startsWith("-"));
  const [id, name = "TERM"] = after;
  const sent = signalNumber(name);
  if (marker?.kill === undefined || id !== call.id || sent === undefined) {
    wrapper.become(asGiven(call)); // unknown signals, too: the engine has the words for it
    return undefined;
  }
  const { signal, escalation } = planKill(marker.kill, sent);
  const state = escalation.length > 0 ? await containerState(call) : undefined;
  const flags = call.argv.filter((argument) => argument.startsWith("-") && argument !== "--");
  const status = await wrapper.run([call.engine, ...call.globalArgv, "kill", ...flags, id, String(signal)]);
  if (status === 0 && state !== undefined && state.pid > 0)
    escalator.begin(call.marker, marker, state.pid, escalation);
  return { status };
}

function bundleOf(argv: readonly string[]): string {
  for (const [at, argument] of argv.entries()) {
    const [, value] = /^(?:--?bundle|-b)=(.*)$/s.exec(argument) ?? [];
    if (value !== undefined) return value;
    if (/^(?:--?bundle|-b)$/.test(argument)) {
      const next = argv[at + 1];
      if (next === undefined) throw new InvalidRequest(`flag needs an argument: ${argument}`);
      return next;
    }
  }
  return ".";
}

/** Sends what follows a kill, when its time has come; on record in the marker, so that the next cedanad goes on with it. */
export class Escalator {
  readonly #log: Logger;
  readonly #done: () => void;
  readonly #timers = new Map<string, NodeJS.Timeout>();

  /** @param done  called after each step */
  constructor(log: Logger, done: () => void = () => {}) {
    this.#log = log;
    this.#done = done;
  }

  /** How many containers are waited for. */
  get pending(): number {
    return this.#timers.size;
  }

  /** What an earlier cedanad has left. */
  revive(runDirectory: string): void {
    for (const path of markersIn(runDirectory)) {
      try {
        const marker = readMarker(path);
        if (marker?.escalation) this.#arm(path, marker);
      } catch (error) {
        this.#log.error({ err: error, path }, "read a marker");
      }
    }
  }

  /** A container that is being escalated stays at that: a second TERM prolongs nothing. */
  begin(path: string, marker: Marker, pid: number, steps: readonly EscalationStep[]): void {
    const started = startTime(pid);
    if (steps.length === 0 || started === undefined || this.#timers.has(path)) return;
    const next: Marker = {
      ...marker,
      escalation: { pid, startTime: started, dueAtMs: Date.now() + steps[0]!.afterMs, steps },
    };
    writeMarker(path, next);
    this.#arm(path, next);
  }

  forget(path: string): void {
    clearTimeout(this.#timers.get(path));
    this.#timers.delete(path);
  }

  #arm(path: string, marker: Marker): void {
    const { dueAtMs, steps } = marker.escalation!;
    // A wall clock that has jumped must not put the step off for ever.
    const waitMs = Math.min(Math.max(dueAtMs - Date.now(), 0), steps[0]!.afterMs);
    this.#timers.set(
      path,
      setTimeout(() => this.#step(path, marker), waitMs),
    );
  }

  #step(path: string, marker: Marker): void {
    this.#timers.delete(path);
    const { pid, startTime: started, steps } = marker.escalation!;
    const [step, ...rest] = steps;
    try {
      if (readMarker(path) === undefined) return; // deleted meanwhile
      if (rest.length > 0) {
        const next = {
          ...marker,
          escalation: { pid, startTime: started, dueAtMs: Date.now() + rest[0]!.afterMs, steps: rest },
        };
        writeMarker(path, next);
        this.#arm(path, next);
      } else writeMarker(path, { ...marker, escalation: undefined });
      // The fd first, then the look whether it is still that process: so no other one can be hit.
      using init = Pidfd.open(pid);
      if (startTime(pid) !== started) return;
      this.#log.info({ id: marker.id, signal: step!.signal }, "the grace is over: the next signal follows");
      init.signal(step!.signal);
    } catch (error) {
      this.forget(path);
      if ((error as NodeJS.ErrnoException).code === "ESRCH") return; // it has ended
      this.#log.error({ err: error, id: marker.id }, "send the next signal of a kill");
    } finally {
      this.#done();
    }
  }
}
