import { mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { TimedOut } from "../../errors/index.ts";
import { Pidfd } from "../../linux/addon.ts";
import { Cgroup } from "../../linux/cgroup.ts";
import { commandLineOf, isFromHere } from "../../linux/command-line.ts";
import { childrenOf } from "../../linux/proc.ts";
import { engineName } from "../engine.ts";
import { lastLogError } from "../engine-failure.ts";
import { endSession, type Hook, HookOutput, hookFailure } from "../hooks.ts";
import { cgroupName, type OciSpec, processLike } from "../spec.ts";
import { type Conversation, type OciCall, withoutLog } from "./call.ts";

/** For an engine whose hook has been killed. */
const ENGINE_ENDS_MS = 2_000;

/**
 * Runs a hook in a container, by the engine's `exec` below the wrapper, and waits for its end; nothing of it is left then.
 * @param container  its init, and the bundle and configuration that it was made from
 * @param scratch    a directory for small files
 * @throws WrongState when it fails, TimedOut
 */
export async function runHook(
  { call, wrapper }: { call: OciCall; wrapper: Conversation },
  container: { initPid: number; bundle: string; spec: OciSpec },
  hook: Hook,
  env: readonly string[],
  scratch: string,
): Promise<void> {
  const file = (suffix: string) => join(scratch, `hook.${suffix}`);
  const config = join(container.bundle, "config.json");
  const told = [`CEDANA_HOOK=${hook.name}`, ...env];
  const cgroup = await Cgroup.of(
    container.initPid,
    cgroupName(container.spec, call.id, engineName(call.engine)),
  );
  await mkdir(scratch, { recursive: true, mode: 0o700 });
  await writeFile(
    file("json"),
    processLike(await readFile(config, "utf8"), { args: hook.args, env: told }, config),
    { mode: 0o600 },
  );
  await using output = HookOutput.open(file("out"));
  try {
    const command = [
      call.engine,
      ...withoutLog(call.globalArgv),
      `--log=${file("log")}`,
      "--log-format=json",
      "exec",
      `--process=${file("json")}`,
      `--pid-file=${file("pid")}`,
      call.id,
    ];
    const startedAt = performance.now();
    const running = wrapper.run(command, { outputPath: output.path });
    running.catch(() => {}); // looked at below
    const end = async () => await endHook(scratch, cgroup);
    let exitStatus = await within(running, hook.timeoutMs);
    await end();
    if (exitStatus === undefined && (await within(running, ENGINE_ENDS_MS)) === undefined) {
      await killEngine(call.pid, `--process=${file("json")}`); // it hangs before there is a process
      await running;
      await end();
      exitStatus = undefined;
    }
    const text = await output.text();
    if (exitStatus === 0) {
      wrapper.log.info({ output: text, ms: Math.round(performance.now() - startedAt) }, `${hook.name} hook`);
      return;
    }
    throw hookFailure(hook, `container ${call.id}`, {
      ...(exitStatus !== undefined && { exitStatus }),
      engineError: await lastLogError(file("log")),
      output: text,
    });
  } finally {
    for (const suffix of ["json", "pid", "log"]) await rm(file(suffix), { force: true });
  }
}

/** Nothing is left of the hook that was begun with this scratch, by whatever cedanad. */
export async function endHook(scratch: string, cgroup: Cgroup): Promise<void> {
  const pid = Number(await readFile(join(scratch, "hook.pid"), "utf8").catch(() => "")); // ENOENT: the engine could not begin it
  if (pid > 0) await endSession(cgroup, pid);
}

/** @returns undefined when the time is over first */
async function within<T>(promise: Promise<T>, timeoutMs: number): Promise<T | undefined> {
  let timer: NodeJS.Timeout | undefined;
  const over = new Promise<undefined>((resolve) => {
    timer = setTimeout(() => resolve(undefined), timeoutMs);
  });
  try {
    return await Promise.race([promise, over]);
  } finally {
    clearTimeout(timer);
  }
}

/** The child of whoever runs it that has this among its arguments. */
async function killEngine(parentPid: number, argument: string): Promise<void> {
  for (const pid of childrenOf(parentPid)) {
    try {
      using child = Pidfd.open(pid);
      const isIt = isFromHere(pid) && (await commandLineOf(pid)).split("\0").includes(argument);
      if (isIt) child.signal(9);
    } catch (error) {
      if (!["ESRCH", "ENOENT"].includes((error as NodeJS.ErrnoException).code ?? ""))
        throw new TimedOut(`the engine that runs a hook (pid ${pid}) can't be killed`, { cause: error });
    }
  }
}
