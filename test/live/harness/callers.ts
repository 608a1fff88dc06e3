// What calls an OCI runtime: Podman, Buildah, conmon, Docker, in private directories and a private mount namespace, so that
// their mounts go with it. All of them are unpacked by scripts/setup.sh --with-callers.

import { type ChildProcess, execFile, execFileSync, spawn } from "node:child_process";
import {
  closeSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { basename, join } from "node:path";
import { cleanUp } from "./cleanup.ts";
import type { EngineName } from "./live.ts";
import { imageTar, repository } from "./programs.ts";
import {
  cgroupsOf,
  forgetKernelCacheLater,
  hasController,
  isAlive,
  processesOf,
  systemdRuns,
} from "./system.ts";
import { until } from "./until.ts";

const callers = "/var/cache/cedana/callers";
export const wrapper = join(repository, "bin/cedana-runtime");
const systemPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/** What this machine lacks, or undefined. */
export function missingCallers(): string | undefined {
  return existsSync(join(callers, "usr/bin/podman"))
    ? undefined
    : "no podman, buildah, conmon and docker on this machine: scripts/setup.sh --with-callers";
}

/** A program of the callers. */
export function caller(name: "podman" | "buildah" | "conmon" | "docker" | "dockerd"): string {
  return join(callers, name === "dockerd" ? "usr/sbin" : "usr/bin", name);
}

export interface Outcome {
  status: number;
  stdout: string;
  stderr: string;
}

/** Which of the two programs a command is for: the engine itself, for the control, or ours in front of it. */
export type Side = "engine" | "wrapper";
export const sides: readonly Side[] = ["engine", "wrapper"];

export interface PlaceOptions {
  /** of the cedanad that cedana-runtime starts here */
  daemonEnv?: Record<string, string>;
  /** a directory that comes first in everybody's PATH */
  first?: string;
  /** a network namespace, too: the machine's network is not ours to configure */
  ownNetwork?: boolean;
  /**
   * What others have below /run is on a tmpfs, as there, also on a machine whose /run is on a disk; images and containers' files stay where
   * they are. For measurements.
   */
  inMemory?: boolean;
}

/** A place of its own for one caller: directory, cgroup, mount namespace. */
export class CallerPlace {
  readonly engine: EngineName;
  readonly dir = mkdtempSync("/run/cp-");
  /** Name of the cgroup that everything of it is in. */
  readonly namespace = systemdRuns
    ? `${basename(this.dir).toLowerCase().replace("-", "")}.slice`
    : basename(this.dir).toLowerCase();
  readonly runDir = join(this.dir, "run");
  readonly config = join(this.dir, "runtime.json");
  readonly env: Record<string, string>;
  // Podman and conmon pass on nothing that would keep a cedanad from it.
  readonly #forgetKernelCache = forgetKernelCacheLater();
  #daemonEnv: Record<string, string> = {};
  #path = systemPath;
  #ownNetwork = false;
  #holder: ChildProcess | undefined;
  #reaper: ChildProcess | undefined;

  private constructor(engine: EngineName) {
    this.engine = engine;
    this.env = {
      PATH: `${join(callers, "usr/bin")}:${join(callers, "usr/sbin")}:${systemPath}`,
      // Only theirs: podman and conmon pass nothing of it to the engine but PATH, docker's programs need none.
      LD_LIBRARY_PATH: join(callers, "lib"),
      HOME: join(this.dir, "home"),
      TMPDIR: join(this.dir, "tmp"),
      XDG_RUNTIME_DIR: join(this.dir, "xdg"),
      PODMAN_IGNORE_CGROUPSV1_WARNING: "1",
      CEDANA_RUN_DIR: this.runDir,
      CEDANA_STATE_DIR: join(this.dir, "var"),
      CEDANA_CONFIG: join(this.dir, "config.json"),
      CEDANA_CRIU_CACHE: "off",
    };
  }

  static async start(
    engine: EngineName,
    { daemonEnv = {}, first, ownNetwork = false, inMemory = false }: PlaceOptions = {},
  ): Promise<CallerPlace> {
    const place = new CallerPlace(engine);
    place.#ownNetwork = ownNetwork;
    place.#daemonEnv = daemonEnv;
    if (first !== undefined) {
      place.#path = `${first}:${systemPath}`;
      place.env.PATH = `${first}:${place.env.PATH}`;
    }
    // Docker and we write scripts there, and systemd mounts /run so that nothing in it can be executed. cleanUp unmounts it.
    execFileSync("mount", ["--bind", place.dir, place.dir]);
    execFileSync("mount", ["-o", "remount,bind,exec", place.dir]);
    for (const name of ["home", "tmp", "run", "var", "xdg", "etc/cedana", "etc/containers", "etc-work"])
      mkdirSync(join(place.dir, name), { recursive: true, mode: 0o700 });
    for (const name of inMemory ? ["run", "s", "libpod"] : []) {
      mkdirSync(join(place.dir, name), { recursive: true, mode: 0o700 });
      execFileSync("mount", ["-t", "tmpfs", "-o", "mode=0700", "tmpfs", join(place.dir, name)]); // cleanUp unmounts it
    }
    for (const path of [place.config, join(place.dir, "etc/cedana/runtime.json")])
      writeFileSync(
        path,
        JSON.stringify({
          engine,
          runDirectory: place.runDir,
          stateDirectory: place.env.CEDANA_STATE_DIR,
          configuration: place.env.CEDANA_CONFIG,
        }),
      );
    // Of images; there is no flag for it where Podman makes one of a checkpoint.
    writeFileSync(
      join(place.dir, "etc/containers/policy.json"),
      JSON.stringify({ default: [{ type: "insecureAcceptAnything" }] }),
    );
    const v2 = engine === "crun" && !existsSync("/sys/fs/cgroup/cgroup.controllers");
    // Podman's clean-up after a container passes neither environment nor runtime flags on: what it needs to know stands in /etc.
    const layers = `lowerdir=/etc,upperdir=${join(place.dir, "etc")},workdir=${join(place.dir, "etc-work")}`;
    const etc = `mount -t overlay -o ${layers} etc /etc && `;
    const lo = ownNetwork ? "ip link set lo up && " : "";
    const script = `${lo}${etc}${v2 ? "mount -t cgroup2 cgroup2 /sys/fs/cgroup && " : ""}echo ready && exec sleep infinity`;
    const namespaces = ["--mount", "--propagation", "private", ...(ownNetwork ? ["--net"] : [])];
    place.#holder = spawn("unshare", [...namespaces, "sh", "-c", script], {
      stdio: ["ignore", "pipe", "inherit"],
      env: place.env,
    });
    place.#reaper = spawn(
      process.execPath,
      [join(import.meta.dirname, "reaper.ts"), place.dir, place.namespace],
      {
        stdio: ["pipe", "ignore", "inherit"],
        detached: true,
      },
    );
    place.#reaper.unref();
    (place.#reaper.stdin as unknown as { unref(): void }).unref();
    await new Promise((resolve, reject) => {
      place.#holder!.stdout!.once("data", resolve);
      place.#holder!.once("exit", () => reject(new Error("a mount namespace could not be made")));
    });
    return place;
  }

  /** That cgroup as callers name it. */
  get cgroupParent(): string {
    return systemdRuns ? this.namespace : `/${this.namespace}`;
  }

  /** `cgroupsPath` of a container's configuration. */
  cgroupsPath(name: string): string {
    return systemdRuns ? `${this.namespace}:test:${name}` : `/${this.namespace}/${name}`;
  }

  /** Whether containers' cgroups can have a controller. */
  hasController(name: string): boolean {
    return (this.engine === "runc" || systemdRuns) && hasController(name);
  }

  /** A command line that runs in our namespaces. */
  inside(argv: string[]): string[] {
    const namespaces = `/proc/${this.#holder!.pid}/ns`;
    const network = this.#ownNetwork ? [`--net=${namespaces}/net`] : [];
    return ["nsenter", `--mount=${namespaces}/mnt`, ...network, "--", ...argv];
  }

  spawn(argv: string[], options: { input?: boolean } = {}): ChildProcess {
    const [file, ...rest] = this.inside(argv);
    return spawn(file!, rest, {
      env: this.env,
      cwd: this.dir,
      stdio: [options.input ? "pipe" : "ignore", "pipe", "pipe"],
    });
  }

  /** Runs to the end; a status other than 0 is an outcome like others. */
  async run(argv: string[], { timeoutMs = 60_000, env = this.env } = {}): Promise<Outcome> {
    const [file, ...rest] = this.inside(argv);
    return await new Promise((resolve, reject) => {
      execFile(
        file!,
        rest,
        { env, cwd: this.dir, timeout: timeoutMs, maxBuffer: 64 << 20 },
        (error, stdout, stderr) => {
          const status = error ? (error.code as unknown) : 0;
          if (typeof status !== "number")
            reject(new Error(`${argv.join(" ")}: ${error!.message}\n${stderr}`));
          else resolve({ status, stdout, stderr });
        },
      );
    });
  }

  /** … that must succeed. @returns stdout without the last line's end */
  async ok(
    argv: string[],
    options: { timeoutMs?: number; env?: Record<string, string> } = {},
  ): Promise<string> {
    const outcome = await this.run(argv, options);
    if (outcome.status !== 0)
      throw new Error(`${argv.join(" ")}: status ${outcome.status}\n${outcome.stderr}\n${outcome.stdout}`);
    return outcome.stdout.trimEnd();
  }

  /** Argv of an engine's own command line on either side, as callers begin it. */
  runtime(side: Side, ...args: string[]): string[] {
    const program = side === "engine" ? [this.engine] : [wrapper, "--cedana-config", this.config];
    return [...program, ...(systemdRuns ? ["--systemd-cgroup"] : []), ...args];
  }

  cedanadLog(): string {
    try {
      return readFileSync(join(this.runDir, "cedanad.log"), "utf8");
    } catch {
      return "";
    }
  }

  /** Of the cedanad that has said something last; it may have ended. */
  cedanadPid(): number {
    const last = this.cedanadLog().trim().split("\n").at(-1)!;
    const pid = /"pid":(\d+)/.exec(last)?.[1];
    if (pid === undefined) throw new Error("no cedanad has said anything");
    return Number(pid);
  }

  /** Everything of it that lives, but the holder of the mount namespace. */
  living(): string[] {
    return processesOf(this)
      .filter((info) => info.state !== "Z" && info.pid !== this.#holder!.pid)
      .map((info) => info.argv.join(" "));
  }

  /** After every container was removed: no process is left, and no container's cgroup that the engine itself never leaves. */
  async expectNoLeftovers(allowed: (argv: string) => boolean = () => false): Promise<void> {
    // Podman leaves conmon's and pods' cgroups on a hybrid host, crun now and then a container's: with and without us.
    const isContainer = (path: string) =>
      (this.engine === "runc" || systemdRuns) && /\/libpod-[0-9a-f]{64}(\.scope)?$/.test(path);
    const left = () => [
      ...this.living().filter((argv) => !allowed(argv)),
      ...cgroupsOf(this.namespace).filter(isContainer),
    ];
    await until(() => left().length === 0, {
      timeoutMs: 10_000,
      what: () => `nothing to be left:\n${left().join("\n")}`,
    });
  }

  /** cedana-runtime; where a cedanad gets an environment of its own, in a script that Podman's clean-up runs, too. */
  #configuredWrapper(): string {
    if (Object.keys(this.#daemonEnv).length === 0) return wrapper;
    const path = join(this.dir, "wrapper");
    const exports = Object.entries(this.#daemonEnv).map(([name, value]) => `export ${name}='${value}'\n`);
    writeFileSync(path, `#!/bin/sh\n${exports.join("")}exec ${wrapper} "$@"\n`, { mode: 0o755 });
    return path;
  }

  /** Configuration of Podman and Buildah, both with the two sides as runtimes `engine` and `wrapper`. */
  configureContainers(): void {
    const quoted = (values: string | string[]) => JSON.stringify(values);
    const engine = ["/usr/sbin", "/usr/bin"].map((path) => join(path, this.engine)).find(existsSync)!;
    writeFileSync(
      join(this.dir, "containers.conf"),
      [
        "[containers]",
        `log_driver = "k8s-file"`, // there is no journald
        `netns = "host"`, // no network configuration of the machine is touched
        "pids_limit = 0", // crun's private cgroup hierarchy has no controllers
        `init_path = "${callers}/usr/bin/catatonit"`,
        "[network]",
        `network_config_dir = "${this.dir}/net"`,
        "[engine]",
        `cgroup_manager = ${quoted(systemdRuns ? "systemd" : "cgroupfs")}`,
        `events_logger = "file"`,
        `conmon_path = ${quoted([caller("conmon")])}`,
        `helper_binaries_dir = ${quoted([join(callers, "usr/lib/podman"), join(callers, "usr/bin")])}`,
        // conmon gets nothing else of podman's environment. The run directory is how leftovers are recognised.
        `conmon_env_vars = ${quoted([`PATH=${this.#path}`, `LD_LIBRARY_PATH=${this.env.LD_LIBRARY_PATH}`, `CEDANA_RUN_DIR=${this.runDir}`])}`,
        "[engine.runtimes]",
        `engine = ${quoted([engine])}`,
        `wrapper = ${quoted([this.#configuredWrapper()])}`,
        "",
      ].join("\n"),
    );
    writeFileSync(
      join(this.dir, "storage.conf"),
      `[storage]\ndriver = "overlay"\nrunroot = "${this.dir}/s"\ngraphroot = "${this.dir}/g"\n`,
    );
    this.env.CONTAINERS_CONF = join(this.dir, "containers.conf");
    this.env.CONTAINERS_STORAGE_CONF = join(this.dir, "storage.conf");
  }

  async stop(): Promise<void> {
    const holder = this.#holder;
    await cleanUp(this);
    this.#forgetKernelCache();
    if (holder && holder.exitCode === null) holder.kill("SIGKILL");
    if (holder?.pid)
      await until(() => !isAlive(holder.pid!), { what: () => "the end of the mount namespace" });
    rmSync(this.dir, { recursive: true, force: true, maxRetries: 3 });
    if (this.#reaper?.exitCode === null) this.#reaper.kill("SIGKILL");
  }
}

/** Podman with its own storage. Both sides are runtimes of one podman, so that all else is equal. */
export class Podman {
  readonly place: CallerPlace;
  readonly #dir: string;

  private constructor(place: CallerPlace) {
    this.place = place;
    this.#dir = place.dir;
  }

  static async start(engine: EngineName, options?: PlaceOptions): Promise<Podman> {
    const place = await CallerPlace.start(engine, options);
    const podman = new Podman(place);
    try {
      place.configureContainers();
      await podman.ok("load", "--quiet", "--input", await imageTar());
    } catch (error) {
      await place.stop();
      throw error;
    }
    return podman;
  }

  argv(side: Side, args: string[]): string[] {
    return [caller("podman"), "--tmpdir", join(this.#dir, "libpod"), "--runtime", side, ...args];
  }

  /** For commands that concern no runtime. */
  async ok(...args: string[]): Promise<string> {
    return await this.place.ok(this.argv("engine", args));
  }

  async on(side: Side, ...args: string[]): Promise<Outcome> {
    const at =
      ["run", "create"].indexOf(args[0]!) >= 0 ? 1 : args[0] === "pod" && args[1] === "create" ? 2 : 0;
    const cgroup =
      at > 0 ? [...args.slice(0, at), "--cgroup-parent", this.place.cgroupParent, ...args.slice(at)] : args;
    return await this.place.run(this.argv(side, cgroup));
  }

  async stop(): Promise<void> {
    await this.on("wrapper", "rm", "--all", "--force", "--time", "0").catch(() => {}); // what is left is ended by the cgroup
    await this.place.stop();
  }
}

/** Docker's daemon with its own containerd, directories and socket; no network. */
export class Docker {
  readonly place: CallerPlace;
  #daemon: ChildProcess | undefined;

  private constructor(place: CallerPlace) {
    this.place = place;
  }

  /** @param runtimes  more of them, as daemon.json has them */
  static async start(runtimes: Record<string, unknown> = {}): Promise<Docker> {
    const place = await CallerPlace.start("runc");
    const docker = new Docker(place);
    try {
      await docker.#startDaemon(runtimes);
      await docker.ok("load", "--input", await imageTar());
    } catch (error) {
      await docker.stop();
      throw error;
    }
    return docker;
  }

  get log(): string {
    return readFileSync(join(this.place.dir, "dockerd.log"), "utf8");
  }

  async #startDaemon(runtimes: Record<string, unknown>): Promise<void> {
    const { place } = this;
    const { dir } = place;
    const config = {
      "data-root": join(dir, "data"),
      "exec-root": join(dir, "exec"),
      pidfile: join(dir, "docker.pid"),
      hosts: [`unix://${dir}/docker.sock`],
      bridge: "none",
      iptables: false,
      ip6tables: false,
      "ip-forward": false,
      "userland-proxy": false,
      "storage-driver": "overlay2",
      "exec-opts": [`native.cgroupdriver=${systemdRuns ? "systemd" : "cgroupfs"}`],
      "cgroup-parent": place.cgroupParent,
      "init-path": join(callers, "usr/bin/catatonit"),
      experimental: true, // `docker checkpoint`
      runtimes: {
        wrapper: { path: wrapper, runtimeArgs: ["--cedana-config", place.config] },
        shim: { runtimeType: "io.containerd.cedana.v2" },
        ...runtimes,
      },
    };
    writeFileSync(join(dir, "daemon.json"), JSON.stringify(config));
    place.env.PATH = `${join(repository, "bin")}:${place.env.PATH}`; // where containerd looks for shims
    place.env.DOCKER_CONFIG = join(dir, "home");
    place.env.DOCKER_HOST = `unix://${dir}/docker.sock`;
    const log = openSync(join(dir, "dockerd.log"), "a", 0o600);
    const [file, ...rest] = place.inside([caller("dockerd"), "--config-file", join(dir, "daemon.json")]);
    const daemon = spawn(file!, rest, { env: place.env, cwd: dir, stdio: ["ignore", log, log] });
    closeSync(log);
    this.#daemon = daemon;
    await until(
      async () => {
        if (daemon.exitCode !== null) throw new Error(`dockerd has ended:\n${this.log.slice(-2000)}`);
        return (await this.run("version")).status === 0;
      },
      { timeoutMs: 30_000, everyMs: 100, what: () => `dockerd's socket:\n${this.log.slice(-2000)}` },
    );
  }

  async run(...args: string[]): Promise<Outcome> {
    return await this.place.run([caller("docker"), ...args]);
  }

  async ok(...args: string[]): Promise<string> {
    return await this.place.ok([caller("docker"), ...args]);
  }

  async stop(): Promise<void> {
    const daemon = this.#daemon;
    if (daemon && daemon.exitCode === null) {
      const gone = new Promise((resolve) => daemon.once("exit", resolve));
      daemon.kill("SIGTERM"); // it ends its containers and its containerd
      await Promise.race([gone, new Promise((resolve) => setTimeout(resolve, 15_000).unref())]);
    }
    await this.place.stop();
  }
}
