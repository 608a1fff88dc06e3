import { readFileSync } from "node:fs";
import { readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { TimedOut } from "../errors/index.ts";
import { lastLogError } from "../runtime/engine-failure.ts";
import { endSession, type Hook, HookOutput, hookFailure } from "../runtime/hooks.ts";
import { processLike } from "../runtime/spec.ts";
import type { Container } from "./container.ts";
import { stdioKind, type Tag, type ToolExit } from "./keeper.ts";

/** How long the keeper may take to hand over the last of a hook's output. */
const DRAIN_MS = 1_000;

/**
 * Runs a hook in a task's container, by the engine's `exec`, and waits for its end; nothing of it is left then. A cedanad that
 * comes after a crash calls it again with the same tags: the keeper has kept the hook and its output, and runs nothing twice.
 * @param env  what it is told
 * @throws WrongState when it fails, TimedOut
 */
export async function runHook(
  task: Container,
  tag: (step: string) => Tag,
  hook: Hook,
  env: readonly string[],
): Promise<void> {
  const { keeper } = task.pod;
  const file = (suffix: string) => join(task.bundle, `hook-${hook.name}.${suffix}`);
  const step = (name: string) => tag(`${hook.name}:${name}`);
  const io = `${task.id}/${hook.name}`;
  const config = join(task.bundle, "config.json");
  const told = [`CEDANA_HOOK=${hook.name}`, ...env];
  await writeFile(
    file("json"),
    processLike(await readFile(config, "utf8"), { args: hook.args, env: told }, config),
    {
      mode: 0o600,
    },
  );
  await using output = HookOutput.open(file("out"));
  try {
    if (step("io").request === 0) {
      // Nothing is remembered of work of our own: what a cedanad before us has begun is ended, and begun anew.
      await endHook(task, file("pid"));
      await keeper.ioFree(step("io-free-before"), io);
    }
    await keeper.ioOpen(step("io"), {
      io,
      terminal: false,
      stdin: "",
      stdout: output.path,
      stderr: output.path,
      stdoutKind: stdioKind.fifo,
      stderrKind: stdioKind.fifo,
    });
    const command = task.engine.exec({
      id: task.id,
      processFile: file("json"),
      pidFile: file("pid"),
      logFile: file("log"),
      detach: false,
    });
    const startedAt = performance.now();
    let exit: ToolExit | undefined;
    try {
      exit = await keeper.run(step("run"), { argv: command.argv, io, timeoutMs: hook.timeoutMs });
    } catch (error) {
      if (!(error instanceof TimedOut)) throw error; // the engine could not be started
    } finally {
      await endHook(task, file("pid"));
      await keeper.ioDrain(step("drain"), io, DRAIN_MS);
      await keeper.ioFree(step("io-free"), io);
    }
    const text = await output.text();
    if (exit?.exitStatus === 0) {
      task.log.info({ output: text, ms: Math.round(performance.now() - startedAt) }, `${hook.name} hook`);
      return;
    }
    throw hookFailure(hook, `task ${task.id}`, {
      ...(exit && { exitStatus: exit.exitStatus }),
      engineError: await lastLogError(file("log")),
      output: text,
    });
  } finally {
    for (const suffix of ["json", "pid", "log"]) await rm(file(suffix), { force: true });
  }
}

/** The engine's pid file goes with it: a repetition must not take the pid for another process's. */
async function endHook(task: Container, pidFile: string): Promise<void> {
  let pid: number;
  try {
    pid = Number(readFileSync(pidFile, "utf8"));
  } catch {
    return; // ENOENT: the engine could not begin it; or all this was done before a crash
  }
  if (pid > 0 && task.init.exit === undefined) await endSession(await task.cgroup(), pid);
  await rm(pidFile, { force: true });
}
