import { execFile } from "node:child_process";
import { promisify } from "node:util";
import { type CriuFacts, type PreflightInput, preflight } from "../checkpoint/preflight/preflight.ts";
import { type PreflightDocument, toDocument, toText } from "../checkpoint/preflight/report.ts";
import { CriuFailed, InvalidRequest, NotFound } from "../errors/index.ts";
import { mayHaveGpu } from "../gpu/present.ts";
import { findGpuProcesses } from "../gpu/processes.ts";
import { childrenOf, isAlive } from "../linux/proc.ts";
import { preflightInput } from "../runtime/preflight.ts";
import { daemonStatus } from "./daemon.ts";
import { WrongUsage } from "./failure.ts";

const run = promisify(execFile);

/** A container of a running cedanad, or a process with all that descend from it. */
interface PreflightRequest {
  container?: string | undefined;
  namespace?: string | undefined;
  pid?: number | undefined;
  destination?: string | undefined;
}

/** Looks at a container or a process. @throws WrongUsage, InvalidRequest, NotFound */
export async function runPreflight(
  request: PreflightRequest,
): Promise<{ text: string; document: PreflightDocument }> {
  if ((request.container === undefined) === (request.pid === undefined))
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

async function ofContainer({ container, namespace, destination }: PreflightRequest) {
  const { pods } = await daemonStatus();
  const found = pods.flatMap((pod) =>
    pod.tasks.flatMap((task) =>
      task.id === container && (namespace ?? pod.namespace) === pod.namespace
        ? [{ ...task, namespace: pod.namespace }]
        : [],
    ),
  );
  const [task] = found;
  if (!task)
    throw new NotFound(
      `cedanad has no container ${container}${namespace === undefined ? "" : ` in namespace ${namespace}`}: \`cedana query containerd\` shows those it has`,
    );
  if (found.length > 1)
    throw new InvalidRequest(
      `container ${container} is in the namespaces ${found.map((one) => one.namespace).join(", ")}: name one by --namespace`,
    );
  const engine = /(?:^|\/)crun$/.test(task.engine) ? "crun" : "runc";
  const input = await preflightInput({ ...task, engine }, { destination, criu: await criuFacts() });
  return { name: `container ${task.id}`, input };
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
