import { type ChildProcess, spawn } from "node:child_process";
import type { Readable } from "node:stream";
import { fileURLToPath } from "node:url";
import { SyscallFailed, TimedOut, Unavailable } from "../errors/index.ts";
import { ANSWERS_FD, type HelperAnswer, type HelperCall, type HelperCalls } from "./helper/messages.ts";

/** Calls that wait in the driver at once: each has a thread of its own. */
const THREADS = 64;
/** Of what it says on stderr, which is nothing but a crash. */
const MAX_ERROR_TEXT = 4096;

/** The helper had to be ended in the middle of a call: what the call was to do may still come to be done. */
export class StuckCall extends TimedOut {}

interface Waiting {
  resolve(output: unknown): void;
  reject(error: Error): void;
}

/**
 * A helper process, and a watchdog over each call: a driver's call that hasn't returned by its deadline can't be taken back, so the helper is
 * killed, and with it every other call that is under way. The next one needs a new helper.
 */
export class GpuHelper implements AsyncDisposable {
  readonly #child: ChildProcess;
  readonly #waiting = new Map<number, Waiting>();
  readonly #ended: Promise<void>;
  #lastId = 0;
  #errorText = "";
  #end: Error | undefined;
  #rest = "";

  private constructor(child: ChildProcess) {
    this.#child = child;
    const answers = child.stdio[ANSWERS_FD] as Readable;
    answers.setEncoding("utf8").on("data", (text: string) => this.#received(text));
    child.stderr!.setEncoding("utf8").on("data", (text: string) => {
      this.#errorText = (this.#errorText + text).slice(-MAX_ERROR_TEXT);
    });
    child.stdin!.on("error", () => {}); // EPIPE: it has ended, which `exit` tells
    this.#ended = new Promise((resolve) => {
      child.once("close", (status, signal) => {
        const words = this.#errorText.trim();
        this.#fail(
          new Unavailable(
            `the GPU helper has ended (${signal ?? `status ${status}`})${words ? `: ${words.split("\n").at(-1)}` : ""}`,
          ),
        );
        resolve();
      });
      child.once("error", (error) => {
        this.#fail(new Unavailable(`start the GPU helper: ${error.message}`, { cause: error }));
        resolve();
      });
    });
  }

  static start(): GpuHelper {
    const isSource = import.meta.filename.endsWith(".ts");
    const file = isSource ? "./helper/main.ts" : "./gpu-helper.cjs";
    return new GpuHelper(
      spawn(process.execPath, [fileURLToPath(new URL(file, import.meta.url))], {
        stdio: ["pipe", "ignore", "pipe", "pipe"],
        env: { ...process.env, UV_THREADPOOL_SIZE: String(THREADS) },
      }),
    );
  }

  get pid(): number {
    return this.#child.pid ?? 0;
  }

  /** Whether it can still be asked. */
  get isAlive(): boolean {
    return this.#end === undefined;
  }

  /**
   * @param deadlineMs  then the helper is killed
   * @throws StuckCall, Unavailable when the helper ends meanwhile, SyscallFailed for what the call itself fails with
   */
  async call<C extends HelperCall>(
    call: C,
    input: HelperCalls[C]["input"],
    deadlineMs: number,
  ): Promise<HelperCalls[C]["output"]> {
    if (this.#end) throw this.#end;
    const id = ++this.#lastId;
    const answered = new Promise<unknown>((resolve, reject) => this.#waiting.set(id, { resolve, reject }));
    const timer = setTimeout(() => {
      const on = "pid" in input ? ` on process ${input.pid}` : "";
      this.#fail(
        new StuckCall(
          `the GPU driver's ${call}${on} did not return in ${deadlineMs} ms; the helper that called it was ended`,
        ),
      );
      this.#child.kill("SIGKILL");
    }, deadlineMs);
    this.#child.stdin!.write(`${JSON.stringify({ id, call, input })}\n`);
    try {
      return (await answered) as HelperCalls[C]["output"];
    } finally {
      clearTimeout(timer);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#child.kill("SIGKILL"); // it keeps nothing
    await this.#ended;
  }

  #received(text: string): void {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop()!;
    for (const line of lines) {
      const answer = JSON.parse(line) as HelperAnswer;
      const waiting = this.#waiting.get(answer.id);
      this.#waiting.delete(answer.id);
      if ("output" in answer) waiting?.resolve(answer.output);
      else waiting?.reject(failureOf(answer));
    }
  }

  #fail(error: Error): void {
    this.#end ??= error;
    for (const { reject } of this.#waiting.values()) reject(this.#end);
    this.#waiting.clear();
  }
}

function failureOf({ error, code }: { error: string; code?: string }): Error {
  if (code === undefined || code === "ERR_DLOPEN_FAILED") return new Unavailable(error);
  return new SyscallFailed(error, { errno: 0, code, syscall: "gpu helper" });
}
