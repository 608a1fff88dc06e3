import { constants } from "node:os";
import { InvalidRequest } from "../errors/index.ts";
import { parseDuration } from "./quantities.ts";
import { type OciProcess, type OciSpec, ownAnnotation, type Setting } from "./spec.ts";

/*
 * What a container makes of SIGTERM: one policy for the shim's Kill and for `cedana-runtime kill`.
 *
 *   cedana.io/kill-signal      what TERM becomes: "SIGINT", "hup", "RTMIN+3", "15"
 *   cedana.io/kill-grace       how long until the next step: "10s", "500ms", "1m30s", "7" (seconds)
 *   cedana.io/kill-escalation  what follows, each a grace after the one before: "QUIT,KILL"; KILL where only a grace is given
 *   cedana.io/checkpoint-on    signals, "TERM" or "TERM,USR1", upon which the container is checkpointed and ends with the signal's
 *                              status (src/runtime/checkpoint-on.ts); when that fails, they are sent as above
 *
 * Every other signal is delivered as it came: whoever sends KILL means it. Kubernetes annotates pods: KEY.CONTAINER goes
 * before KEY, and the sandbox container ignores both. An exec'd process has a policy of its own, by `cedana.io/exec-kill-…`, or
 * from whoever execs by CEDANA_KILL_SIGNAL, CEDANA_KILL_GRACE and CEDANA_KILL_ESCALATION in its environment; without these
 * its signals are left alone.
 */

export interface KillPolicy {
  /** what TERM becomes */
  readonly signal: number;
  /** what is sent after it, to a process that still lives */
  readonly escalation: readonly EscalationStep[];
  /** upon these the container is checkpointed instead */
  readonly checkpointOn?: readonly number[] | undefined;
}

/** What becomes of a signal. */
export interface KillPlan {
  readonly signal: number;
  readonly escalation: readonly EscalationStep[];
  /** instead of all this, while that is possible */
  readonly checkpoint: boolean;
}

export interface EscalationStep {
  readonly signal: number;
  /** after the step before it */
  readonly afterMs: number;
}

const { SIGTERM, SIGKILL, SIGSTOP, SIGCONT } = constants.signals;
/** A day: whoever waits longer for an end doesn't mean one. */
const maxGraceMs = 24 * 60 * 60 * 1000;
const maxSteps = 8;
// As the kernel and the engines count them, which is not how libc does: RTMIN is 34 to a program, and 32 and 33 are libc's own.
const realTimeMin = 34;
const realTimeMax = 64;

/**
 * A signal by name, with or without SIG, or by number.
 * @returns undefined when there is none of that name
 */
export function signalNumber(text: string): number | undefined {
  if (/^\d{1,2}$/.test(text)) {
    const number = Number(text);
    return number >= 1 && number <= realTimeMax ? number : undefined;
  }
  const name = text.toUpperCase().replace(/^SIG/, "");
  const [, base, sign, offset] = /^(RTMIN|RTMAX)(?:([+-])(\d{1,2}))?$/.exec(name) ?? [];
  if (base !== undefined) {
    const start = base === "RTMIN" ? realTimeMin : realTimeMax;
    const number = start + (offset === undefined ? 0 : (sign === "+" ? 1 : -1) * Number(offset));
    return number >= realTimeMin && number <= realTimeMax ? number : undefined;
  }
  return (constants.signals as Record<string, number>)[`SIG${name}`];
}

/**
 * The policy of a container's init.
 * @returns undefined when the container says nothing
 * @throws InvalidRequest naming the annotation and what is wrong with it
 */
export function killPolicy(spec: OciSpec): KillPolicy | undefined {
  const policy = policyFrom((key) => ownAnnotation(spec, `kill-${key}`));
  const checkpointOn = checkpointSignals(ownAnnotation(spec, "checkpoint-on"));
  if (!policy && !checkpointOn) return undefined;
  return { ...(policy ?? { signal: SIGTERM, escalation: [] }), checkpointOn };
}

function checkpointSignals(setting: Setting | undefined): number[] | undefined {
  if (!setting || setting.value === "") return undefined;
  const signals = setting.value.split(",").map((name) => toSignal(setting, name.trim()));
  // KILL is what ends a container that doesn't want to; STOP and CONT end nobody.
  if (signals.some((signal) => [SIGKILL, SIGSTOP, SIGCONT].includes(signal)))
    throw new InvalidRequest(
      `${setting.name} is ${JSON.stringify(setting.value)}: KILL, STOP and CONT can't be among the signals upon which a container is checkpointed`,
    );
  return signals;
}

/** … of a process exec'd in it. @throws InvalidRequest */
export function execKillPolicy(spec: OciSpec, process: OciProcess): KillPolicy | undefined {
  return policyFrom(
    (key) => variable(process, `CEDANA_KILL_${key.toUpperCase()}`) ?? ownAnnotation(spec, `exec-kill-${key}`),
  );
}

/** What is to be sent, and what follows it. */
export function planKill(policy: KillPolicy | undefined, signal: number): KillPlan {
  const checkpoint = policy?.checkpointOn?.includes(signal) ?? false;
  return policy !== undefined && signal === SIGTERM
    ? { signal: policy.signal, escalation: policy.escalation, checkpoint }
    : { signal, escalation: [], checkpoint };
}

function variable(process: OciProcess, name: string): Setting | undefined {
  const entry = process.env?.findLast((one) => one.startsWith(`${name}=`));
  return entry === undefined
    ? undefined
    : { name: `environment variable ${name}`, value: entry.slice(name.length + 1) };
}

function policyFrom(
  find: (key: "signal" | "grace" | "escalation") => Setting | undefined,
): KillPolicy | undefined {
  const [signal, grace, escalation] = [find("signal"), find("grace"), find("escalation")];
  if (!signal && !grace && !escalation) return undefined;
  if (escalation && !grace)
    throw new InvalidRequest(
      `${escalation.name} says what follows, but nothing says when: set kill-grace, too`,
    );
  const afterMs = grace && toDuration(grace);
  const steps =
    afterMs === undefined ? [] : (escalation?.value ?? "KILL").split(",").map((name) => name.trim());
  if (steps.length > maxSteps)
    throw new InvalidRequest(`${escalation!.name} has ${steps.length} signals; ${maxSteps} are allowed`);
  return {
    signal: signal ? toSignal(signal, signal.value) : SIGTERM,
    escalation: steps.map((name) => ({
      signal: escalation ? toSignal(escalation, name) : SIGKILL,
      afterMs: afterMs!,
    })),
  };
}

function toSignal(setting: Setting, text: string): number {
  const number = signalNumber(text);
  if (number === undefined)
    throw new InvalidRequest(
      `${setting.name} names ${JSON.stringify(text)}, which is no signal: give a name such as INT, SIGQUIT or RTMIN+3, or a number up to ${realTimeMax}`,
    );
  return number;
}

function toDuration(setting: Setting): number {
  const ms = parseDuration(setting.value);
  if (ms === undefined || ms > maxGraceMs)
    throw new InvalidRequest(
      `${setting.name} is ${JSON.stringify(setting.value)}; it must be a time up to 24h such as 10s, 500ms or 1m30s`,
    );
  return ms;
}
