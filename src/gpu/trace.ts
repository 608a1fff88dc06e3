import { constants } from "node:fs";
import { open, readdir, stat } from "node:fs/promises";
import { join } from "node:path";
import { InvalidRequest, NotFound, SyscallFailed } from "../errors/index.ts";

/*
 * The traces that the interception library writes (addon/gpu/trace.c): one document of Chrome's trace events for each process, and an older
 * part where it became long. They are read line by line, an event each, because a process that is killed within a write leaves a
 * document without its end; what isn't an event is left out and counted.
 *
 * They lie where a container may write: whatever is there may be a link, a FIFO, or a file of any size.
 */

export interface TraceEvent {
  name: string;
  ph: string;
  pid: number;
  tid: number;
  /** microseconds of CLOCK_MONOTONIC */
  ts?: number;
  dur?: number;
  args?: Record<string, unknown>;
}

export interface EntryPointTotal {
  calls: number;
  bytes: number;
  ns: number;
  errors: number;
}

export interface Trace {
  displayTimeUnit: "ns";
  traceEvents: TraceEvent[];
  otherData: {
    /** events that their process had no room for */
    dropped: number;
    /** lines that were no events */
    broken: number;
    calls: Record<string, EntryPointTotal>;
  };
}

const MAX_FILE_BYTES = 512 * 1024 ** 2;
const MAX_FILES = 4096;

/**
 * Reads a trace, or all of a directory's as one.
 * @throws NotFound, InvalidRequest for what is no trace or larger than one
 */
export async function readTraces(path: string): Promise<Trace> {
  const info = await stat(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ENOENT") throw new NotFound(`trace ${path} does not exist`, { cause: error });
    throw SyscallFailed.from(error);
  });
  const files = info.isDirectory() ? await tracesIn(path) : [path];
  const whole: Trace = {
    displayTimeUnit: "ns",
    traceEvents: [],
    otherData: { dropped: 0, broken: 0, calls: {} },
  };
  // Both parts of a process have the sums of all its calls: the newer's count, where it has come to have some.
  const summed = new Set<string>();
  for (const file of files.toSorted((a, b) => Number(isOlder(a)) - Number(isOlder(b)))) {
    const trace = parseTrace(await readBounded(file));
    const process = file.replace(/(\.old)?\.json$/, "");
    addTrace(whole, trace, !summed.has(process));
    if (Object.keys(trace.otherData.calls).length > 0) summed.add(process);
  }
  return whole;
}

async function tracesIn(directory: string): Promise<string[]> {
  const entries = await readdir(directory, { withFileTypes: true });
  const names = entries.filter((entry) => entry.isFile() && /^gpu-[\w.-]+\.json$/.test(entry.name));
  if (names.length === 0) throw new NotFound(`${directory} has no traces (gpu-*.json)`);
  if (names.length > MAX_FILES) throw new InvalidRequest(`${directory} has ${names.length} traces`);
  return names.map(({ name }) => join(directory, name)).sort();
}

async function readBounded(path: string): Promise<string> {
  await using file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK).catch(
    (error: NodeJS.ErrnoException) => {
      if (error.code === "ELOOP") throw new InvalidRequest(`trace ${path} is a symbolic link`);
      throw SyscallFailed.from(error);
    },
  );
  const info = await file.stat();
  if (!info.isFile()) throw new InvalidRequest(`trace ${path} is not a file`);
  if (info.size > MAX_FILE_BYTES) throw new InvalidRequest(`trace ${path} has ${info.size} bytes`);
  return await file.readFile("utf8");
}

/** One document, whole or cut off. */
export function parseTrace(text: string): Trace {
  const trace: Trace = {
    displayTimeUnit: "ns",
    traceEvents: [],
    otherData: { dropped: 0, broken: 0, calls: {} },
  };
  const [head = "", ...lines] = text.split("\n");
  if (!/"traceEvents":\[$/.test(head))
    throw new InvalidRequest("it does not begin as a trace of the GPU interception does");
  for (const line of lines) {
    if (line === "") continue;
    if (line.startsWith("]")) {
      readSums(line, trace);
      break;
    }
    const event = parseEvent(line.replace(/,$/, ""));
    if (event) trace.traceEvents.push(event);
    else trace.otherData.broken++;
  }
  return trace;
}

function parseEvent(line: string): TraceEvent | undefined {
  const event = parseOrNothing(line) as Partial<TraceEvent> | undefined;
  if (typeof event !== "object" || event === null) return undefined;
  const { name, ph, pid, tid } = event;
  const isEvent = typeof name === "string" && typeof ph === "string";
  return isEvent && Number.isInteger(pid) && Number.isInteger(tid) ? (event as TraceEvent) : undefined;
}

/** `],"otherData":{…}}`, the end of the document. */
function readSums(line: string, trace: Trace): void {
  const end = parseOrNothing(`{${line.replace(/^\],?/, "")}`) as
    | { otherData?: Trace["otherData"] }
    | undefined;
  const { dropped, calls } = end?.otherData ?? {};
  if (typeof dropped !== "number" || typeof calls !== "object" || calls === null) {
    trace.otherData.broken++;
    return;
  }
  trace.otherData.dropped = dropped;
  for (const [name, total] of Object.entries(calls)) {
    const numbers = [total?.calls, total?.bytes, total?.ns, total?.errors];
    if (numbers.every((number) => typeof number === "number")) trace.otherData.calls[name] = total;
  }
}

function parseOrNothing(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

const isOlder = (file: string) => file.endsWith(".old.json");

function addTrace(whole: Trace, { traceEvents, otherData }: Trace, withSums: boolean): void {
  for (const event of traceEvents) whole.traceEvents.push(event);
  whole.otherData.broken += otherData.broken;
  if (!withSums) return;
  whole.otherData.dropped += otherData.dropped;
  for (const [name, total] of Object.entries(otherData.calls)) {
    const sum = Object.hasOwn(whole.otherData.calls, name)
      ? whole.otherData.calls[name]!
      : { calls: 0, bytes: 0, ns: 0, errors: 0 };
    Object.defineProperty(whole.otherData.calls, name, {
      enumerable: true,
      configurable: true,
      writable: true,
      value: {
        calls: sum.calls + total.calls,
        bytes: sum.bytes + total.bytes,
        ns: sum.ns + total.ns,
        errors: sum.errors + total.errors,
      },
    });
  }
}

/** Entry points by the time spent in them, a line each. */
export function summaryOf({ traceEvents, otherData }: Trace): string {
  const rows = Object.entries(otherData.calls).sort(([, a], [, b]) => b.ns - a.ns);
  const lines = rows.map(([name, { calls, bytes, ns, errors }]) =>
    [
      name.padEnd(36),
      String(calls).padStart(12),
      String(bytes).padStart(16),
      (ns / 1e6).toFixed(3).padStart(14),
      String(errors).padStart(8),
    ].join(" "),
  );
  const heading = [
    "entry point".padEnd(36),
    "calls".padStart(12),
    "bytes".padStart(16),
    "ms".padStart(14),
    "errors".padStart(8),
  ].join(" ");
  const { dropped, broken } = otherData;
  const events = traceEvents.filter(({ ph }) => ph === "X").length;
  return [heading, ...lines, `${events} events, ${dropped} dropped, ${broken} broken`].join("\n");
}
