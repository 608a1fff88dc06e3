import { execFile } from "node:child_process";
import { realpathSync } from "node:fs";
import { basename, isAbsolute } from "node:path";
import { promisify } from "node:util";
import { InvalidRequest, Unavailable, Unsupported } from "../errors/index.ts";
import { fileIdentity } from "../linux/file-identity.ts";

// The engines, runc and crun: command lines for the keeper to run, and what a binary can do. Nothing is executed
// here but `--version` and `--help`, once for each binary.
//
// Command lines are what containerd's own shim would give (go-runc), so that a container begun by the one can be gone
// on with by the other: same root, same flags. What an engine lacks is refused by name, never left out silently.

/** Where containerd's shim for runc keeps the engines' state, by containerd namespace below it. */
const defaultRuncRoot = "/run/containerd/runc";

/** One program to run, with the environment of whoever runs it, and `env` (`NAME=value`) besides. */
export interface EngineCommand {
  readonly argv: string[];
  readonly env?: string[];
}

export type EngineName = "runc" | "crun";

/** Options of an engine that not every version has; found out from `--help`. */
export interface EngineFeatures {
  readonly name: EngineName;
  /** As `--version` says it. */
  readonly version: string;
  /** Long option names of `checkpoint` and `restore`, without dashes. */
  readonly checkpoint: ReadonlySet<string>;
  readonly restore: ReadonlySet<string>;
}

export interface EngineOptions {
  /** Name or path, default "runc". */
  readonly binary?: string | undefined;
  /** Root of the engine's state, default /run/containerd/runc; the containerd namespace is a directory below it. */
  readonly root?: string | undefined;
  readonly systemdCgroup?: boolean | undefined;
  /** containerd's namespace. */
  readonly namespace: string;
  /** What the binary can do, from `engineVersion`. Default: what the oldest version we support can do. */
  readonly features?: EngineFeatures | undefined;
}

/** For every command: the container and the file that the engine logs to. */
interface Common {
  readonly id: string;
  readonly logFile: string;
}

export interface CreateCommand extends Common {
  readonly bundle: string;
  readonly pidFile: string;
  readonly consoleSocket?: string | undefined;
  readonly noPivot?: boolean | undefined;
  readonly noNewKeyring?: boolean | undefined;
}

export interface ExecCommand extends Common {
  /** JSON file of the OCI process. */
  readonly processFile: string;
  readonly pidFile: string;
  readonly consoleSocket?: string | undefined;
  readonly detach?: boolean | undefined;
}

/** What CRIU is told, at a dump and at a restore alike. */
interface CriuOptions {
  readonly imagePath: string;
  /** CRIU's log and scratch; must exist. */
  readonly workPath?: string | undefined;
  readonly tcpEstablished?: boolean | undefined;
  readonly extUnixSockets?: boolean | undefined;
  /** The container's terminal, or session leader, is outside of it. */
  readonly shellJob?: boolean | undefined;
  readonly fileLocks?: boolean | undefined;
  readonly emptyNamespaces?: readonly string[] | undefined;
  readonly cgroupsMode?: string | undefined;
  /** A file of options for CRIU itself, past the engine: see `criuConfig`. */
  readonly criuConfigFile?: string | undefined;
}

export interface CheckpointOptions extends CriuOptions {
  /** Images of an earlier pre-dump: relative to `imagePath`. */
  readonly parentPath?: string | undefined;
  readonly leaveRunning?: boolean | undefined;
  /** By flag where the engine has one, else `criuConfigFile` must say `skip-in-flight`. */
  readonly tcpSkipInFlight?: boolean | undefined;
  readonly preDump?: boolean | undefined;
}

export interface RestoreOptions extends CriuOptions {
  /** Connections come back closed. By flag where the engine has one, else `criuConfigFile` must say `tcp-close`. */
  readonly tcpClose?: boolean | undefined;
  /** A page daemon that listens in `workPath` fills the memory. By flag where the engine has one, else `criuConfigFile` must say it. */
  readonly lazyPages?: boolean | undefined;
  readonly lsmProfile?: string | undefined;
  readonly lsmMountContext?: string | undefined;
}

export type CheckpointCommand = Common & CheckpointOptions;

export interface RestoreCommand extends Common, RestoreOptions {
  readonly bundle: string;
  readonly pidFile: string;
  readonly detach?: boolean | undefined;
  readonly consoleSocket?: string | undefined;
  readonly noPivot?: boolean | undefined;
  readonly noSubreaper?: boolean | undefined;
  /** Without effect: a restored process has the keyring that CRIU gives it, no engine's `restore` makes one. */
  readonly noNewKeyring?: boolean | undefined;
}

// The oldest versions that we support: runc 1.1 and crun 1.8. Options that came later are asked for by `--help`.
const commonCriuOptions = [
  ..."image-path work-path tcp-established ext-unix-sk shell-job file-locks manage-cgroups-mode".split(" "),
];
const leastFeatures: Record<EngineName, Omit<EngineFeatures, "name" | "version">> = {
  runc: {
    checkpoint: new Set([
      ...commonCriuOptions,
      ..."parent-path leave-running lazy-pages status-fd page-server pre-dump empty-ns auto-dedup".split(" "),
    ]),
    restore: new Set([
      ...commonCriuOptions,
      ..."console-socket bundle detach pid-file no-subreaper no-pivot empty-ns auto-dedup lazy-pages".split(
        " ",
      ),
    ]),
  },
  crun: {
    checkpoint: new Set([
      ...commonCriuOptions,
      ..."parent-path leave-running pre-dump network-lock".split(" "),
    ]),
    restore: new Set([
      ...commonCriuOptions,
      ..."console-socket bundle detach pid-file network-lock".split(" "),
    ]),
  },
};

/** An engine with its state directory: builds command lines. */
export class Engine {
  readonly binary: string;
  readonly name: EngineName;
  readonly root: string;
  readonly systemdCgroup: boolean;
  readonly features: EngineFeatures;

  constructor(options: EngineOptions) {
    this.binary = options.binary || "runc";
    this.name = engineName(this.binary);
    this.root = `${(options.root || defaultRuncRoot).replace(/\/+$/, "")}/${options.namespace}`;
    this.systemdCgroup = options.systemdCgroup ?? false;
    this.features = options.features ?? { name: this.name, version: "", ...leastFeatures[this.name] };
    // A wrapper's file may have any name; what it says of itself counts.
    if (options.features) this.name = options.features.name;
  }

  create(options: CreateCommand): EngineCommand {
    return this.#command(options, "create", [
      "--bundle",
      absolute("bundle", options.bundle),
      "--pid-file",
      absolute("pid file", options.pidFile),
      ...(options.consoleSocket ? ["--console-socket", options.consoleSocket] : []),
      ...(options.noPivot ? ["--no-pivot"] : []),
      ...(options.noNewKeyring ? ["--no-new-keyring"] : []),
    ]);
  }

  start(options: Common): EngineCommand {
    return this.#command(options, "start", []);
  }

  exec(options: ExecCommand): EngineCommand {
    return this.#command(options, "exec", [
      "--process",
      absolute("process file", options.processFile),
      ...(options.consoleSocket ? ["--console-socket", options.consoleSocket] : []),
      ...((options.detach ?? true) ? ["--detach"] : []),
      "--pid-file",
      absolute("pid file", options.pidFile),
    ]);
  }

  /** @param options.force  kills what still runs, and succeeds when there is no such container */
  delete(options: Common & { readonly force?: boolean | undefined }): EngineCommand {
    return this.#command(options, "delete", options.force ? ["--force"] : []);
  }

  kill(options: Common & { readonly signal: number; readonly all?: boolean | undefined }): EngineCommand {
    return this.#command(options, "kill", options.all ? ["--all"] : [], [String(options.signal)]);
  }

  /** @param options.resourcesFile  JSON file of the OCI LinuxResources */
  update(options: Common & { readonly resourcesFile: string }): EngineCommand {
    return this.#command(options, "update", [
      "--resources",
      absolute("resources file", options.resourcesFile),
    ]);
  }

  /**
   * Success without `leaveRunning` ends the container; both engines forget it then by themselves at `delete`.
   * @throws Unsupported naming an option that this engine lacks
   */
  checkpoint(options: CheckpointCommand): EngineCommand {
    if (options.parentPath && isAbsolute(options.parentPath))
      throw new InvalidRequest(`parent path ${options.parentPath} is absolute; the engines want it relative`);
    const arguments_ = this.#criuOptions("checkpoint", options, [
      ["parent-path", options.parentPath],
      ["leave-running", options.leaveRunning],
      ["pre-dump", options.preDump],
      [
        "tcp-skip-in-flight",
        options.tcpSkipInFlight && this.#flagOrConfig("checkpoint", "tcp-skip-in-flight", options),
      ],
    ]);
    return withCriuConfig(options.criuConfigFile, this.#command(options, "checkpoint", arguments_));
  }

  /**
   * @throws Unsupported naming an option that this engine lacks
   */
  restore(options: RestoreCommand): EngineCommand {
    const arguments_ = this.#criuOptions("restore", options, [
      ["tcp-close", options.tcpClose && this.#flagOrConfig("restore", "tcp-close", options)],
      ["lazy-pages", options.lazyPages && this.#flagOrConfig("restore", "lazy-pages", options)],
      ["lsm-profile", options.lsmProfile],
      ["lsm-mount-context", options.lsmMountContext],
      ["bundle", absolute("bundle", options.bundle)],
      ["detach", options.detach ?? true],
      ["pid-file", absolute("pid file", options.pidFile)],
      ["console-socket", options.consoleSocket],
      ["no-pivot", options.noPivot],
      // crun never makes itself a subreaper, so there is nothing to forbid.
      ["no-subreaper", this.name === "runc" && (options.noSubreaper ?? true)],
    ]);
    return withCriuConfig(options.criuConfigFile, this.#command(options, "restore", arguments_));
  }

  // Whether a flag is to be given; without it in this version, CRIU's own configuration has to say the same.
  #flagOrConfig(command: "checkpoint" | "restore", flag: string, options: CriuOptions): boolean {
    return this.features[command].has(flag) || options.criuConfigFile === undefined;
  }

  // Options of CRIU that both commands have, then those of the one.
  #criuOptions(
    command: "checkpoint" | "restore",
    options: CheckpointOptions | RestoreOptions,
    more: readonly (readonly [name: string, value: string | boolean | undefined])[],
  ): string[] {
    const wanted: readonly (readonly [string, string | boolean | undefined])[] = [
      ["image-path", absolute("image path", options.imagePath)],
      ["work-path", options.workPath && absolute("work path", options.workPath)],
      ["tcp-established", options.tcpEstablished],
      ["ext-unix-sk", options.extUnixSockets],
      ["shell-job", options.shellJob],
      ["file-locks", options.fileLocks],
      ["manage-cgroups-mode", options.cgroupsMode],
      ...(options.emptyNamespaces ?? []).map((namespace) => ["empty-ns", namespace] as const),
      ...more,
    ];
    const arguments_: string[] = [];
    for (const [name, value] of wanted) {
      if (!value) continue;
      if (!this.features[command].has(name)) throw new Unsupported(`${this.#who} ${command} --${name}`);
      arguments_.push(`--${name}`, ...(value === true ? [] : [value]));
    }
    return arguments_;
  }

  get #who(): string {
    return this.features.version ? `${this.name} ${this.features.version}` : this.name;
  }

  #command(common: Common, command: string, options: string[], after: string[] = []): EngineCommand {
    const global = [
      "--root",
      this.root,
      "--log",
      absolute("log file", common.logFile),
      "--log-format",
      "json",
    ];
    if (this.systemdCgroup) global.push("--systemd-cgroup");
    return { argv: [this.binary, ...global, command, ...options, checkId(common.id), ...after] };
  }
}

/** By the file's name, for want of better: `/opt/crun-1.9` is a crun; what isn't recognised is treated as runc. */
export function engineName(binary: string): EngineName {
  return basename(binary).startsWith("crun") ? "crun" : "runc";
}

// Engines would take a leading dash for an option, and a slash or ".." for a path below their root.
function checkId(id: string): string {
  if (!/^[\w+.][\w+.-]*$/.test(id) || id === "." || id === "..")
    throw new InvalidRequest(`container id ${JSON.stringify(id)} has characters that the engines refuse`);
  return id;
}

function absolute(what: string, path: string): string {
  if (!isAbsolute(path)) throw new InvalidRequest(`${what} ${JSON.stringify(path)} is not an absolute path`);
  return path;
}

function withCriuConfig(configFile: string | undefined, { argv }: EngineCommand): EngineCommand {
  if (configFile === undefined) return { argv };
  return { argv, env: [`CRIU_CONFIG_FILE=${absolute("CRIU configuration file", configFile)}`] };
}

const run = promisify(execFile);

// By file: an upgrade writes a new one. Only a success is remembered.
const featuresByFile = new Map<string, Promise<EngineFeatures>>();

/**
 * Asks an engine's binary what it is and what it can do; remembered as long as the file stays the same.
 * @param binary  name (looked up in PATH) or path
 * @throws Unavailable when it can't be run
 */
export async function engineVersion(binary: string): Promise<EngineFeatures> {
  const path = await findBinary(binary);
  const key = `${path} ${fileIdentity(path)}`;
  let found = featuresByFile.get(key);
  if (!found) {
    found = askFeatures(path);
    featuresByFile.set(key, found);
    found.catch(() => featuresByFile.delete(key));
  }
  return found;
}

async function askFeatures(path: string): Promise<EngineFeatures> {
  const ask = async (...arguments_: string[]) => {
    try {
      return (await run(path, arguments_, { timeout: 10_000 })).stdout;
    } catch (err) {
      throw new Unavailable(`${path} ${arguments_.join(" ")} failed: ${(err as Error).message}`, {
        cause: err,
      });
    }
  };
  const [version, checkpoint, restore] = await Promise.all([
    ask("--version"),
    ask("checkpoint", "--help"),
    ask("restore", "--help"),
  ]);
  return {
    ...parseVersion(version, path),
    checkpoint: longOptions(checkpoint),
    restore: longOptions(restore),
  };
}

/** First line of `--version`: `runc version 1.1.15+ds1`, `crun version 1.21`. */
export function parseVersion(text: string, path: string): { name: EngineName; version: string } {
  const [, name, version] = /^(\S+) version (\S+)/m.exec(text) ?? [];
  if (version === undefined)
    throw new Unavailable(`${path} --version says nothing that looks like a version`);
  return { name: engineName(name!), version };
}

/** Option names in the text of `--help`, as urfave/cli (runc) and argp (crun) print it. */
export function longOptions(help: string): Set<string> {
  return new Set([...help.matchAll(/^\s+(?:-\S, )?--([a-z][a-z0-9-]+)/gm)].map((found) => found[1]!));
}

/** @throws Unavailable */
export async function findBinary(binary: string): Promise<string> {
  const directories = (
    process.env.PATH ?? "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
  ).split(":");
  const candidates = binary.includes("/")
    ? [binary]
    : directories.map((directory) => `${directory}/${binary}`);
  for (const candidate of candidates) {
    try {
      return realpathSync.native(candidate); // at once: it is looked up at each checkpoint and restore
    } catch {
      // ENOENT: not there
    }
  }
  throw new Unavailable(`engine ${binary} is not installed`);
}
