// Processes to dump, and what the tests need to know of the machine.

import { type ChildProcess, execFile, execFileSync, spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { parse } from "../../src/criu/image/json.ts";
import { findAddon } from "../../src/linux/addon.ts";
import { childrenOf } from "../../src/linux/proc.ts";
import { cached, programs } from "../live/harness/programs.ts";

const run = promisify(execFile);

/** Why tests that dump can't run here; undefined: they can. */
export function whyNoDump(): string | undefined {
  if (process.getuid!() !== 0) return "needs root";
  try {
    findAddon();
  } catch {
    return "needs `npm run build`";
  }
  try {
    execFileSync("criu", ["check"], { stdio: "ignore" });
  } catch {
    return "needs a CRIU that works on this kernel: scripts/setup.sh";
  }
  return undefined;
}

/** Where setup.sh has unpacked crit of the CRIU that is installed; undefined: it hasn't. */
export function critPath(): string | undefined {
  let version: string | undefined;
  try {
    version = /[\d.]+/.exec(
      execFileSync("criu", ["--version"], { stdio: ["ignore", "pipe", "ignore"], encoding: "utf8" }),
    )?.[0];
  } catch {
    return undefined;
  }
  const cache = process.env.CEDANA_CACHE_DIR ?? "/var/cache/cedana";
  const path = join(cache, `crit-${version}/usr/lib/python3/dist-packages`);
  return existsSync(path) ? path : undefined;
}

export interface CritAnswer {
  readonly json?: unknown;
  readonly error?: string;
  readonly unknown?: number;
}

/** Asks crit.py, all in one go. */
export function askCrit(questions: object[]): CritAnswer[] {
  const { stdout, stderr, status } = spawnSync("/usr/bin/python3", [join(import.meta.dirname, "crit.py")], {
    env: { PYTHONPATH: critPath(), PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION: "python" }, // as setup.sh's run_crit
    input: questions.map((question) => JSON.stringify(question)).join("\n"),
    encoding: "utf8",
    maxBuffer: 1 << 30,
  });
  if (status !== 0) throw new Error(`crit: ${stderr}`);
  return stdout
    .trim()
    .split("\n")
    .map((line) => parse(line) as CritAnswer);
}

export class Workplace implements Disposable {
  readonly path = mkdtempSync(join(tmpdir(), "cedana-criu-"));

  [Symbol.dispose](): void {
    rmSync(this.path, { recursive: true, force: true });
  }
}

async function zooProgram(): Promise<string> {
  const source = join(import.meta.dirname, "programs/zoo.c");
  const directory = await cached("zoo", [source], (directory) =>
    run("gcc", ["-static", "-O1", "-pthread", "-o", join(directory, "zoo"), source]),
  );
  return join(directory, "zoo");
}

/** The process and all that descend from it, parents first; stopped, so that none is born meanwhile. */
function stoppedTree(pid: number): number[] {
  try {
    process.kill(pid, "SIGSTOP");
  } catch {
    return []; // it has ended
  }
  return [pid, ...childrenOf(pid).flatMap(stoppedTree)];
}

/** A process to dump; killed with everything that descends from it. */
export class Victim implements AsyncDisposable {
  /** to dump */
  readonly pid: number;
  readonly #child: ChildProcess;

  private constructor(child: ChildProcess, pid: number) {
    this.#child = child;
    this.pid = pid;
  }

  /** One of everything, in namespaces of its own. */
  static async zoo(directory: string, ...without: string[]): Promise<Victim> {
    const child = spawn(await zooProgram(), without, {
      cwd: directory,
      stdio: ["ignore", "pipe", "pipe"],
      detached: true,
    });
    let errors = "";
    child.stderr!.on("data", (chunk) => {
      errors += chunk;
    });
    const [said] = await Promise.race([
      once(child.stdout!, "data"),
      once(child, "exit").then(() => [undefined]),
    ]);
    if (said === undefined) throw new Error(`the zoo ended: ${errors}`);
    const children = readFileSync(`/proc/${child.pid}/task/${child.pid}/children`, "utf8").trim();
    return new Victim(child, Number(children));
  }

  /** One of test/live/programs; stdout is /dev/null or a descriptor. */
  static async program(name: string, stdout: "ignore" | number = "ignore"): Promise<Victim> {
    const stdio = ["ignore", stdout, "ignore"] as const;
    const child = spawn(join(await programs(), name), [], { cwd: "/", stdio: [...stdio], detached: true });
    await once(child, "spawn");
    return new Victim(child, child.pid!);
  }

  /** Its end, if somebody else has killed it. */
  async ended(): Promise<NodeJS.Signals | null> {
    if (this.#child.exitCode === null && this.#child.signalCode === null) await once(this.#child, "exit");
    return this.#child.signalCode;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const own = this.#child.pid!;
    for (const pid of new Set([...stoppedTree(own), ...stoppedTree(this.pid), own])) {
      try {
        process.kill(pid, "SIGKILL");
      } catch {
        // it has ended
      }
    }
    await this.ended();
  }
}
