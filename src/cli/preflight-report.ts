import { execFile } from "node:child_process";
import { readdir, stat } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { type CriuFacts, type PreflightInput, preflight } from "../checkpoint/preflight/preflight.ts";
import { type PreflightDocument, toDocument, toText } from "../checkpoint/preflight/report.ts";
import { CriuFailed, InvalidRequest, NotFound } from "../errors/index.ts";
import { mayHaveGpu } from "../gpu/present.ts";
import { findGpuProcesses } from "../gpu/processes.ts";
import { childrenOf, isAlive } from "../linux/proc.ts";
import { engineName } from "../runtime/engine.ts";
import { containerState } from "../runtime/oci/state.ts";
import { preflightInput } from "../runtime/preflight.ts";
import { daemonStatus, NotRunning } from "./daemon.ts";
import { WrongUsage } from "./failure.ts";

const run = promisify(execFile);

/** A container of a running cedanad or of an OCI engine, or a process with all that descend from it. */
interface PreflightRequest {
  container?: string | undefined;
  namespace?: string | undefined;
  /** directory of an engine's state */
  root?: string | undefined;
  pid?: number | undefined;
  destination?: string | undefined;
}

/** Looks at a container or a process. @throws WrongUsage, InvalidRequest, NotFound */
export async function runPreflight(
  request: PreflightRequest,
): Promise<{ text: string; document: PreflightDocument }> {
  if (!request.container === (request.pid === undefined))
    throw new WrongUsage(
      "preflight: give the id of a container, or a process by --pid; see `cedana preflight --help`",
    );
  const { name, input } =
    request.pid === undefined ? await ofContainer(request) : await ofProcess(request, request.pid);
  // What the GPU driver's processes hold is given back before CRIU looks.
  const gpuDevices = mayHaveGpu()
    ? (await findGpuProcesses(input.pids)).flatMap(({ devices }) => devices)
    : [];
  const report = await preflight({ ...input, pluginDevices: gpuDevices });
  return { text: toText(name, report), document: toDocument(report) };
}

async function ofContainer(request: PreflightRequest) {
  const container = request.container!;
  const task =
    (request.root === undefined ? await ofShim(container, request.namespace) : undefined) ??
    (request.namespace === undefined ? await ofEngine(container, request.root) : undefined);
  if (!task) {
    const elsewhere = request.root ?? `${engineRoots().join(" or ")} (another engine's state: --root)`;
    throw new NotFound(
      request.namespace === undefined
        ? `no container ${container} runs: cedanad has none (\`cedana query containerd\` shows those it has), and there is none in ${elsewhere}`
        : `cedanad has no container ${container} in namespace ${request.namespace}: \`cedana query containerd\` shows those it has`,
    );
  }
  const options = { destination: request.destination, criu: await criuFacts() };
  return { name: `container ${task.id}`, input: await preflightInput(task, options) };
}

interface FoundContainer {
  id: string;
  pid: number;
  bundle: string;
  engine: "runc" | "crun";
}

async function ofShim(id: string, namespace: string | undefined): Promise<FoundContainer | undefined> {
  const { pods } = await daemonStatus().catch((error: unknown) => {
    if (error instanceof NotRunning) return { pods: [] };
    throw error;
  });
  const found = pods.flatMap((pod) =>
    pod.tasks.flatMap((task) =>
      task.id === id && (namespace ?? pod.namespace) === pod.namespace
        ? [{ ...task, namespace: pod.namespace }]
        : [],
    ),
  );
  if (found.length > 1)
    throw new InvalidRequest(
      `container ${id} is in the namespaces ${found.map((one) => one.namespace).join(", ")}: name one by --namespace`,
    );
  const [task] = found;
  return task && { ...task, engine: engineName(task.engine) };
}

/** Where the engines keep their state when their callers, as Podman, don't say. Of root's, crun alone goes by XDG_RUNTIME_DIR. */
function engineRoots(): string[] {
  const { XDG_RUNTIME_DIR: session } = process.env;
  return ["/run/runc", "/run/crun", ...(session ? [join(session, "crun")] : [])];
}

/** @param id  of a container, or the beginning of one, as Podman and Docker show them */
async function ofEngine(id: string, root: string | undefined): Promise<FoundContainer | undefined> {
  const all: { root: string; id: string }[] = [];
  for (const one of root === undefined ? engineRoots() : [root]) {
    const names = await readdir(one).catch((error: NodeJS.ErrnoException) => {
      if (root === undefined && error.code === "ENOENT") return []; // that engine has had none
      throw new NotFound(`read the engine's state in ${one}: ${error.message}`, { cause: error });
    });
    all.push(...names.map((name) => ({ root: one, id: name })));
  }
  const exact = all.filter((one) => one.id === id);
  const found = exact.length > 0 ? exact : all.filter((one) => one.id.startsWith(id));
  if (found.length > 1)
    throw new InvalidRequest(
      exact.length > 0
        ? `container ${id} is in ${found.map((one) => one.root).join(" and in ")}: name one by --root`
        : `${found.length} containers are called ${id}…: ${found.map((one) => one.id).join(", ")}`,
    );
  const [container] = found;
  if (!container) return undefined;
  const status = await stat(join(container.root, container.id, "status")).catch(() => undefined); // ENOENT: runc has none
  const engine = status ? "crun" : "runc";
  const state = await containerState({ ...container, engine });
  return state && state.pid > 0 ? { ...state, engine } : undefined;
}

async function ofProcess({ destination }: PreflightRequest, pid: number) {
  if (!isAlive(pid)) throw new NotFound(`there is no process ${pid}`);
  const below = (root: number): number[] => [root, ...childrenOf(root).flatMap(below)];
  const input: PreflightInput = { pids: below(pid), rootPid: pid, destination, criu: await criuFacts() };
  return { name: `process ${pid}`, input };
}

/** null: there is no CRIU. */
async function criuFacts(): Promise<CriuFacts | null> {
  try {
    const { stdout } = await run("criu", ["--version"]);
    const version = /^Version:\s*(\S+)/m.exec(stdout)?.[1];
    if (version === undefined)
      throw new CriuFailed(`criu --version says ${JSON.stringify(stdout.slice(0, 200))}`);
    return { version };
  } catch (err) {
    if ((err as NodeJS.ErrnoException).code === "ENOENT") return null;
    throw err;
  }
}
