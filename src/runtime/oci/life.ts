import { constants } from "node:os";
import { join } from "node:path";
import { isThere } from "../../checkpoint/open.ts";
import { allowedAnnotations } from "../annotated-checkpoint.ts";
import { injectedConfig } from "../gpu-injection.ts";
import { checkHooks } from "../hooks.ts";
import { execKillPolicy, killPolicy, planKill, signalNumber } from "../kill-policy.ts";
import { hasOurAnnotations, readSpec } from "../spec.ts";
import { asGiven, type Conversation, type OciAnswer, type OciCall } from "./call.ts";
import type { Endings } from "./endings.ts";
import type { Escalator } from "./escalator.ts";
import { isUnstarted, readMarker, removeMarker, writeMarker } from "./marker.ts";
import { bundleOf, createOptions, createRestored, giveBack, signalOfUnstarted } from "./restored.ts";
import { containerState } from "./state.ts";

const { SIGKILL } = constants.signals;

/*
 * The life of a container whose annotations ask for something of us: create and run leave a marker beside what the engine does, kill
 * follows the container's policy, delete takes the marker away. start and state are the engine's, unless it was restored (restored.ts).
 *
 * The engine runs as the wrapper's child, so the container's init is a descendant of conmon or the shim, and what the engine
 * says on stdout, stderr and in its log is what the caller sees.
 */

export async function create(call: OciCall, wrapper: Conversation): Promise<OciAnswer | undefined> {
  const bundle = bundleOf(call);
  const spec = await readSpec(bundle);
  const kill = killPolicy(spec);
  execKillPolicy(spec, {});
  await allowedAnnotations(spec); // what is forbidden or senseless is refused now
  await checkHooks(spec);
  const { id, root, engine, globalArgv } = call;
  const marker = { version: 1, id, root, engine, globalArgv, kill, bundle } as const;
  // The engine has such a container, ours or not: it says so itself, and nothing is to happen to that one. A marker alone may be of one that
  // somebody deleted past us.
  const taken = await isThere(join(root, id));
  if (!taken && !hasOurAnnotations(spec)) {
    removeMarker(call.marker); // of one before it, for which we were asked
    wrapper.become(asGiven(call));
    return undefined;
  }
  // The marker first: a kill right after create must find it.
  if (!taken) writeMarker(call.marker, marker);
  let status = 1;
  try {
    const restored = taken ? undefined : await createRestored(call, wrapper, spec, marker);
    if (restored) {
      status = restored.status;
      return restored;
    }
    await using _config = await injectedConfig(bundle, spec, { namespace: "", id });
    status = await wrapper.run(asGiven(call)); // says itself that the id is taken
    return { status };
  } finally {
    // `run` without --detach has deleted its container when it ends; a create that failed has none.
    const over = call.command === "run" && !createOptions(call.argv).has("detach");
    // Where there is one all the same (--keep, or another create was faster), it has its marker still.
    if (!taken && (status !== 0 || over) && !(await isThere(join(root, id)))) removeMarker(call.marker);
  }
}

export async function remove(
  call: OciCall,
  wrapper: Conversation,
  escalator: Escalator,
  endings: Endings,
): Promise<OciAnswer> {
  const marker = readMarker(call.marker);
  // To the engine one that waits for its start runs, and it deletes no running one; to the caller it is created.
  const force = isUnstarted(marker) ? ["--force"] : [];
  const { engine, globalArgv, command, argv } = call;
  const isGone = async () => (await containerState(call)) === undefined;
  const ended = marker?.endedAtMs !== undefined && (await isGone());
  const status = ended ? 0 : await wrapper.run([engine, ...globalArgv, command, ...force, ...argv]);
  // Whether it is gone, the engine says best: a forced delete succeeds where there is none, others fail.
  if (status === 0 || (await isGone())) {
    escalator.forget(call.marker);
    endings.abort(call.marker);
    await giveBack(marker);
    removeMarker(call.marker);
  }
  return { status };
}

/** `kill [--all] ID [SIGNAL]`, TERM without one. */
export async function kill(
  call: OciCall,
  wrapper: Conversation,
  escalator: Escalator,
  endings: Endings,
): Promise<OciAnswer | undefined> {
  const marker = readMarker(call.marker);
  const after = call.argv.filter((argument) => argument !== "--" && !argument.startsWith("-"));
  const [id, name = "TERM"] = after;
  const sent = signalNumber(name);
  if (marker === undefined || id !== call.id || sent === undefined) {
    wrapper.become(asGiven(call)); // unknown signals, too: the engine has the words for it
    return undefined;
  }
  const flags = call.argv.filter((argument) => argument.startsWith("-") && argument !== "--");
  const send = async (signal: number) =>
    await wrapper.run([call.engine, ...call.globalArgv, "kill", ...flags, id, String(signal)]);
  if (isUnstarted(marker)) return { status: await send(signalOfUnstarted(sent)) };
  const plan = planKill(marker.kill, sent);
  if (plan.checkpoint && (await endings.begin(call, marker, sent, plan))) return { status: 0 };
  if (marker.kill === undefined) {
    wrapper.become(asGiven(call));
    return undefined;
  }
  if (sent === SIGKILL) endings.abort(call.marker); // nobody waits for a checkpoint any more
  const state = plan.escalation.length > 0 ? await containerState(call) : undefined;
  const status = await send(plan.signal);
  if (status === 0 && state !== undefined && state.pid > 0)
    escalator.begin(call.marker, marker, state.pid, plan.escalation);
  return { status };
}
