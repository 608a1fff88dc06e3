import { chmodSync, rmSync } from "node:fs";
import { createServer, type Server, type Socket } from "node:net";
import type { Logger } from "pino";
import { inNameOf } from "../../shim/culprit.ts";
import { isAllowedPeer } from "../peer.ts";
import type { ApiContext } from "./context.ts";

/** Each has buffers of its own; nobody needs so many. */
const MAX_CONNECTIONS = 64;

/**
 * The socket of the management API. We accept by ourselves and ask the kernel who that is; gRPC, which takes 20 MB, is loaded with the
 * first connection that is allowed, and gets connections, not the socket.
 *
 * A socket that can't be made costs the API, not the containers: it is logged, and cedanad goes on.
 * @param path  replaced when something is there: the lock of cedanad's own socket is ours
 */
export function listenForApi(path: string, context: ApiContext): Server {
  const { log } = context;
  const server = createServer((socket) => {
    // What is done about it: nothing; gRPC ends the session, or there was none yet.
    socket.on("error", (error) => log.debug({ err: error }, "a connection of the API failed"));
    if (isAllowedPeer(socket, log)) {
      const culprit = { what: "a client of the management API", fail: () => void socket.destroy() };
      void inNameOf(culprit, () => handOver(socket, context, log));
    } else socket.destroy();
  });
  server.maxConnections = MAX_CONNECTIONS;
  server.on("error", (error) => log.error({ err: error, path }, "the management API can't be served"));
  rmSync(path, { force: true });
  server.listen({ path }, () => chmodSync(path, 0o600));
  return server;
}

async function handOver(socket: Socket, context: ApiContext, log: Logger): Promise<void> {
  try {
    const { acceptConnection } = await import("./server.ts");
    await acceptConnection(socket, context);
  } catch (error) {
    log.error({ err: error }, "the management API can't be loaded");
    socket.destroy();
  }
}
