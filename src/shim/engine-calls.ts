import { readFileSync } from "node:fs";
import { join } from "node:path";
import { gateBelow } from "../criu/gate.ts";
import { learnVersionAnswer } from "../criu/version-answer.ts";
import { BrokenImage, NotFound } from "../errors/index.ts";
import type { Engine, EngineCommand, RestoreCommand } from "../runtime/engine.ts";
import { engineFailure } from "../runtime/engine-failure.ts";
import type { Container } from "./container.ts";
import type { SpawnOptions, Tag, Work } from "./keeper.ts";

/**
 * The engine's commands on a task's container, each an operation of the keeper. Each has a log of its own in the bundle, so that the
 * error of one is never taken for that of another, and throws what `engineFailure` makes of it.
 */
export class EngineCalls {
  readonly #container: Container;

  constructor(container: Container) {
    this.#container = container;
  }

  /** @returns the pid of its init */
  async create(work: Work): Promise<number> {
    const { id, bundle, engine, init, options } = this.#container;
    const pidFile = join(bundle, "init.pid");
    const logFile = this.#logFile("create");
    const consoleSocket = this.#consoleSocket();
    const command = engine.create({
      id,
      bundle,
      pidFile,
      logFile,
      consoleSocket,
      noPivot: options.noPivotRoot,
      noNewKeyring: options.noNewKeyring,
    });
    await this.#run(work.tag("create"), "create", command, { io: init.io, consoleSocket });
    return readPidFile(pidFile);
  }

  async start(tag: Tag): Promise<void> {
    const { id, engine } = this.#container;
    await this.#run(tag, "start", engine.start({ id, logFile: this.#logFile("start") }));
  }

  /** @param engine  with the features that decide about its arguments. @returns the pid of the init, which runs */
  async restore(
    work: Work,
    engine: Engine,
    restore: Omit<RestoreCommand, "id" | "bundle" | "pidFile" | "logFile">,
  ): Promise<number> {
    const { id, bundle, init, options, pod, log } = this.#container;
    const pidFile = join(bundle, "init.pid");
    const logFile = this.#logFile("restore");
    const consoleSocket = this.#consoleSocket();
    const { argv, env = [] } = engine.restore({
      ...restore,
      id,
      bundle,
      pidFile,
      logFile,
      consoleSocket,
      detach: true,
      noPivot: options.noPivotRoot,
    });
    const { path } = await gateBelow(pod.keeper.pid);
    env.push(`PATH=${path}`);
    const step = restore.lazyPages ? "restore-lazily" : "restore"; // the one may follow on the other
    await this.#run(work.tag(step), "restore", { argv, env }, { io: init.io, consoleSocket });
    learnVersionAnswer(path, log);
    return readPidFile(pidFile);
  }

  /** To every process of the container. */
  async killAll(tag: Tag, signal: number): Promise<void> {
    const { id, engine } = this.#container;
    await this.#run(tag, "kill", engine.kill({ id, signal, all: true, logFile: this.#logFile("kill") }));
  }

  /** @param resourcesFile  OCI resources, JSON */
  async update(tag: Tag, resourcesFile: string): Promise<void> {
    const { id, engine } = this.#container;
    await this.#run(tag, "update", engine.update({ id, resourcesFile, logFile: this.#logFile("update") }));
  }

  /** A container that the engine doesn't know is deleted. @param force  whatever state it is in */
  async delete(tag: Tag, force: boolean): Promise<void> {
    const { id, engine } = this.#container;
    try {
      await this.#run(tag, "delete", engine.delete({ id, force, logFile: this.#logFile("delete") }));
    } catch (error) {
      if (!(error instanceof NotFound)) throw error;
    }
  }

  /** @param stdio  of a command that makes the init: the task's */
  async #run(
    tag: Tag,
    action: string,
    command: EngineCommand,
    stdio: Pick<SpawnOptions, "io" | "consoleSocket"> = {},
  ): Promise<void> {
    const { id, pod } = this.#container;
    const exit = await pod.keeper.run(tag, { ...command, ...stdio });
    if (exit.exitStatus !== 0) throw await engineFailure(action, id, exit.exitStatus, this.#logFile(action));
  }

  #consoleSocket(): string | undefined {
    const { init, pod } = this.#container;
    return init.stdio.terminal ? pod.consoleSocketPath(init.io) : undefined;
  }

  #logFile(action: string): string {
    return join(this.#container.bundle, `${action}.log.json`);
  }
}

/** @throws BrokenImage when an engine has left no pid there */
export function readPidFile(path: string): number {
  const text = readFileSync(path, "utf8");
  const pid = Number(text);
  if (!Number.isSafeInteger(pid) || pid <= 0)
    throw new BrokenImage(`pid file ${path} holds ${JSON.stringify(text)}`);
  return pid;
}
