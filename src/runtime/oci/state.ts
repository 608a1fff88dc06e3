import { execFile } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { NotFound, RuntimeFailed, Unavailable } from "../../errors/index.ts";
import { Cgroup } from "../../linux/cgroup.ts";
import { startTime } from "../../linux/proc.ts";
import { engineName } from "../engine.ts";
import { failureFrom, lastErrorIn } from "../engine-failure.ts";
import { cgroupName, type OciSpec, readSpec } from "../spec.ts";
import type { OciCall } from "./call.ts";
import type { Marker } from "./marker.ts";

/** What the engine says of a container. Source: runtime-spec, runtime.md, "State"; `pid` is 0 for a stopped one. */
export interface ContainerState {
  readonly id: string;
  readonly status: "creating" | "created" | "running" | "paused" | "stopped";
  readonly pid: number;
  readonly bundle: string;
}

const patienceMs = 10_000;

/**
 * A container that runs or is paused, from the files of its engine: a start of runc takes as long as all else that a checkpoint
 * adds. Whatever isn't quite clear is left to the engine.
 * Source: libcontainer's state.json (runc), libcrun's status file.
 */
async function fromFiles(call: Pick<OciCall, "root" | "id">): Promise<ContainerState | undefined> {
  const directory = join(call.root, call.id);
  // At once: the engine's few files are in memory, and each trip through the thread pool takes ten times as long as one of them.
  const read = (name: string): Record<string, unknown> | undefined => {
    const path = join(directory, name);
    return existsSync(path) ? JSON.parse(readFileSync(path, "utf8")) : undefined;
  };
  try {
    const runc = read("state.json");
    const crun = runc ? undefined : read("status");
    const labels = (runc?.config as { labels?: string[] } | undefined)?.labels ?? [];
    const [pid, started, bundle] = runc
      ? [
          runc.init_process_pid,
          runc.init_process_start,
          labels.find((one) => one.startsWith("bundle="))?.slice(7),
        ]
      : [crun?.pid, crun?.["process-start-time"], crun?.bundle];
    if (typeof pid !== "number" || pid <= 0 || typeof bundle !== "string") return undefined;
    if (startTime(pid) !== started) return undefined; // it has ended
    if (existsSync(join(directory, "exec.fifo"))) return undefined; // created, and not started
    const paused = await (await Cgroup.of(pid)).isFrozen();
    return { id: call.id, status: paused ? "paused" : "running", pid, bundle };
  } catch {
    return undefined; // the engine knows, and has the words for it
  }
}

/**
 * Asks the engine's files, then the engine, without the caller's log: what it answers here is nobody's error.
 * @returns undefined when it knows no such container
 * @throws Unavailable when it can't be asked
 */
export async function containerState(
  call: Pick<OciCall, "engine" | "root" | "id">,
): Promise<ContainerState | undefined> {
  const known = await fromFiles(call);
  if (known) return known;
  const argv = ["--root", call.root, "state", call.id];
  const { error, stdout, stderr } = await new Promise<{
    error: Error | null;
    stdout: string;
    stderr: string;
  }>((done) =>
    execFile(call.engine, argv, { timeout: patienceMs, encoding: "utf8" }, (failure, out, err) =>
      done({ error: failure, stdout: out, stderr: err }),
    ),
  );
  if (!error) return parseState<ContainerState>(stdout, call);
  if (failureFrom("state", call.id, 1, lastErrorIn(stderr)) instanceof NotFound) return undefined;
  throw new Unavailable(`ask ${call.engine} for the state of ${call.id}: ${stderr.trim() || error.message}`, {
    cause: error,
  });
}

/** What an engine prints for `state`. @throws RuntimeFailed */
export function parseState<T>(text: string, { engine, id }: Pick<OciCall, "engine" | "id">): T {
  try {
    return JSON.parse(text) as T;
  } catch (error) {
    const cause = error;
    throw new RuntimeFailed(
      `state of container ${id}: ${engine} printed what is no JSON: ${text.slice(0, 200)}`,
      { cause },
    );
  }
}

/** containerd's namespace, which its shims put last in the path of the engine's state; else one for all callers that have none. */
export function namespaceOf(root: string): string {
  const name = root.replace(/\/+$/, "").split("/").at(-1)!;
  return ["runc", "crun"].includes(name) || !/^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$/.test(name) ? "oci" : name;
}

/** The cgroup of a container of ours, as its spec names it. @param pid  of its init */
export async function cgroupOf(marker: Marker, pid: number): Promise<Cgroup> {
  const spec: OciSpec = marker.bundle ? await readSpec(marker.bundle) : {};
  return await Cgroup.of(pid, cgroupName(spec, marker.id, engineName(marker.engine)));
}
