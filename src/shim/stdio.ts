import { InvalidRequest } from "../errors/index.ts";
import { type IoOptions, stdioKind } from "./keeper.ts";
import type { ProcessStdio } from "./process.ts";

/** Long enough for a log program to come up on a busy node, short enough for containerd's own limits. */
const LOG_PROGRAM_READY_MS = 10_000;
/** How long a process waits to be begun for the readers of its output FIFOs. The Go shim waits without end. */
const READERS_MS = 10_000;

/**
 * What the keeper must open for a process, from the stdio fields of a Create or Exec request:
 *
 *   ""                                   nothing (/dev/null)
 *   /path or fifo:///path                a FIFO of containerd's client
 *   file:///path                         a log file, appended to; stderr follows stdout when it names none
 *   binary:///program?key=value&…        a log program for both, argv `program key value …`, told the container by
 *                                        CONTAINER_ID and CONTAINER_NAMESPACE
 *
 * @param owner  whose the pipes to the process are
 * @throws InvalidRequest for another scheme, a relative path, or a log program beside something else
 */
export function planStdio(
  io: string,
  stdio: ProcessStdio,
  containerId: string,
  namespace: string,
  owner: { ioUid: number; ioGid: number } = { ioUid: 0, ioGid: 0 },
): IoOptions {
  const stdout = parseTarget("stdout", stdio.stdout);
  let stderr = parseTarget("stderr", stdio.terminal ? "" : stdio.stderr);
  const stdin = parseTarget("stdin", stdio.stdin);
  if (stdin.kind !== stdioKind.none && stdin.kind !== stdioKind.fifo)
    throw new InvalidRequest(`stdin ${stdio.stdin} must be a FIFO`);
  if (stdout.kind === stdioKind.file && stderr.kind === stdioKind.none && !stdio.terminal) stderr = stdout;
  if (stderr.kind === stdioKind.logProgram && stdout.kind !== stdioKind.logProgram)
    throw new InvalidRequest(
      `stderr ${stdio.stderr} names a log program, stdout ${stdio.stdout || "(none)"} does not`,
    );
  if (stdout.kind === stdioKind.logProgram && !stdio.terminal) stderr = stdout;
  return {
    io,
    terminal: stdio.terminal,
    stdin: stdin.path,
    stdout: stdout.path,
    stderr: stderr.path,
    stdoutKind: stdout.kind,
    stderrKind: stderr.kind,
    uid: owner.ioUid,
    gid: owner.ioGid,
    ...(stdout.kind === stdioKind.logProgram && {
      driverArgv: [stdout.path, ...stdout.query],
      driverEnv: [`CONTAINER_ID=${containerId}`, `CONTAINER_NAMESPACE=${namespace}`],
    }),
    timeoutMs: stdout.kind === stdioKind.logProgram ? LOG_PROGRAM_READY_MS : READERS_MS,
  };
}

/** The URI of a log file, as `planStdio` takes it. @param path  absolute */
export function logFileUri(path: string): string {
  return `file://${path.split("/").map(encodeURIComponent).join("/")}`;
}

/** Whether output goes through a process beside the keeper, which takes its time to come up, and may fail. */
export function isLog(kind: number): boolean {
  return kind === stdioKind.file || kind === stdioKind.logProgram;
}

/** undefined for one that is no path: half an escape, or a NUL */
function decodedPath({ pathname }: URL): string | undefined {
  try {
    const path = decodeURIComponent(pathname);
    return path.includes("\0") ? undefined : path;
  } catch {
    return undefined; // URIError
  }
}

interface Target {
  kind: number;
  path: string;
  query: string[];
}

function parseTarget(name: string, uri: string): Target {
  if (uri === "") return { kind: stdioKind.none, path: "", query: [] };
  if (uri.startsWith("/")) return { kind: stdioKind.fifo, path: uri, query: [] };
  let url: URL;
  try {
    url = new URL(uri);
  } catch (error) {
    throw new InvalidRequest(`${name} ${uri} is neither an absolute path nor a URI`, { cause: error });
  }
  const kind = { "fifo:": stdioKind.fifo, "file:": stdioKind.file, "binary:": stdioKind.logProgram }[
    url.protocol
  ];
  if (kind === undefined)
    throw new InvalidRequest(
      `${name} ${uri}: scheme ${url.protocol.slice(0, -1)} is not one of fifo, file, binary`,
    );
  const path = decodedPath(url);
  if (!path?.startsWith("/")) throw new InvalidRequest(`${name} ${uri} has no absolute path`);
  // One value for each key, as log programs know it from the Go shim.
  const query = [...new Set(url.searchParams.keys())].flatMap((key) => [
    key,
    url.searchParams.get(key) ?? "",
  ]);
  return { kind, path, query };
}
