import { readFileSync, rmSync, writeFileSync } from "node:fs";
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { AlreadyExists, NotFound, WrongState } from "../errors/index.ts";
import { engineFailure } from "../runtime/engine-failure.ts";
import { execKillPolicy } from "../runtime/kill-policy.ts";
import { hasOurAnnotations, type OciProcess } from "../runtime/spec.ts";
import type { Container } from "./container.ts";
import { readPidFile } from "./engine-calls.ts";
import * as events from "./events.ts";
import type { Exits } from "./exits.ts";
import { type ExecRecord, exitOf, exitRecord } from "./journal.ts";
import type { Work } from "./keeper.ts";
import { type Exit, Process, type ProcessState, type ProcessStdio, refusal } from "./process.ts";
import { isLog, planStdio } from "./stdio.ts";

export interface ExecRequest {
  execId: string;
  stdio: ProcessStdio;
  /** the OCI process, JSON */
  spec: string;
}

/** A process that is added to a container. Its OCI process lies in a file in the bundle. */
export class ExecProcess extends Process {
  /** tells its files, and its io object in the keeper, from those of another exec of its name */
  readonly serial: number;
  /** what signals depend on in its OCI process */
  readonly signalFacts: OciProcess;
  readonly #bundle: string;

  constructor(
    { id, bundle }: Pick<Container, "id" | "bundle">,
    exec: {
      execId: string;
      serial: number;
      stdio: ProcessStdio;
      state: ProcessState;
      signalFacts: OciProcess;
    },
  ) {
    super(exec.execId, `${id}/${exec.serial}`, exec.stdio, exec.state);
    this.serial = exec.serial;
    this.signalFacts = exec.signalFacts;
    this.#bundle = bundle;
  }

  file(suffix: ExecFile): string {
    return execFile(this.#bundle, this.serial, suffix);
  }
}

/** json: the OCI process; the others are what the engine writes. */
type ExecFile = "json" | "pid" | "log";

function execFile(bundle: string, serial: number, suffix: ExecFile): string {
  return join(bundle, `exec-${serial}.${suffix}`);
}

/** The processes that are added to a task's container: registered, started, deleted. */
export class Execs {
  readonly #container: Container;
  readonly #exits: Exits;
  readonly #processes = new Map<string, ExecProcess>();

  constructor(container: Container, exits: Exits) {
    this.#container = container;
    this.#exits = exits;
  }

  /** undefined: there is none, or it has been deleted */
  get(execId: string): ExecProcess | undefined {
    return this.#processes.get(execId);
  }

  values(): Iterable<ExecProcess> {
    return this.#processes.values();
  }

  /** Registers a process; it runs at its Start. */
  add(work: Work, request: ExecRequest): void {
    const { id } = this.#container;
    const { execId, stdio, spec } = request;
    if (this.#processes.has(execId)) throw new AlreadyExists(`exec ${execId} of task ${id} already exists`);
    this.#check(execId);
    const process = new ExecProcess(this.#container, {
      execId,
      serial: work.request,
      stdio,
      state: "created",
      signalFacts: signalFacts(spec),
    });
    execKillPolicy({}, process.signalFacts); // a signal that doesn't exist is refused now, not when it is needed
    // Not in the record, which is written again at each transition. Some KB on a tmpfs: less than a trip through the thread pool.
    writeFileSync(process.file("json"), spec, { mode: 0o600 });
    this.#processes.set(execId, process);
    this.#container.publish(`exec-added:${work.request}`, events.execAdded(id, execId));
  }

  /** Starts one that is registered. @returns its pid */
  async start(work: Work, process: ExecProcess): Promise<number> {
    process.check("start");
    this.#check(process.execId);
    process.starting = true;
    try {
      await this.#run(work, process);
      process.move("start");
    } catch (error) {
      this.#exits.started(process);
      throw error;
    }
    const { id } = this.#container;
    this.#container.publish(
      `exec-started:${work.request}`,
      events.execStarted(id, process.execId, process.pid),
    );
    return process.pid;
  }

  async #run(work: Work, process: ExecProcess): Promise<void> {
    const { id, namespace, options, engine, pod } = this.#container;
    const { keeper } = pod;
    const consoleSocket = process.stdio.terminal ? pod.consoleSocketPath(process.io) : undefined;
    const stdio = planStdio(process.io, process.stdio, id, namespace, options);
    try {
      await this.#intercept(process.file("json"));
      // Spawned without waiting for the answer: the keeper takes both in order, and spawns nothing without the io object. What the output
      // of a log goes through may fail when that is there already.
      const opened = keeper.ioOpen(work.tag("io"), stdio);
      opened.catch(() => {}); // looked at below, if we get there
      if (isLog(stdio.stdoutKind) || isLog(stdio.stderrKind)) await opened;
      const { argv } = engine.exec({
        id,
        processFile: process.file("json"),
        pidFile: process.file("pid"),
        logFile: process.file("log"),
        consoleSocket,
        detach: true,
      });
      const ran = keeper.run(work.tag("exec"), { argv, io: process.io, consoleSocket });
      const [, exit] = await Promise.all([opened, ran]);
      if (exit.exitStatus !== 0) throw await engineFailure("exec", id, exit.exitStatus, process.file("log"));
      this.#exits.adopt(work, process, readPidFile(process.file("pid")));
    } catch (error) {
      await keeper.ioFree(work.tag("undo-io"), process.io);
      throw error;
    }
  }

  /** Where the container's GPU calls are intercepted, those of its execs are, too. */
  async #intercept(path: string): Promise<void> {
    const { knownSpec } = this.#container;
    if (!knownSpec || !hasOurAnnotations(knownSpec)) return;
    const { withInterception } = await import("../runtime/gpu-injection.ts");
    const process = await readFile(path, "utf8");
    const changed = withInterception(process, knownSpec);
    if (changed !== process) await writeFile(path, changed, { mode: 0o600 });
  }

  /** A process may be added to a container that is only created, too. @throws WrongState */
  #check(execId: string): void {
    const { id, init } = this.#container;
    if (!init.exit && (init.state === "created" || init.state === "running")) return;
    throw new WrongState(
      `${refusal("exec", init.exit ? "stopped" : init.state)}: exec ${execId} of task ${id}`,
    );
  }

  /** Closes its stdio, and forgets it. @returns its exit; undefined when it never ran */
  async delete(work: Work, process: ExecProcess): Promise<Exit | undefined> {
    const { id, pod } = this.#container;
    if (process.state === "deleted")
      throw new NotFound(`process does not exist ${process.execId}: it has been deleted from task ${id}`);
    process.check("delete");
    if (process.exit) await this.#exits.drain(work, process);
    // Not waited for: it can't fail, and the keeper takes it up before our answer.
    pod.keeper.ioFree(work.tag("io-free"), process.io).catch(() => {}); // Unavailable: the keeper took all along
    process.move("delete");
    if (process.pid === 0) process.neverRan();
    this.#processes.delete(process.execId);
    pod.afterResponse(work.request, () => {
      for (const suffix of ["json", "pid", "log"] as const) rmSync(process.file(suffix), { force: true });
    });
    return process.exit;
  }

  /** As the cedanad before us left them. */
  revive(records: readonly ExecRecord[]): void {
    for (const { execId, serial, state, pid, exit, spec, terminal, stdin, stdout, stderr } of records) {
      const process = new ExecProcess(this.#container, {
        execId,
        serial,
        stdio: { terminal, stdin, stdout, stderr },
        state: state as ProcessState,
        signalFacts: this.#revivedFacts(serial, spec),
      });
      process.pid = pid;
      if (exit) process.markExited(exitOf(exit));
      this.#processes.set(execId, process);
    }
  }

  /** @param spec  its OCI process, which older cedanads kept in the record itself */
  #revivedFacts(serial: number, spec: string | undefined): OciProcess {
    const path = execFile(this.#container.bundle, serial, "json");
    try {
      if (spec !== undefined) writeFileSync(path, spec, { mode: 0o600 });
      return signalFacts(readFileSync(path, "utf8"));
    } catch (error) {
      this.#container.log.warn({ err: error }, "read the process of an exec: its start will fail"); // deleted in the moment of a crash
      return {};
    }
  }

  /** For the task's record. */
  records(): ExecRecord[] {
    return [...this.#processes.values()].map((process) => ({
      execId: process.execId,
      serial: process.serial,
      state: process.state,
      pid: process.pid,
      ...process.stdio,
      ...exitRecord(process.exit),
    }));
  }
}

/** What signals depend on in an OCI process. One that is none is the engine's to refuse, in its own words. */
function signalFacts(spec: string): OciProcess {
  try {
    const { env } = (JSON.parse(spec) as OciProcess | null) ?? {};
    return Array.isArray(env) ? { env: env.filter((entry) => String(entry).startsWith("CEDANA_KILL_")) } : {};
  } catch {
    return {};
  }
}
