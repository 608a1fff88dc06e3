import { once } from "node:events";
import {
  closeSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readlinkSync,
  renameSync,
  rmdirSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { createServer, type Server, type Socket } from "node:net";
import { join } from "node:path";
import { environmentOf, programOf } from "../linux/proc.ts";
import { forgetReads, wasRead } from "./config-file.ts";
import { criuPath } from "./tools.ts";

/*
 * A gate at which the CRIU waits that an engine starts (addon/keeper/criu-gate.c). The engine can be started early, and has done what
 * comes before CRIU when that may go: a dump's while the container still runs, a restore's while its checkpoint is looked at. What CRIU
 * is to be told by its configuration file can be decided until the gate is opened.
 *
 * A gate is a directory. As long as `closed.conf` is in it, no CRIU has gone through: whoever finds it after a crash knows by that
 * whether anything was begun. A cedanad that ends takes the other end of CRIU's connection along, and CRIU doesn't start.
 *
 * An engine comes to the gate by its environment. One behind a script that clears that starts CRIU past it, and CRIU doesn't know of the
 * configuration that it would refuse either. So at a dump the way is barred there, too: where CRIU would write its log, which it opens
 * before it looks at any process, is a directory until the container stands still (`unbar`). What an administrator's file of options for
 * CRIU sends elsewhere (`log-file`) isn't barred: whoever waits for the gate must take an engine's success for a dump that went past it.
 * A restore's work path may have the log of one before it, which stays where nothing is restored; so only an engine that is known to come
 * (`isSeen`, at a gate that was open from the beginning) is started early there.
 */

export interface GateOptions {
  /** our native program, which is the gate when it is called `criu` */
  readonly program: string;
  /** PATH of whoever starts the engine, with our tools for CRIU */
  readonly path: string;
}

/** The gate for an engine whose parent has our native program, and whose environment the engine gets. */
export async function gateBelow(parent: number): Promise<GateOptions> {
  return await criuBelow(parent, await programOf(parent));
}

/** The same for a parent that isn't our native program. */
export async function criuBelow(parent: number, program: string): Promise<GateOptions> {
  return { program, path: await criuPath(program, environmentOf(parent).PATH || DEFAULT_PATH) };
}

const DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const CLOSED = "closed.conf";
const CONFIG = "criu.conf";
const HOLDS_FIRST = "first";
/** No option of CRIU's, so that it refuses to start with it. */
const CLOSED_CONFIG = "cedana-gate-is-closed\n";
/** leads to where CRIU would write its log */
const BARRED = "barred";

export class Gate implements Disposable {
  readonly directory: string;
  /** added to the engine's environment */
  readonly env: Readonly<Record<string, string>>;
  /** CRIU stands at the gate. Never rejects; pending for ever where the engine ends before */
  readonly arrived: Promise<void>;
  readonly #server: Server | undefined;
  readonly #fd: number | undefined;
  #criu: Socket | undefined;
  #closed = false;

  private constructor(
    directory: string,
    env: Record<string, string>,
    listener?: { server: Server; fd: number },
  ) {
    this.directory = directory;
    this.env = env;
    this.#server = listener?.server;
    this.#fd = listener?.fd;
    this.arrived = new Promise((resolve) =>
      this.#server?.on("connection", (socket) => {
        socket.on("error", () => {}); // it has ended, as its engine will tell
        if (this.#criu || this.#closed) {
          socket.destroy();
          return;
        }
        this.#criu = socket;
        resolve();
      }),
    );
  }

  /**
   * For a dump: who only asks goes through.
   * @param inside   where its directory is made, under a name that no gate has had
   * @param criuLog  where CRIU will write its log; nothing is there
   * @throws what the file system says; nothing is left then
   */
  static async forDump(inside: string, options: GateOptions, criuLog: string): Promise<Gate> {
    return await Gate.#make(inside, options, undefined, (directory) => {
      mkdirSync(criuLog, { mode: 0o700 });
      symlinkSync(criuLog, join(directory, BARRED));
    });
  }

  /** For a restore: who comes first waits, whatever he asks, and CRIU takes the gate's place after him. The others as `forDump`. */
  static async forRestore(inside: string, options: GateOptions): Promise<Gate> {
    return await Gate.#make(inside, options, HOLDS_FIRST, (directory) => {
      const config = join(directory, CONFIG);
      writeFileSync(config, CLOSED_CONFIG);
      forgetReads(config);
    });
  }

  /** The same where the engine isn't started early: nobody waits. @param config  of CRIU, as in `open` */
  static openFromStart(inside: string, { program, path }: GateOptions, config: string): Gate {
    const directory = mkdtempSync(join(inside, "criu-gate-"));
    try {
      symlinkSync(program, join(directory, "criu"));
      writeFileSync(join(directory, CONFIG), config, { mode: 0o600 });
      return new Gate(directory, gateEnvironment(directory, path, HOLDS_FIRST));
    } catch (error) {
      removeGate(directory);
      throw error;
    }
  }

  static async #make(
    inside: string,
    { program, path }: GateOptions,
    holds: typeof HOLDS_FIRST | undefined,
    finish: (directory: string) => void,
  ): Promise<Gate> {
    // At once: some 100 us, where each trip through a busy thread pool may take as long.
    const directory = mkdtempSync(join(inside, "criu-gate-"));
    let gate: Gate | undefined;
    try {
      symlinkSync(program, join(directory, "criu"));
      writeFileSync(join(directory, CLOSED), CLOSED_CONFIG, { mode: 0o600 });
      writeFileSync(join(directory, CONFIG), "", { mode: 0o600 });
      const fd = openSync(directory, "r");
      const server = createServer();
      gate = new Gate(directory, gateEnvironment(directory, path, holds), { server, fd });
      // A socket's address has 107 bytes; a bundle's path may have more.
      server.listen(`/proc/self/fd/${fd}/socket`);
      await once(server, "listening");
      finish(directory);
    } catch (error) {
      gate?.[Symbol.dispose]();
      removeGate(directory);
      throw error;
    }
    return gate;
  }

  /** Clears the way past the gate: nothing is wrong any more with a CRIU that begins. */
  unbar(): void {
    unbar(this.directory);
  }

  /**
   * Lets CRIU go, once it has arrived and the way is clear. Where its engine has been killed meanwhile, nobody is there.
   * @param config  of CRIU, as lines of its configuration file
   */
  open(config: string): void {
    const file = join(this.directory, CONFIG);
    writeFileSync(`${file}.new`, config, { mode: 0o600 });
    renameSync(`${file}.new`, file);
    this.#criu?.end("g");
  }

  /** The engine has asked for CRIU here, for whatever: it finds CRIU by the PATH that it was given. */
  get isSeen(): boolean {
    return existsSync(join(this.directory, "seen"));
  }

  /** Of a restore's, before it is opened: a CRIU came by another way, and refused its configuration. True also where nobody notes accesses. */
  async hasRefused(): Promise<boolean> {
    return await wasRead(join(this.directory, CONFIG));
  }

  /** CRIU has gone through. */
  get isPassed(): boolean {
    return isPassed(this.directory);
  }

  /** Whoever stands at it or comes to it is sent away. The directory is left: `removeGate`. */
  [Symbol.dispose](): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#criu?.destroy();
    this.#server?.close(() => {}); // unlinks the socket, by the path below our descriptor
    if (this.#fd !== undefined) closeSync(this.#fd);
  }
}

function gateEnvironment(
  directory: string,
  path: string,
  holds: typeof HOLDS_FIRST | undefined,
): Record<string, string> {
  return {
    PATH: `${directory}:${path}`,
    CEDANA_CRIU_GATE: directory,
    ...(holds && { CEDANA_CRIU_GATE_HOLDS: holds }),
    CRIU_CONFIG_FILE: join(directory, holds ? CONFIG : CLOSED),
  };
}

/** Of a gate of a cedanad before us: whether CRIU has gone through. */
export function isPassed(directory: string): boolean {
  return !existsSync(join(directory, CLOSED));
}

/** The same of a gate of a cedanad before us. At once: the container may stand still, and who dumps has asked whether the path answers. */
export function unbar(directory: string): void {
  try {
    rmdirSync(readlinkSync(join(directory, BARRED)));
  } catch (error) {
    if (!isNoBar(error)) throw error;
  }
}

/** With what bars the way past it. */
export function removeGate(directory: string): void {
  unbar(directory);
  rmSync(directory, { recursive: true, force: true });
}

/** The way is clear: CRIU's log is there, or nothing is. */
function isNoBar(error: unknown): boolean {
  return ["ENOENT", "ENOTDIR"].includes((error as NodeJS.ErrnoException).code ?? "");
}
