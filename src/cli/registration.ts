import {
  chmodSync,
  chownSync,
  mkdirSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmdirSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import { parse as parseToml } from "smol-toml";
import { InvalidRequest, SyscallFailed } from "../errors/index.ts";
import { readRecordNow, writeRecordNow } from "../linux/record-file.ts";
import type { Target } from "./targets.ts";

/*
 * `cedana setup`: makes containerd, CRI-O, Podman or Docker know our runtime, and takes it back to the byte.
 *
 * What is written stands in packaging/, once. CRI-O and Podman read drop-ins, which are files of our own. containerd 1.x replaces
 * a whole plugin's section by that of an imported file, so its runtime goes into its own configuration, as a block between two
 * marks. Docker has one JSON file. What a file was before is kept in the state directory: an undo that finds the file as we
 * left it puts that back, and one that finds it changed takes out only what is ours.
 */

export interface Place {
  /** in front of every path, for images and chroots; "" for the machine itself */
  readonly root: string;
  /** where the programs are, as the services will see them */
  readonly programs: string;
  /** our packaging/ */
  readonly packaging: string;
  /** cedana's state directory, below `root` */
  readonly stateDirectory: string;
}

/** One file as it is and as it shall be; undefined: it isn't there. */
export interface Change {
  readonly path: string;
  readonly before: string | undefined;
  readonly after: string | undefined;
}

/** What an undo needs. */
interface Note {
  version: 1;
  path: string;
  before: string | null;
  after: string;
  /** directories that were made for the file, outermost first */
  madeDirectories: string[];
}

const blockBegin = "# --- cedana setup: from here";
const blockEnd = "# --- cedana setup: to here";

export const restartAdvice: Record<Target, string> = {
  containerd: "containerd reads it when it is restarted: systemctl restart containerd (containers run on)",
  crio: "CRI-O reads it when it is restarted: systemctl restart crio (containers run on)",
  podman: "Podman reads it at its next call",
  docker: "Docker reads it when it is told: systemctl reload docker",
};

/** What registering needs changed; `before` and `after` are equal when nothing is to be done. @throws InvalidRequest */
export function planRegistration(target: Target, place: Place): Change {
  const path = join(place.root, "/", pathOf[target]);
  const before = readIfThere(path);
  const note = readNote(target, place);
  switch (target) {
    case "crio":
    case "podman": {
      const after = template(place, target === "crio" ? "crio/50-cedana.conf" : "containers/50-cedana.conf");
      if (before !== undefined && before !== after && before !== note?.after)
        throw new InvalidRequest(
          `${path} is there already, and not as cedana setup wrote it: move it away, or change it by hand`,
        );
      return { path, before, after };
    }
    case "containerd":
      return { path, before, after: withBlock(path, before, place) };
    case "docker": {
      // What we have written ourselves is no runtime of somebody else's: it may be from where the programs were before.
      const theirs = note && before === note.after ? (note.before ?? undefined) : before;
      return { path, before, after: withDockerRuntimes(path, theirs, place) };
    }
  }
}

/** What taking it back needs changed. @throws InvalidRequest */
export function planUndo(target: Target, place: Place): Change {
  const path = join(place.root, "/", pathOf[target]);
  const before = readIfThere(path);
  const note = readNote(target, place);
  if (before === undefined) return { path, before, after: undefined };
  if (note && before === note.after) return { path, before, after: note.before ?? undefined };
  switch (target) {
    case "crio":
    case "podman":
      if (note === undefined) return { path, before, after: before }; // not ours
      throw new InvalidRequest(`${path} was changed after cedana setup wrote it: remove it by hand`);
    case "containerd":
      return { path, before, after: withoutBlock(path, before) };
    case "docker":
      return { path, before, after: withoutDockerRuntimes(path, before, place) };
  }
}

/** Writes what was planned, and what an undo needs to know. */
export function apply(target: Target, place: Place, change: Change, undo: boolean): void {
  const notePath = noteFile(target, place);
  if (undo) {
    const note = readNote(target, place);
    writeWhole(change.path, change.after);
    // Deepest first; one that somebody else uses by now stays.
    for (const directory of note?.madeDirectories.toReversed() ?? []) removeIfEmpty(directory);
    rmSync(notePath, { force: true });
    return;
  }
  const madeDirectories = change.before === undefined ? missingDirectories(dirname(change.path)) : [];
  const earlier = readNote(target, place);
  const untouched = earlier !== undefined && change.before === earlier.after;
  const note: Note = {
    version: 1,
    path: change.path,
    before: untouched ? earlier.before : (change.before ?? null),
    after: change.after!,
    madeDirectories: untouched ? earlier.madeDirectories : madeDirectories,
  };
  // The note first: an undo after a crash between the two finds the file as it was, which is what it wants.
  mkdirSync(dirname(notePath), { recursive: true, mode: 0o700 });
  writeRecordNow(notePath, note);
  mkdirSync(dirname(change.path), { recursive: true, mode: 0o755 });
  writeWhole(change.path, change.after);
}

/** The change as `diff -u` shows it. All of our changes are in one place of the file. */
export function unifiedDiff({ path, before, after }: Change): string {
  if (before === after) return "";
  const [old, now] = [before, after].map((text) =>
    text === undefined || text === "" ? [] : text.replace(/\n$/, "").split("\n"),
  );
  let start = 0;
  while (start < old!.length && start < now!.length && old![start] === now![start]) start++;
  let end = 0;
  while (end < old!.length - start && end < now!.length - start && old!.at(-1 - end) === now!.at(-1 - end))
    end++;
  const context = 3;
  const from = Math.max(0, start - context);
  const tail = Math.min(context, end);
  const removed = old!.slice(start, old!.length - end);
  const added = now!.slice(start, now!.length - end);
  const leading = old!.slice(from, start);
  const trailing = old!.slice(old!.length - end, old!.length - end + tail);
  const range = (lines: number) => `${lines === 0 ? from : from + 1},${lines}`;
  const common = leading.length + trailing.length;
  return [
    `--- ${before === undefined ? "/dev/null" : path}`,
    `+++ ${after === undefined ? "/dev/null" : path}`,
    `@@ -${range(common + removed.length)} +${range(common + added.length)} @@`,
    ...leading.map((line) => ` ${line}`),
    ...removed.map((line) => `-${line}`),
    ...added.map((line) => `+${line}`),
    ...trailing.map((line) => ` ${line}`),
    "",
  ].join("\n");
}

const pathOf: Record<Target, string> = {
  containerd: "etc/containerd/config.toml",
  crio: "etc/crio/crio.conf.d/50-cedana.conf",
  podman: "etc/containers/containers.conf.d/50-cedana.conf",
  docker: "etc/docker/daemon.json",
};

/** A file of packaging/, with the paths that our programs have here. */
function template(place: Place, name: string): string {
  return readFileSync(join(place.packaging, name), "utf8").replaceAll(
    /\/usr\/bin(?=\/(?:cedana|containerd-shim-cedana))/g,
    place.programs,
  );
}

// ---- containerd ----

type TomlTable = Record<string, unknown>;

function withBlock(path: string, before: string | undefined, place: Place): string {
  const rest = withoutBlock(path, before ?? "");
  const table = parse(path, rest);
  // A configuration without a version is of version 1, which has no runtimes like ours; an empty one may be of any.
  const version = Object.keys(table).length === 0 ? 2 : (table.version ?? 1);
  if (version !== 2 && version !== 3)
    throw new InvalidRequest(
      `${path} is of version ${version}; cedana setup knows versions 2 (containerd 1.x) and 3 (2.x): containerd config migrate`,
    );
  const plugin = version === 2 ? "io.containerd.grpc.v1.cri" : "io.containerd.cri.v1.runtime";
  if (member(table, ["plugins", plugin, "containerd", "runtimes", "cedana"]) !== undefined)
    throw new InvalidRequest(
      `${path} has a runtime "cedana" already, which cedana setup did not write: remove it first`,
    );
  const runc = version === 2 && losesRunc(member(table, ["plugins", plugin, "containerd"])) ? ["", RUNC] : [];
  const lines = template(place, `containerd/cedana-v${version}.toml`)
    .split("\n")
    .filter((line) => !/^version\s*=/.test(line));
  // Nothing but comments can stand before it then.
  const head = table.version === undefined ? [`version = ${version}`] : [];
  const block = [blockBegin, ...head, lines.join("\n").trim(), ...runc, blockEnd, ""].join("\n");
  const ended = rest === "" || rest.endsWith("\n") ? rest : `${rest}\n`;
  const after = `${ended}${ended === "" ? "" : "\n"}${block}`;
  try {
    parse(path, after);
  } catch (error) {
    throw new InvalidRequest(
      `${path} can't take the runtime as tables at its end (${(error as Error).message}): add what ${join(place.packaging, `containerd/cedana-v${version}.toml`)} says by hand`,
      { cause: error },
    );
  }
  return after;
}

const RUNC = `# containerd 1.x has a runtime of its own only as long as its configuration names none.
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"`;

/** Whether containerd 1.x's own runtime is the default one, and goes with the first that is named: its CRI plugin refuses to start then. */
function losesRunc(containerd: unknown): boolean {
  const { runtimes = {}, default_runtime_name: name } = (containerd ?? {}) as TomlTable;
  return Object.keys(runtimes as TomlTable).length === 0 && (name === undefined || name === "runc");
}

function withoutBlock(path: string, text: string): string {
  const begin = text.indexOf(blockBegin);
  if (begin < 0) return text;
  const end = text.indexOf(`${blockEnd}\n`, begin);
  if (end < 0) throw new InvalidRequest(`${path} has "${blockBegin}" without "${blockEnd}": mend it by hand`);
  const head = text.slice(0, begin);
  // The empty line before the block came with it.
  return `${head.endsWith("\n\n") ? head.slice(0, -1) : head}${text.slice(end + blockEnd.length + 1)}`;
}

function parse(path: string, text: string): TomlTable {
  try {
    return parseToml(text);
  } catch (error) {
    throw new InvalidRequest(`${path} is not TOML: ${(error as Error).message.split("\n")[0]}`, {
      cause: error,
    });
  }
}

function member(table: unknown, keys: readonly string[]): unknown {
  return keys.reduce<unknown>((value, key) => (value as TomlTable | undefined)?.[key], table);
}

// ---- Docker ----

type DockerConfig = Record<string, unknown> & { runtimes?: Record<string, unknown> };

function withDockerRuntimes(path: string, before: string | undefined, place: Place): string {
  const ours = JSON.parse(template(place, "docker/daemon.json")) as Required<DockerConfig>;
  const config = parseDocker(path, before);
  const theirs = config.runtimes ?? {};
  const missing = Object.entries(ours.runtimes).filter(([name, value]) => {
    if (theirs[name] === undefined) return true;
    if (JSON.stringify(theirs[name]) === JSON.stringify(value)) return false;
    throw new InvalidRequest(
      `${path} has a runtime ${JSON.stringify(name)} already, which is another: remove it first`,
    );
  });
  if (missing.length === 0) return before!;
  const after = { ...config, runtimes: { ...theirs, ...Object.fromEntries(missing) } };
  return `${JSON.stringify(after, undefined, indentOf(before))}\n`;
}

function withoutDockerRuntimes(path: string, before: string, place: Place): string {
  const ours = JSON.parse(template(place, "docker/daemon.json")) as Required<DockerConfig>;
  const config = parseDocker(path, before);
  const kept = Object.entries(config.runtimes ?? {}).filter(
    ([name, value]) => JSON.stringify(ours.runtimes[name]) !== JSON.stringify(value),
  );
  if (kept.length === Object.keys(config.runtimes ?? {}).length) return before;
  const { runtimes: _, ...rest } = config;
  const after = kept.length > 0 ? { ...config, runtimes: Object.fromEntries(kept) } : rest;
  return `${JSON.stringify(after, undefined, indentOf(before))}\n`;
}

function parseDocker(path: string, text: string | undefined): DockerConfig {
  if (text === undefined || text.trim() === "") return {};
  let config: unknown;
  try {
    config = JSON.parse(text);
  } catch (error) {
    throw new InvalidRequest(`${path} is not JSON: ${(error as Error).message}`, { cause: error });
  }
  const isObject = (value: unknown) => typeof value === "object" && value !== null && !Array.isArray(value);
  if (!isObject(config)) throw new InvalidRequest(`${path} is not a JSON object`);
  const { runtimes } = config as DockerConfig;
  if (runtimes !== undefined && !isObject(runtimes))
    throw new InvalidRequest(`${path}: "runtimes" is not an object`);
  return config as DockerConfig;
}

/** The indentation of the first line that has one. */
function indentOf(text: string | undefined): string {
  return /^([ \t]+)\S/m.exec(text ?? "")?.[1] ?? "  ";
}

// ---- files ----

function noteFile(target: Target, place: Place): string {
  return join(place.root, "/", place.stateDirectory, "setup", `${target}.json`);
}

function readNote(target: Target, place: Place): Note | undefined {
  return readRecordNow<Note>(noteFile(target, place));
}

function readIfThere(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw SyscallFailed.from(error);
  }
}

/** The whole file or the old one; owner and mode stay, and a link stays a link. */
function writeWhole(path: string, text: string | undefined): void {
  if (text === undefined) {
    rmSync(path, { force: true });
    return;
  }
  const file = realIfThere(path);
  const old = file === undefined ? undefined : statSync(file);
  const target = file ?? path;
  writeFileSync(`${target}.cedana-new`, text, { mode: 0o644 });
  if (old) {
    chmodSync(`${target}.cedana-new`, old.mode & 0o7777);
    chownSync(`${target}.cedana-new`, old.uid, old.gid);
  }
  renameSync(`${target}.cedana-new`, target);
}

function realIfThere(path: string): string | undefined {
  try {
    return realpathSync(path);
  } catch {
    return undefined; // ENOENT: it will be made
  }
}

function missingDirectories(path: string): string[] {
  if (realIfThere(path) !== undefined) return [];
  return [...missingDirectories(dirname(path)), path];
}

function removeIfEmpty(directory: string): void {
  try {
    rmdirSync(directory);
  } catch {
    // ENOTEMPTY: somebody uses it; ENOENT: somebody was quicker
  }
}
