import { readFileSync } from "node:fs";
import type { Socket } from "node:net";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import type { Logger } from "pino";
import { deviceSlot } from "../checkpoint/device-slot.ts";
import { Cancelled, SyscallFailed } from "../errors/index.ts";
import { programOf } from "../linux/proc.ts";
import type { Conversation, OciAnswer, OciCall } from "../runtime/oci/call.ts";
import { Endings } from "../runtime/oci/endings.ts";
import { Escalator } from "../runtime/oci/escalator.ts";
import { type Leftovers, thawLeftovers } from "../runtime/oci/frozen.ts";
import { inNameOf } from "../shim/culprit.ts";
import {
  encodeMessage,
  exitStatusOf,
  type FieldValues,
  type Message,
  type MessageType,
  messageType,
} from "../shim/keeper-protocol.ts";
import type { WrapperCall } from "../shim/shim-server.ts";

const FLAG_BECOME = 1;
/** For the wrapper to end, and us to become the child of whoever adopts us. */
const SETTLE_MS = 250;
/** How long what is left to do after an answer may keep us. */
const LINGER_MS = 60_000;

/**
 * cedanad's side of the calls that cedana-runtime makes.
 *
 * A cedanad that a wrapper below conmon has started becomes conmon's child when the wrapper ends: conmon adopts orphans, and at
 * its own end waits for all that it has. Nobody can leave an adopter by himself, so such a cedanad ends as soon as nothing is under way;
 * whoever needs the next one, a keeper or a wrapper, starts it.
 */
export class RuntimeServer {
  readonly #log: Logger;
  readonly #escalator: Escalator;
  readonly #endings: Endings;
  readonly #endBelowConmon: () => void;
  readonly #isBusy: () => boolean;
  #leftovers: Leftovers = async () => undefined;
  #active = 0;
  #check: NodeJS.Timeout | undefined;

  /**
   * @param options.endBelowConmon  ends this cedanad
   * @param options.isBusy          whether something else than our calls is under way in it
   */
  constructor(options: { log: Logger; endBelowConmon: () => void; isBusy: () => boolean }) {
    this.#log = options.log;
    this.#endBelowConmon = options.endBelowConmon;
    this.#isBusy = options.isBusy;
    this.#escalator = new Escalator(options.log, () => this.#checkSoon());
    this.#endings = new Endings(options.log, this.#escalator, () => this.#checkSoon());
  }

  #checkSoon(): void {
    clearTimeout(this.#check);
    this.#check = setTimeout(() => {
      const pending = this.#active + this.#escalator.pending + this.#endings.pending;
      if (pending > 0 || !parentIsConmon()) return; // what ends asks again
      if (this.#isBusy()) this.#checkSoon();
      else this.#endBelowConmon();
    }, SETTLE_MS);
  }

  /** What an earlier cedanad has left: containers frozen, signals to be sent. */
  async revive(runDirectory: string): Promise<void> {
    this.#escalator.revive(runDirectory);
    this.#leftovers = await thawLeftovers(runDirectory, this.#log);
    this.#endings.revive(runDirectory, this.#leftovers);
    deviceSlot()?.recoverAll(join(runDirectory, "c", "oci-"), this.#log);
  }

  /** Takes up a RUNTIME message. @returns who is told of what follows on that connection */
  begin(socket: Socket, message: Message): WrapperCall {
    const send = (type: MessageType, values: FieldValues) => socket.write(encodeMessage(type, values));
    send(messageType.RUNTIME_WORKING, {});
    const call = callOf(message);
    const wrapper = new Wrapper(
      send,
      call.pid,
      this.#log.child({ container: call.id, command: call.command }),
    );
    // Who is answered may go before all is done, and nobody waits for what is never done.
    const gone = Promise.withResolvers<void>();
    socket.once("close", () => gone.resolve());
    this.#active++;
    wrapper.log.debug({ argv: call.argv }, "cedana-runtime asks");
    const culprit = {
      what: `cedana-runtime ${call.command} ${call.id}`,
      fail: () => void socket.destroy(), // it says so, and nothing is begun anew
    };
    const answered = inNameOf(culprit, () => this.#answer(call, wrapper));
    void gone.promise
      .then(() => Promise.race([answered, sleep(LINGER_MS, undefined, { ref: false })]))
      .finally(() => {
        this.#active--;
        this.#checkSoon();
      });
    return wrapper;
  }

  async #answer(call: OciCall, wrapper: Wrapper): Promise<void> {
    // Loaded with the first call: on a node without such callers it would only take memory.
    const { runCommand } = await import("../runtime/oci/commands.ts");
    const answer = await runCommand(call, wrapper, this.#escalator, this.#endings, this.#leftovers);
    if (answer) wrapper.answer(answer);
  }
}

function parentIsConmon(): boolean {
  try {
    return readFileSync(`/proc/${process.ppid}/comm`, "utf8").startsWith("conmon");
  } catch {
    return false; // it has ended: somebody else has adopted us, or is about to
  }
}

function callOf(message: Message): OciCall {
  const [command = "", ...argv] = message.strings("argv");
  return {
    command,
    argv,
    globalArgv: message.strings("globalArgv"),
    engine: message.string("path"),
    root: message.string("root"),
    id: message.string("id"),
    marker: message.string("marker"),
    cwd: message.string("cwd"),
    pid: message.int("pid"),
    repeated: message.int("deliveries") > 1,
  };
}

class Wrapper implements Conversation, WrapperCall {
  readonly log: Logger;
  readonly #send: (type: MessageType, values: FieldValues) => void;
  readonly #pid: number;
  readonly #gone = new AbortController();
  #answered = false;
  #running: { resolve(status: number): void; reject(error: Error): void } | undefined;

  constructor(send: (type: MessageType, values: FieldValues) => void, pid: number, log: Logger) {
    this.#send = send;
    this.#pid = pid;
    this.log = log;
  }

  program(): Promise<string> {
    return programOf(this.#pid);
  }

  get signal(): AbortSignal {
    return this.#gone.signal;
  }

  run(argv: readonly string[], options: Parameters<Conversation["run"]>[1] = {}): Promise<number> {
    if (this.signal.aborted) return Promise.reject(new Cancelled("cedana-runtime has gone"));
    if (this.#running)
      return Promise.reject(new TypeError(`cedana-runtime is to run ${argv[0]} beside another program`));
    return new Promise((resolve, reject) => {
      this.#running = { resolve, reject };
      this.#send(messageType.RUNTIME_RUN, { argv, env: pairs(options.env), outputPath: options.outputPath });
    });
  }

  answer({ status, message, output }: OciAnswer): void {
    if (this.#answered) return;
    this.#answered = true;
    const answer = output === undefined ? undefined : Buffer.from(output);
    this.#send(messageType.RUNTIME_ANSWER, { status, message, answer });
  }

  become(argv: readonly string[], options: Parameters<Conversation["become"]>[1] = {}): void {
    this.#send(messageType.RUNTIME_RUN, { argv, env: pairs(options.env), flags: FLAG_BECOME });
  }

  ended(message: Message): void {
    const errno = message.int("errno");
    if (errno === 0) this.#running?.resolve(exitStatusOf(message.int("waitStatus")));
    else
      this.#running?.reject(
        new SyscallFailed(`start the engine: errno ${errno}`, {
          errno,
          code: String(errno),
          syscall: "execve",
        }),
      );
    this.#running = undefined;
  }

  lost(): void {
    this.#gone.abort();
    this.#running?.reject(new Cancelled("cedana-runtime has gone"));
    this.#running = undefined;
  }
}

function pairs(env: Readonly<Record<string, string>> | undefined): string[] | undefined {
  return env && Object.entries(env).map(([name, value]) => `${name}=${value}`);
}
