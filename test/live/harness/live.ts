// A private containerd, and everything that tests and benchmarks do with it.

import { type ChildProcess, execFile, execFileSync, spawn } from "node:child_process";
import {
  closeSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  writeFileSync,
} from "node:fs";
import { basename, join } from "node:path";
import { promisify } from "node:util";
import { cleanUp } from "./cleanup.ts";
import { ContainerdClient, type Descriptor, type Mount } from "./client.ts";
import { containerdConfig } from "./containerd-config.ts";
import { EventLog } from "./events.ts";
import { IMAGE, imageTar, pauseImageTar, programs, repository } from "./programs.ts";
import { type Any, anyOf } from "./proto.ts";
import { containerSpec, type SpecOptions } from "./spec.ts";
import {
  cgroupRoots,
  cgroupsOf,
  entries,
  fdsOf,
  isAlive,
  mountsBelow,
  type ProcessInfo,
  processesOf,
} from "./system.ts";
import { LiveTask, Stdio, type StdioOptions } from "./task.ts";
import { until } from "./until.ts";

const run = promisify(execFile);

export type ContainerdVersion = "1.6" | "1.7" | "2.1";
export type EngineName = "runc" | "crun";

export interface LiveOptions {
  containerd?: ContainerdVersion;
  engine?: EngineName;
  /** `v2`: a mount namespace in which /sys/fs/cgroup is cgroup v2 only; crun needs it on a hybrid host */
  cgroup?: "host" | "v2";
  /** runtime name; default CEDANA_TEST_RUNTIME, else ours */
  runtime?: string;
  /** Kubernetes' interface, with our shim as runtime handler: by its runtime type, or by its path under the type of the Go shim */
  cri?: false | "type" | "path";
  /** of that runtime handler: systemd makes the cgroups */
  systemdCgroup?: boolean;
  env?: Record<string, string>;
  /** a directory that goes before the others in PATH */
  path?: string;
  /** containerd's, of the test image and of containers */
  snapshotter?: "overlayfs" | "native" | "blockfile";
  /** containerd's, and its shims': `debug` makes them say more than they do in normal service */
  logLevel?: "debug" | "info";
}

export const OURS = "io.containerd.cedana.v2";
/** The namespace of containerd's CRI service. */
export const CRI_NAMESPACE = "k8s.io";
export const GO_SHIM = "io.containerd.runc.v2";
/** Runtime handlers as Kubernetes' runtime classes name them. */
export const liveRuntimes = { cri: "cedana" } as const;
export const runtimeUnderTest = process.env.CEDANA_TEST_RUNTIME ?? OURS;
/** The suite runs against the Go shim, to prove the tests right. */
export const isControl = runtimeUnderTest === GO_SHIM;

/** Where a containerd's binaries are; undefined when this machine has none of that version. */
export function containerdBinaries(version: ContainerdVersion): string | undefined {
  const candidates = ["/usr/bin", "/usr/local/bin"];
  for (const name of entries("/var/cache/cedana").filter((name) => name.startsWith(`containerd-${version}`)))
    candidates.unshift(join("/var/cache/cedana", name, "usr/bin"));
  return candidates.find((directory) => {
    const binary = join(directory, "containerd");
    if (!existsSync(binary)) return false;
    const text = execFileSync(binary, ["--version"], { encoding: "utf8" });
    return new RegExp(`\\s${version.replace(".", "\\.")}\\.`).test(text);
  });
}

export interface RunOptions extends Omit<SpecOptions, "args">, StdioOptions {
  id?: string;
  /** options of the runtime instead of those that name the engine */
  runtimeOptions?: Any;
  /** checkpoint in the content store that the task is created from */
  checkpoint?: Descriptor;
  /** directory of CRIU images that the task is created from */
  criuImagePath?: string;
  /** runtime name instead of the instance's, and the shim's program where it isn't what the name says */
  runtime?: string;
  runtimePath?: string;
  /** further mounts of the root file system, after the snapshot's */
  rootfs?: Mount[];
  /** false: no snapshot below `rootfs` */
  snapshot?: boolean;
  /** false: containerd isn't told of the container's snapshot */
  recordSnapshot?: boolean;
  /** the text of config.json */
  rawSpec?: string;
}

interface Baseline {
  fds: Map<number, number>;
}

/** Fds that a daemon may keep more than before: lazily opened files of its own. What names a container is never among them. */
const FD_SLACK = 4;

export class Live {
  readonly options: Required<Omit<LiveOptions, "env">> & { env: Record<string, string> };
  readonly dir: string;
  readonly namespace: string;
  readonly address: string;
  readonly runDir: string;
  readonly ioDir: string;
  readonly binaries: string;
  readonly programs: string;
  client!: ContainerdClient;
  events!: EventLog;
  #child: ChildProcess | undefined;
  #containerdPid = 0;
  #reaper: ChildProcess | undefined;
  #ids = 0;
  #baseline: Baseline = { fds: new Map() };
  #chainId = "";

  private constructor(options: LiveOptions, binaries: string, programsDir: string) {
    const engine = options.engine ?? "runc";
    this.options = {
      containerd: options.containerd ?? "1.7",
      engine,
      cgroup:
        options.cgroup ??
        (engine === "crun" && !existsSync("/sys/fs/cgroup/cgroup.controllers") ? "v2" : "host"),
      runtime: options.runtime ?? runtimeUnderTest,
      cri: options.cri ?? false,
      systemdCgroup: options.systemdCgroup ?? false,
      env: options.env ?? {},
      path: options.path ?? "",
      snapshotter: options.snapshotter ?? "overlayfs",
      logLevel: options.logLevel ?? "debug",
    };
    this.binaries = binaries;
    this.programs = programsDir;
    // Short: paths of unix sockets end at 107 bytes, and a shim's has 64 digits of hash.
    this.dir = mkdtempSync("/run/cl-");
    this.namespace = basename(this.dir).toLowerCase();
    this.address = join(this.dir, "c.sock");
    this.runDir = join(this.dir, "run");
    this.ioDir = join(this.dir, "io");
  }

  static async start(options: LiveOptions = {}): Promise<Live> {
    const version = options.containerd ?? "1.7";
    const binaries = containerdBinaries(version);
    if (!binaries) throw new Error(`no containerd ${version} on this machine: run \`npm run setup\``);
    const runtime = options.runtime ?? runtimeUnderTest;
    if (runtime === OURS && !existsSync(join(repository, "bin/containerd-shim-cedana-v2")))
      throw new Error("bin/containerd-shim-cedana-v2 is missing: run `npm run build`");
    const live = new Live(options, binaries, await programs());
    try {
      live.#prepare();
      await live.startContainerd();
      await live.#importImage();
      live.takeBaseline();
    } catch (error) {
      await live.stop();
      throw error;
    }
    return live;
  }

  /** The name of the test image. */
  get image(): string {
    return IMAGE;
  }

  get isOurs(): boolean {
    return this.options.runtime === OURS;
  }

  get containerdPid(): number {
    return this.#containerdPid;
  }

  #prepare(): void {
    this.#reaper = spawn(
      process.execPath,
      [join(import.meta.dirname, "reaper.ts"), this.dir, this.namespace],
      {
        stdio: ["pipe", "ignore", "inherit"],
        detached: true,
      },
    );
    this.#reaper.unref();
    (this.#reaper.stdin as unknown as { unref(): void }).unref();
    // In memory: the disk of a test machine says nothing about the shim.
    execFileSync("mount", ["-t", "tmpfs", "-o", "size=8g,mode=711", "cedana-live", this.dir]);
    for (const name of ["run", "io", "tmp", "var"]) mkdirSync(join(this.dir, name), { mode: 0o700 });
    const { cri, engine, logLevel, snapshotter, systemdCgroup } = this.options;
    const byPath = cri === "path";
    const config = containerdConfig({
      dir: this.dir,
      address: this.address,
      logLevel,
      snapshotter,
      cri: cri
        ? {
            handler: liveRuntimes.cri,
            type: byPath ? GO_SHIM : OURS,
            path: byPath ? join(repository, "bin/containerd-shim-cedana-v2") : undefined,
            engine,
            engineRoot: this.engineRoot,
            systemdCgroup,
          }
        : undefined,
    });
    writeFileSync(join(this.dir, "config.toml"), config);
  }

  /** Where the engine keeps its containers, for runtimes that are told so. */
  get engineRoot(): string {
    return join(this.dir, "engine");
  }

  /** Environment of containerd, which its shims inherit. */
  environment(extra: Record<string, string> = {}): Record<string, string> {
    return {
      PATH: [
        ...(this.options.path ? [this.options.path] : []),
        join(repository, "bin"),
        this.binaries,
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
      ].join(":"),
      HOME: "/root",
      TMPDIR: join(this.dir, "tmp"),
      CEDANA_RUN_DIR: this.runDir,
      CEDANA_STATE_DIR: join(this.dir, "var"),
      CEDANA_CRIU_CACHE: "off", // it would be the machine's
      ...this.options.env,
      ...extra,
    };
  }

  /** Starts containerd (again), and subscribes to its events. */
  async startContainerd(env: Record<string, string> = {}): Promise<void> {
    const log = openSync(join(this.dir, "containerd.log"), "a", 0o600);
    const command = [join(this.binaries, "containerd"), "--config", join(this.dir, "config.toml")];
    const inNamespace = `mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec "$@"`;
    const argv =
      this.options.cgroup === "host"
        ? command
        : ["unshare", "--mount", "--propagation", "private", "sh", "-c", inNamespace, "sh", ...command];
    const child = spawn(argv[0]!, argv.slice(1), {
      env: this.environment(env),
      stdio: ["ignore", log, log],
      cwd: this.dir,
      detached: true,
    });
    closeSync(log);
    child.unref();
    this.#child = child;
    this.#containerdPid = child.pid!;
    const client = new ContainerdClient(this.address, this.namespace);
    try {
      await until(
        () => {
          if (child.exitCode !== null || child.signalCode !== null)
            throw new Error(`containerd has ended:\n${this.containerdLog().slice(-2000)}`);
          return client.version(1_000).then(
            () => true,
            () => false,
          );
        },
        {
          timeoutMs: 20_000,
          everyMs: 20,
          what: () => `containerd's socket:\n${this.containerdLog().slice(-2000)}`,
        },
      );
    } catch (error) {
      client.close();
      throw error;
    }
    this.client?.close();
    this.client = client;
    const earlier = this.events?.all ?? [];
    this.events?.close();
    this.events = new EventLog(client);
    this.events.all.push(...earlier);
    await this.events.open();
  }

  /** Ends containerd and waits until it is gone. Shims and containers go on. */
  async stopContainerd(signal: NodeJS.Signals = "SIGKILL"): Promise<void> {
    const child = this.#child;
    if (!child || child.exitCode !== null || child.signalCode !== null) return;
    const gone = new Promise((resolve) => child.once("exit", resolve));
    child.kill(signal);
    await gone;
    this.#child = undefined;
  }

  containerdLog(): string {
    try {
      return readFileSync(join(this.dir, "containerd.log"), "utf8");
    } catch {
      return "";
    }
  }

  cedanadLog(): string {
    try {
      return readFileSync(join(this.runDir, "cedanad.log"), "utf8");
    } catch {
      return "";
    }
  }

  async #importImage(): Promise<void> {
    const { containerd, snapshotter } = this.options;
    // 2.x imports by its transfer service, which unpacks for the snapshotter of its configuration alone.
    const local = containerd === "2.1" && snapshotter !== "overlayfs" ? ["--local"] : [];
    await this.ctr("images", "import", ...local, "--snapshotter", snapshotter, await imageTar());
    if (this.options.cri)
      for (const tar of [await imageTar(), await pauseImageTar()])
        await this.ctr("--namespace", CRI_NAMESPACE, "images", "import", tar);
    const image = await this.client.images.get(IMAGE);
    // The manifest may be behind an index. One layer: its diff id is the chain id of the snapshot.
    let blob = JSON.parse((await this.client.readContent(image.target.digest)).toString());
    if (blob.manifests)
      blob = JSON.parse((await this.client.readContent(blob.manifests[0].digest)).toString());
    const config = JSON.parse((await this.client.readContent(blob.config.digest)).toString());
    this.#chainId = config.rootfs.diff_ids[0];
  }

  /** Runs containerd's own client and returns what it printed; rejects when it fails. */
  async ctr(...args: string[]): Promise<string> {
    return (await this.ctrCommand(args)).stdout;
  }

  /** What runs a command where containerd's containers see their cgroups. */
  #enter(): string[] {
    return this.options.cgroup === "v2" ? ["nsenter", `--mount=/proc/${this.#containerdPid}/ns/mnt`] : [];
  }

  /** Runs the engine's own command on the containers of this containerd. */
  async engine(...args: string[]): Promise<string> {
    const root = `/run/containerd/runc/${this.namespace}`;
    const [file, ...rest] = [...this.#enter(), this.options.engine, "--root", root, ...args];
    return (await run(file!, rest, { env: { PATH: this.environment().PATH! } })).stdout;
  }

  /** The command line of this containerd's cedanad. @returns its stdout */
  async cedana(...args: string[]): Promise<string> {
    const [file, ...rest] = [...this.#enter(), join(repository, "bin/cedana"), ...args];
    return (await run(file!, rest, { env: this.environment(), maxBuffer: 64 * 1024 * 1024 })).stdout;
  }

  ctrArgv(args: string[]): string[] {
    return [
      ...this.#enter(),
      join(this.binaries, "ctr"),
      "--address",
      this.address,
      "--namespace",
      this.namespace,
      ...args,
    ];
  }

  async ctrCommand(args: string[], { timeoutMs = 60_000 } = {}): Promise<{ stdout: string; stderr: string }> {
    const [file, ...rest] = this.ctrArgv(args);
    return await run(file!, rest, {
      timeout: timeoutMs,
      maxBuffer: 256 << 20,
      env: { PATH: this.environment().PATH!, TMPDIR: join(this.dir, "tmp"), HOME: "/root" },
    });
  }

  /** `ctr run` flags that choose the runtime and the engine. */
  ctrRuntimeFlags(runtime = this.options.runtime): string[] {
    const flags = ["--runtime", runtime];
    if (this.options.engine === "runc") return flags;
    if (runtime === GO_SHIM) return [...flags, "--runc-binary", this.options.engine];
    // ctr passes runc's options only to io.containerd.runc.v2; others get a file.
    const path = join(this.dir, "options.toml");
    writeFileSync(path, `BinaryName = "${this.options.engine}"\n`);
    return [...flags, "--runtime-config-path", path];
  }

  newId(prefix = "c"): string {
    return `${prefix}${++this.#ids}`;
  }

  /** The runtime's options that name the engine. */
  engineOptions(more: Record<string, unknown> = {}): Any {
    return anyOf("containerd.runc.v1.Options", {
      ...(this.options.engine !== "runc" && { binaryName: this.options.engine }),
      ...more,
    });
  }

  bundleOf(id: string): string {
    return join(this.dir, "state/io.containerd.runtime.v2.task", this.namespace, id);
  }

  /** Makes container and snapshot, and returns the mounts of its root file system. */
  async createContainer(args: string[], options: RunOptions & { id: string }): Promise<Mount[]> {
    const spec = containerSpec({
      ...options,
      args,
      cgroupsPath: `/${this.namespace}/${options.id}`,
      programs: this.programs,
    });
    const mounts = await this.client.snapshots.prepare(this.options.snapshotter, options.id, this.#chainId);
    try {
      await this.client.containers.create({
        id: options.id,
        image: IMAGE,
        spec: {
          typeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Spec",
          value: Buffer.from(options.rawSpec ?? JSON.stringify(spec)),
        },
        runtime: {
          name: options.runtime ?? this.options.runtime,
          options: options.runtimeOptions ?? this.engineOptions(),
        },
        snapshotter: this.options.snapshotter,
        snapshotKey: options.recordSnapshot === false ? "" : options.id,
      });
    } catch (error) {
      await this.client.snapshots.remove(this.options.snapshotter, options.id).catch(() => {});
      throw error;
    }
    return mounts;
  }

  async removeContainer(id: string): Promise<void> {
    await this.client.containers.delete(id).catch(() => {});
    await this.client.snapshots.remove(this.options.snapshotter, id).catch(() => {});
  }

  /** Creates a task and leaves it CREATED. On failure nothing of it is left but what the shim leaks. */
  async create(args: string[], options: RunOptions = {}): Promise<LiveTask> {
    const id = options.id ?? this.newId();
    const io = new Stdio(this.ioDir, options);
    try {
      const mounts = await this.createContainer(args, { ...options, id });
      const runtimeOptions =
        options.runtimeOptions ??
        this.engineOptions(
          options.criuImagePath !== undefined ? { criuImagePath: options.criuImagePath } : {},
        );
      const task = new LiveTask(this, id, io);
      task.pid = (
        await this.client.tasks.create({
          containerId: id,
          rootfs: [...(options.snapshot === false ? [] : mounts), ...(options.rootfs ?? [])],
          stdin: io.stdinPath,
          stdout: io.stdoutPath,
          stderr: io.stderrPath,
          terminal: options.terminal ?? false,
          options: runtimeOptions,
          ...(options.checkpoint && { checkpoint: options.checkpoint }),
          ...(options.runtimePath && { runtimePath: options.runtimePath }),
        })
      ).pid;
      return task;
    } catch (error) {
      await this.removeContainer(id);
      await io.close();
      throw error;
    }
  }

  /** Creates and starts. */
  async run(args: string[], options: RunOptions = {}): Promise<LiveTask> {
    const task = await this.create(args, options);
    try {
      await task.start();
    } catch (error) {
      await task.destroy().catch(() => {});
      throw error;
    }
    return task;
  }

  /** Runs to the end, deletes, and returns what came out. */
  async runToEnd(
    args: string[],
    options: RunOptions = {},
  ): Promise<{ id: string; status: number; stdout: string }> {
    const task = await this.run(args, options);
    try {
      const { exitStatus } = await task.exited!;
      const deleted = await task.delete();
      if (deleted !== exitStatus) throw new Error(`Wait said ${exitStatus}, Delete ${deleted}`);
      await task.io.stdout?.end();
      return { id: task.id, status: exitStatus, stdout: task.io.stdout?.text ?? "" };
    } finally {
      await task.destroy();
    }
  }

  /** A task that goes on where the images were taken, with the same arguments as the one that was dumped. */
  async restore(imagePath: string, args: string[], options: RunOptions = {}): Promise<LiveTask> {
    return await this.run(args, { ...options, criuImagePath: imagePath });
  }

  // --- what is there ---

  processes(): ProcessInfo[] {
    return processesOf(this);
  }
  /** Keepers, or the Go shim's processes. */
  shims(): ProcessInfo[] {
    return this.processes().filter((info) => info.kind === "shim" && info.state !== "Z");
  }
  /** A keeper forks to start an engine or a cedanad: until its execve the child looks like a second keeper, so it is looked at again. */
  shimOf(id: string): ProcessInfo {
    let found: ProcessInfo[] = [];
    for (let looks = 0; looks < 20 && found.length !== 1; looks++)
      found = this.shims().filter((info) => info.argv[info.argv.indexOf("-id") + 1] === id);
    if (found.length !== 1)
      throw new Error(
        `${found.length} shims of ${id}; there are: ${this.shims().map((info) => info.argv.join(" "))}`,
      );
    return found[0]!;
  }
  cedanad(): ProcessInfo | undefined {
    const found = this.processes().filter((info) => info.kind === "cedanad" && info.state !== "Z");
    const pid = this.#cedanadPid();
    return found.find((info) => info.pid === pid) ?? found[0];
  }
  #cedanadPid(): number {
    for (const name of entries(this.runDir).filter((name) => /^cedanad.*\.pid$/.test(name)))
      return Number(readFileSync(join(this.runDir, name), "utf8").trim());
    return 0;
  }
  /** Waits for a cedanad, kills it, and returns its pid. */
  async killCedanad(signal: NodeJS.Signals = "SIGKILL"): Promise<number> {
    const { pid } = await until(() => this.cedanad(), { what: () => "a running cedanad" });
    try {
      process.kill(pid, signal);
    } catch {
      // it was quicker
    }
    await until(() => !isAlive(pid), { what: () => `the end of cedanad ${pid}` });
    return pid;
  }

  // --- leftovers ---

  /** From here on `expectNoLeftovers` compares with what is open now. */
  takeBaseline(): void {
    this.#baseline = { fds: new Map() };
    for (const pid of this.#daemons()) this.#baseline.fds.set(pid, fdsOf(pid).size);
  }

  #daemons(): number[] {
    return this.processes()
      .filter((info) => info.kind === "containerd" || info.kind === "cedanad")
      .map((info) => info.pid);
  }

  leftovers(): string[] {
    const found: string[] = [];
    const processes = this.processes();
    for (const info of processes)
      if (info.state === "Z" || (info.kind !== "containerd" && info.kind !== "cedanad"))
        found.push(
          `process ${info.pid} (${info.kind}, state ${info.state}, parent ${info.ppid}): ${info.argv.join(" ")}`,
        );
    const daemons = processes.filter((info) => info.kind === "cedanad" && info.state !== "Z");
    if (daemons.length > 1) found.push(`${daemons.length} cedanads: ${daemons.map((info) => info.pid)}`);
    for (const part of ["state", "root"])
      for (const id of entries(join(this.dir, part, "io.containerd.runtime.v2.task", this.namespace)))
        found.push(`bundle ${part}/…/${id}`);
    for (const pid of this.#daemons())
      for (const path of mountsBelow(join(this.dir, "state"), pid))
        found.push(`mount ${path} seen by ${pid}`);
    for (const path of cgroupsOf(this.namespace)) found.push(`cgroup ${path}${whoIsIn(path)}`);
    for (const root of [
      `/run/containerd/runc/${this.namespace}`,
      join(this.runDir, "runc", this.namespace),
      join(this.engineRoot, CRI_NAMESPACE),
    ])
      for (const id of entries(root)) found.push(`engine state ${root}/${id}`);
    for (const name of entries(join(this.runDir, "s"))) found.push(`socket s/${name}`);
    for (const pid of this.#daemons()) {
      const fds = fdsOf(pid);
      const inner = [`${this.dir}/state/`, `${this.ioDir}/`];
      for (const [fd, target] of fds)
        if (inner.some((path) => target.startsWith(path)) && !/\/io\.containerd\.[^/]+$/.test(target))
          found.push(`fd ${fd} of ${pid}: ${target}`);
      const before = this.#baseline.fds.get(pid);
      if (before === undefined) this.#baseline.fds.set(pid, fds.size);
      else if (fds.size > before + FD_SLACK)
        found.push(`${fds.size} fds of process ${pid}, ${before} before`);
    }
    return [...new Set(found)];
  }

  /** Nothing of ours is left of the containers there were; what ends by itself gets the time for it. */
  async expectNoLeftovers(timeoutMs = 5_000): Promise<void> {
    let left: string[] = [];
    await until(
      () => {
        left = this.leftovers();
        return left.length === 0;
      },
      { timeoutMs, everyMs: 20, what: () => `nothing to be left:\n  ${left.join("\n  ")}` },
    );
  }

  async stop(): Promise<void> {
    this.events?.close();
    this.client?.close();
    const reaper = this.#reaper;
    await this.stopContainerd();
    await cleanUp(this);
    if (reaper?.pid !== undefined && reaper.exitCode === null) reaper.kill("SIGKILL");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop();
  }
}

function whoIsIn(cgroup: string): string {
  const pids = readIfThere(join(cgroup, "cgroup.procs")).split("\n").filter(Boolean);
  return pids
    .map((pid) => ` with ${pid} (${readIfThere(`/proc/${pid}/cmdline`).replaceAll("\0", " ").trim()})`)
    .join("");
}

function readIfThere(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return ""; // it has just gone
  }
}

/** What the machine lacks for a test, or undefined. */
export function lacksMemoryCgroup(): string | undefined {
  const roots = cgroupRoots();
  if (roots.some((root) => existsSync(join(root, "memory.limit_in_bytes")))) return undefined;
  const controllers = roots.map((root) => join(root, "cgroup.controllers")).find(existsSync);
  if (controllers && readFileSync(controllers, "utf8").includes("memory")) return undefined;
  return "no memory controller in /sys/fs/cgroup";
}
