import { execFile } from "node:child_process";
import { Unavailable } from "../../errors/index.ts";
import type { OciCall } from "./call.ts";

/** What the engine says of a container. Source: runtime-spec, runtime.md, "State"; `pid` is 0 for a stopped one. */
export interface ContainerState {
  readonly id: string;
  readonly status: "creating" | "created" | "running" | "paused" | "stopped";
  readonly pid: number;
  readonly bundle: string;
}

const patienceMs = 10_000;

/**
 * Asks the engine, without the caller's log: what it answers here is nobody's error.
 * @returns undefined when it knows no such container
 * @throws Unavailable when it can't be asked
 */
export async function containerState(
  call: Pick<OciCall, "engine" | "root" | "id">,
): Promise<ContainerState | undefined> {
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
  if (!error) return JSON.parse(stdout) as ContainerState;
  if (/does not exist|No such file or directory/.test(stderr)) return undefined;
  throw new Unavailable(`ask ${call.engine} for the state of ${call.id}: ${stderr.trim() || error.message}`, {
    cause: error,
  });
}
