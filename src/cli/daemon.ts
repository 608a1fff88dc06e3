import { existsSync, readFileSync } from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import { Unavailable } from "../errors/index.ts";
import { encodeMessage, MessageReader, messageType } from "../shim/keeper-protocol.ts";
import type { DaemonStatus } from "../shim/shim-server.ts";
import { daemonSocketName } from "../shim/socket-name.ts";

const ANSWER_TIMEOUT_MS = 5_000;

export class NotRunning extends Unavailable {
  override name = "NotRunning";
}

export function runDirectory(): string {
  return process.env.CEDANA_RUN_DIR || "/run/cedana";
}

/** The socket of the cedanad that serves our mount namespace. */
function socketPath(): string {
  return join(runDirectory(), daemonSocketName());
}

/** Asks the running cedanad; never starts one. @throws Unavailable when none runs or it doesn't answer within 5 s */
export function daemonStatus(): Promise<DaemonStatus> {
  const path = socketPath();
  return new Promise((resolve, reject) => {
    const fail = (why: string, cause?: Error) => {
      socket.destroy();
      reject(new Unavailable(`ask cedanad at ${path}: ${why}`, { cause }));
    };
    const reader = new MessageReader();
    const socket = connect(path, () => socket.write(encodeMessage(messageType.STATUS, {})));
    socket.setTimeout(ANSWER_TIMEOUT_MS, () => fail("no answer within 5 s"));
    socket.on("error", (error: NodeJS.ErrnoException) => {
      const notRunning = error.code === "ENOENT" || error.code === "ECONNREFUSED";
      if (notRunning)
        reject(
          new NotRunning(
            `cedanad is not running: nobody listens at ${path}. Whoever needs it starts it: a container under our shim, most commands of cedana`,
          ),
        );
      else fail(error.message, error);
    });
    socket.on("data", (chunk: Buffer) => {
      for (const message of reader.push(chunk)) {
        if (message.type !== messageType.STATUS_ANSWER) continue;
        socket.destroy();
        resolve(JSON.parse(message.bytes("answer").toString("utf8")) as DaemonStatus);
      }
    });
    socket.on("close", () => reject(new Unavailable(`ask cedanad at ${path}: it closed the connection`)));
  });
}

/** Ends cedanad (SIGTERM) and waits until it has gone. @returns its pid, or undefined when none ran */
export async function stopDaemon(timeoutMs: number): Promise<number | undefined> {
  let status: DaemonStatus;
  try {
    status = await daemonStatus();
  } catch (error) {
    if (error instanceof NotRunning) return undefined;
    throw error;
  }
  process.kill(status.pid, "SIGTERM");
  const deadline = Date.now() + timeoutMs;
  while (isCedanad(status.pid)) {
    if (Date.now() > deadline)
      throw new Unavailable(`cedanad (pid ${status.pid}) has not ended within ${timeoutMs} ms`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  return status.pid;
}

function isCedanad(pid: number): boolean {
  return (
    existsSync(`/proc/${pid}`) && readFileSync(`/proc/${pid}/stat`, "latin1").split(") ")[1]?.[0] !== "Z"
  );
}
