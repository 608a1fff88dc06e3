import type { SocketOfProcess } from "../../linux/addon.ts";
import type { OpenFile, ProcessInventory } from "../../linux/inventory.ts";
import { AF, type DiagnosedSocket, type UnixSocket } from "../../linux/sock-diag.ts";
import { type Context, nameOf } from "./context.ts";

// CRIU's side of it: criu/sk-inet.c, sk-unix.c, sk-netlink.c, sk-packet.c, sockets.c.

const IPPROTO_MPTCP = 262;
const supportedProtocols = new Set([0, 1, 6, 17, 58, 136]); // ICMP, TCP, UDP, ICMPv6, UDP-Lite
const SOCK_RAW = 3;
/** The state of an unconnected socket; CRIU takes one that its diagnostics don't list for unbound when it has this. */
const CLOSE = 7;

export async function checkSockets(context: Context): Promise<void> {
  for (const [inode, { process, file }] of context.treeSockets) {
    const socket = context.socket(inode);
    if (socket) checkKnown(context, process, file, socket);
    else if (file.socket) checkUnknown(context, process, file, file.socket);
    const pause = context.breathe();
    if (pause) await pause;
  }
}

function checkKnown(
  context: Context,
  process: ProcessInventory,
  file: OpenFile,
  socket: DiagnosedSocket,
): void {
  const name = nameOf(file);
  switch (socket.family) {
    case "inet":
    case "inet6": {
      if (socket.protocol !== "tcp") return;
      // What the diagnostics show is the TCP socket below; the program's own is of another protocol.
      if (socket.upperProtocol === "mptcp") {
        context.report("mptcp", process, name);
        return;
      }
      const { tcp } = context.policy;
      if (socket.state === "LISTEN") {
        if (socket.receiveQueue > 0)
          context.require(
            "tcp-in-flight",
            process,
            `${name} (${socket.receiveQueue} at the listener ${socket.local})`,
            tcp === "skip-in-flight",
          );
      } else if (socket.state !== "CLOSE") {
        const what = `${name} (${socket.local} to ${socket.remote}, ${socket.state})`;
        context.require("tcp-established", process, what, tcp !== undefined);
        if (socket.upperProtocol === "tls") context.report("kernel-tls", process, what);
      }
      return;
    }
    case "unix":
      if (socket.receiveQueue > 0 && file.socket?.passCredentials)
        context.report("credentials-unread", process, name);
      checkUnix(context, process, name, socket);
      return;
    case "netlink":
      if (socket.receiveQueue > 0) context.report("netlink-unread", process, name);
      if (socket.groups.some((group) => group > 32))
        context.report("netlink-groups", process, `${name} (groups ${socket.groups.join(", ")})`);
      return;
    case "packet":
      return;
  }
}

function checkUnix(context: Context, process: ProcessInventory, name: string, socket: UnixSocket): void {
  const outside = outsidePeer(context, socket);
  if (!outside) return;
  const what = `${name} (${socket.type}, ${outside.text})`;
  if (socket.type === "dgram" && outside.hasName)
    context.require("unix-outside", process, what, context.policy.extUnix === true);
  else context.report("unix-connection-outside", process, what);
}

/**
 * Who is at the other end of a unix socket of the tree, when that is not in the tree; undefined when it is, or nobody is. A
 * connection that the other side has not accepted yet has no other end, and CRIU dumps it as one that is closed.
 */
function outsidePeer(context: Context, socket: UnixSocket): { text: string; hasName: boolean } | undefined {
  const { peerInode } = socket;
  if (peerInode === undefined || peerInode === 0 || context.treeSockets.has(peerInode)) return undefined;
  const peer = context.socket(peerInode);
  const name = peer?.family === "unix" ? peer.name : undefined;
  return { text: `to ${name ?? `socket ${peerInode} outside`}`, hasName: name !== undefined };
}

function checkUnknown(
  context: Context,
  process: ProcessInventory,
  file: OpenFile,
  socket: SocketOfProcess,
): void {
  const name = nameOf(file);
  const { family, protocol, type } = socket;
  const known: readonly number[] = [AF.UNIX, AF.INET, AF.INET6, AF.NETLINK, AF.PACKET];
  if (!known.includes(family)) {
    context.report("unsupported-socket", process, `${name} (address family ${familyName(family)})`);
    return;
  }
  if (family === AF.INET || family === AF.INET6) {
    if (protocol === IPPROTO_MPTCP) {
      context.report("mptcp", process, name);
      return;
    }
    if (type !== SOCK_RAW && !supportedProtocols.has(protocol)) {
      context.report("unsupported-socket", process, `${name} (IP protocol ${protocol})`);
      return;
    }
  }
  const namespace = socket.networkNamespace;
  const foreign =
    namespace !== undefined && !context.tree.some((member) => member.namespaces.net === namespace);
  if (!foreign) return; // unbound: there is nothing to know of it
  const what = `${name} (${familyName(family)}, network namespace ${namespace})`;
  // CRIU knows its own namespace, which is ours, and takes what has no state there for what has none here.
  const harmless =
    namespace === context.inventory.own.net &&
    (family === AF.NETLINK || ((family === AF.INET || family === AF.INET6) && socket.state === CLOSE));
  context.report(harmless ? "foreign-socket-unbound" : "foreign-socket", process, what);
}

const familyNames: Readonly<Record<number, string>> = {
  1: "unix",
  2: "inet",
  10: "inet6",
  15: "key",
  16: "netlink",
  17: "packet",
  21: "rds",
  29: "can",
  30: "tipc",
  31: "bluetooth",
  38: "alg",
  40: "vsock",
  43: "smc",
  44: "xdp",
};

function familyName(family: number): string {
  return familyNames[family] ?? String(family);
}
