import type { Socket } from "node:net";
import type { Logger } from "pino";
import { peerCredentials } from "../linux/addon.ts";

/** Only root, or who we are: the directory of the sockets says so already, the kernel's word is final. */
export function isAllowedPeer(socket: Socket, log: Logger): boolean {
  const { fd } = (socket as unknown as { _handle: { fd: number } })._handle;
  const peer = peerCredentials(fd);
  if (peer.uid === 0 || peer.uid === process.getuid!()) return true;
  log.warn({ peer }, "a connection from another user is refused");
  return false;
}
