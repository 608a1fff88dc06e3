import { closeSync, openSync } from "node:fs";
import { SyscallFailed } from "../errors/index.ts";
import { netlinkDump } from "./addon.ts";

/**
 * The sockets of a network namespace, from the kernel's socket diagnostics (NETLINK_SOCK_DIAG).
 *
 * A request is a netlink header and one of these; each answer is a netlink header, a message and attributes:
 *
 *   nlmsghdr            16   length u32 · type u16 (20, SOCK_DIAG_BY_FAMILY) · flags u16 (REQUEST | DUMP) · sequence u32 · port u32
 *   inet_diag_req_v2    56   family u8 · protocol u8 · ext u8 · pad u8 · states u32 · socket id 48
 *   inet_diag_msg       72   family u8 · state u8 · timer u8 · retransmits u8 · id (sport be16 · dport be16 · src 16 · dst 16 ·
 *                            interface u32 · cookie u64) · expires u32 · rqueue u32 · wqueue u32 · uid u32 · inode u32
 *   unix_diag_req       24   family u8 · protocol u8 · pad u16 · states u32 · inode u32 · show u32 · cookie u64
 *   unix_diag_msg       16   family u8 · type u8 · state u8 · pad u8 · inode u32 · cookie u64
 *   netlink_diag_req    20   family u8 · protocol u8 · pad u16 · inode u32 · show u32 · cookie u64
 *   netlink_diag_msg    28   family u8 · type u8 · protocol u8 · state u8 · port u32 · dst port u32 · dst group u32 · inode u32 · cookie u64
 *   packet_diag_req     20   as netlink_diag_req
 *   packet_diag_msg     16   family u8 · type u8 · number u16 · inode u32 · cookie u64
 *   attribute           4+n  length u16, itself included · type u16 · value, padded to 4
 *
 * Numbers are the machine's own, little-endian wherever this runs, but for the ports and addresses.
 * What is not listed: unbound inet sockets, and families whose diagnostics the kernel lacks (see `SocketTable.missing`).
 * Source: linux/sock_diag.h, inet_diag.h, unix_diag.h, netlink_diag.h, packet_diag.h; sock_diag(7).
 */

const NETLINK_SOCK_DIAG = 4;
const SOCK_DIAG_BY_FAMILY = 20;
const NLM_F_REQUEST_DUMP = 0x301;
const headerBytes = 16;
const everyState = 0xffffffff;

export const AF = { UNIX: 1, INET: 2, INET6: 10, NETLINK: 16, PACKET: 17, VSOCK: 40 } as const;
const IPPROTO = { TCP: 6, UDP: 17, UDPLITE: 136, RAW: 255 } as const;

/** States of TCP; other families use ESTABLISHED, CLOSE and LISTEN of them. Source: net/tcp_states.h. */
const tcpStates = [
  "UNKNOWN",
  "ESTABLISHED",
  "SYN_SENT",
  "SYN_RECV",
  "FIN_WAIT1",
  "FIN_WAIT2",
  "TIME_WAIT",
  "CLOSE",
  "CLOSE_WAIT",
  "LAST_ACK",
  "LISTEN",
  "CLOSING",
  "NEW_SYN_RECV",
] as const;
export type SocketState = (typeof tcpStates)[number];

const socketTypes = ["", "stream", "dgram", "raw", "rdm", "seqpacket"] as const;

export interface InetSocket {
  readonly family: "inet" | "inet6";
  readonly protocol: "tcp" | "udp" | "udplite" | "raw";
  readonly inode: number;
  readonly state: SocketState;
  /** `address:port`, an IPv6 address in brackets */
  readonly local: string;
  readonly remote: string;
  /** Bytes to be read; of a TCP socket that listens, connections that wait to be accepted. */
  readonly receiveQueue: number;
  readonly sendQueue: number;
  /** Protocol above TCP that the kernel runs ("tls"). */
  readonly upperProtocol?: string;
}

export interface UnixSocket {
  readonly family: "unix";
  /** stream, dgram, seqpacket */
  readonly type: string;
  readonly inode: number;
  readonly state: SocketState;
  /** Path, or `@name` of an abstract one; absent for a socket without a name. */
  readonly name?: string;
  /** Inode of the socket at the other end. */
  readonly peerInode?: number;
  /** Inodes of the far ends of connections that wait to be accepted; 0 for one that has gone. */
  readonly pendingInodes: readonly number[];
  readonly receiveQueue: number;
}

export interface NetlinkSocket {
  readonly family: "netlink";
  /** NETLINK_* */
  readonly protocol: number;
  readonly inode: number;
  /** Bytes, of kernel memory, in what waits to be read. */
  readonly receiveQueue: number;
  /** Multicast groups that it has joined. */
  readonly groups: readonly number[];
}

export interface PacketSocket {
  readonly family: "packet";
  readonly type: string;
  readonly inode: number;
}

export type DiagnosedSocket = InetSocket | UnixSocket | NetlinkSocket | PacketSocket;

export interface SocketTable {
  readonly byInode: ReadonlyMap<number, DiagnosedSocket>;
  /** Kinds that this kernel has no diagnostics for: their sockets are not in the table. */
  readonly missing: readonly string[];
}

function request(bytes: number, fill: (body: Buffer) => void): Buffer {
  return dumpRequest(SOCK_DIAG_BY_FAMILY, bytes, fill);
}

/** A message that asks netlink for all of a type. */
export function dumpRequest(type: number, bytes: number, fill: (body: Buffer) => void): Buffer {
  const message = Buffer.alloc(headerBytes + bytes);
  message.writeUInt32LE(message.length, 0);
  message.writeUInt16LE(type, 4);
  message.writeUInt16LE(NLM_F_REQUEST_DUMP, 6);
  fill(message.subarray(headerBytes));
  return message;
}

/** Of TCP with INET_DIAG_INFO, without which the kernel doesn't say what runs above it (INET_DIAG_ULP_INFO). */
export function inetRequest(family: number, protocol: number): Buffer {
  return request(56, (body) => {
    body[0] = family;
    body[1] = protocol;
    if (protocol === IPPROTO.TCP) body[2] = 1 << 1;
    body.writeUInt32LE(everyState, 4);
  });
}

/** With UDIAG_SHOW_NAME, PEER, ICONS and RQLEN. */
export function unixRequest(): Buffer {
  return request(24, (body) => {
    body[0] = AF.UNIX;
    body.writeUInt32LE(everyState, 4);
    body.writeUInt32LE(0x01 | 0x04 | 0x08 | 0x10, 12);
  });
}

/** With NDIAG_SHOW_MEMINFO and GROUPS. */
export function netlinkRequest(): Buffer {
  return request(20, (body) => {
    body[0] = AF.NETLINK;
    body[1] = 255; // NDIAG_PROTO_ALL
    body.writeUInt32LE(0x01 | 0x02, 8);
  });
}

export function packetRequest(): Buffer {
  return request(20, (body) => {
    body[0] = AF.PACKET;
  });
}

/** The messages of an answer without their headers. */
export function* messagesOf(answer: Buffer): Generator<Buffer> {
  for (let at = 0; at + headerBytes <= answer.length; ) {
    const length = answer.readUInt32LE(at);
    if (length < headerBytes || at + length > answer.length)
      throw new RangeError(`netlink message of ${length} bytes in ${answer.length - at}`);
    yield answer.subarray(at + headerBytes, at + length);
    at += (length + 3) & ~3;
  }
}

export function attributesOf(bytes: Buffer): Map<number, Buffer> {
  const attributes = new Map<number, Buffer>();
  for (let at = 0; at + 4 <= bytes.length; ) {
    const length = bytes.readUInt16LE(at);
    if (length < 4 || at + length > bytes.length) break;
    attributes.set(bytes.readUInt16LE(at + 2) & 0x3fff, bytes.subarray(at + 4, at + length)); // without NLA_F_NESTED
    at += (length + 3) & ~3;
  }
  return attributes;
}

const INET_DIAG_ULP_INFO = 19;
const INET_ULP_INFO_NAME = 1;

export function parseInet(message: Buffer, protocol: InetSocket["protocol"]): InetSocket {
  const ipv6 = message[0] === AF.INET6;
  const ulp = attributesOf(message.subarray(72)).get(INET_DIAG_ULP_INFO);
  const upperProtocol =
    ulp && attributesOf(ulp).get(INET_ULP_INFO_NAME)?.toString("latin1").replace(/\0.*$/s, "");
  return {
    family: ipv6 ? "inet6" : "inet",
    protocol,
    inode: message.readUInt32LE(68),
    state: tcpStates[message[1]!] ?? "UNKNOWN",
    local: endpoint(message.subarray(8, 24), message.readUInt16BE(4), ipv6),
    remote: endpoint(message.subarray(24, 40), message.readUInt16BE(6), ipv6),
    receiveQueue: message.readUInt32LE(56),
    sendQueue: message.readUInt32LE(60),
    ...(upperProtocol && { upperProtocol }),
  };
}

function endpoint(address: Buffer, port: number, ipv6: boolean): string {
  return ipv6 ? `[${formatIpv6(address)}]:${port}` : `${address.subarray(0, 4).join(".")}:${port}`;
}

/** RFC 5952: the longest run of two or more zero groups is cut. */
export function formatIpv6(address: Buffer): string {
  const groups = Array.from({ length: 8 }, (_, i) => address.readUInt16BE(i * 2));
  if (groups.slice(0, 5).every((group) => group === 0) && groups[5] === 0xffff)
    return `::ffff:${address.subarray(12, 16).join(".")}`;
  let best = { at: -1, length: 1 };
  for (let at = 0; at < 8; at++) {
    let length = 0;
    while (at + length < 8 && groups[at + length] === 0) length++;
    if (length > best.length) best = { at, length };
  }
  const hex = (part: number[]) => part.map((group) => group.toString(16)).join(":");
  if (best.at < 0) return hex(groups);
  return `${hex(groups.slice(0, best.at))}::${hex(groups.slice(best.at + best.length))}`;
}

export function parseUnix(message: Buffer): UnixSocket {
  const attributes = attributesOf(message.subarray(16));
  const name = attributes.get(0);
  const peer = attributes.get(2);
  const pending = attributes.get(3);
  const queues = attributes.get(4);
  return {
    family: "unix",
    type: socketTypes[message[1]!] ?? String(message[1]),
    inode: message.readUInt32LE(4),
    state: tcpStates[message[2]!] ?? "UNKNOWN",
    ...(name && name.length > 0 && { name: unixName(name) }),
    ...(peer && { peerInode: peer.readUInt32LE(0) }),
    pendingInodes: pending
      ? Array.from({ length: pending.length >> 2 }, (_, i) => pending.readUInt32LE(i * 4))
      : [],
    receiveQueue: queues ? queues.readUInt32LE(0) : 0,
  };
}

// An abstract name begins with a NUL and may hold others; a path ends at its first one.
function unixName(name: Buffer): string {
  if (name[0] === 0) return `@${name.toString("utf8", 1).replaceAll("\0", "@")}`;
  const end = name.indexOf(0);
  return name.toString("utf8", 0, end < 0 ? name.length : end);
}

export function parseNetlink(message: Buffer): NetlinkSocket {
  const attributes = attributesOf(message.subarray(28));
  const memory = attributes.get(0);
  const bits = attributes.get(1) ?? Buffer.alloc(0);
  return {
    family: "netlink",
    protocol: message[2]!,
    inode: message.readUInt32LE(16),
    receiveQueue: memory ? memory.readUInt32LE(0) : 0, // SK_MEMINFO_RMEM_ALLOC
    groups: Array.from({ length: bits.length * 8 }, (_, i) => i + 1).filter(
      (group) => (bits[(group - 1) >> 3]! >> ((group - 1) & 7)) & 1,
    ),
  };
}

export function parsePacket(message: Buffer): PacketSocket {
  return {
    family: "packet",
    type: socketTypes[message[1]!] ?? String(message[1]),
    inode: message.readUInt32LE(4),
  };
}

const inetKinds = (["tcp", "udp", "udplite", "raw"] as const).flatMap((protocol) =>
  ([AF.INET, AF.INET6] as const).map((family) => ({
    what: `${protocol}${family === AF.INET6 ? "6" : ""}`,
    request: () => inetRequest(family, IPPROTO[protocol.toUpperCase() as keyof typeof IPPROTO]),
    parse: (message: Buffer): DiagnosedSocket => parseInet(message, protocol),
  })),
);
const kinds = [
  ...inetKinds,
  { what: "unix", request: unixRequest, parse: (message: Buffer): DiagnosedSocket => parseUnix(message) },
  {
    what: "netlink",
    request: netlinkRequest,
    parse: (message: Buffer): DiagnosedSocket => parseNetlink(message),
  },
  {
    what: "packet",
    request: packetRequest,
    parse: (message: Buffer): DiagnosedSocket => parsePacket(message),
  },
];

// ENOENT, EINVAL, EPROTONOSUPPORT, EOPNOTSUPP: this kernel has no diagnostics for the family or protocol.
const noDiagnostics = new Set([2, 22, 93, 95]);

/**
 * Reads all sockets of a process's network namespace.
 * @param breathe  called between messages; gives the event loop its turn when it has been long enough
 * @throws SyscallFailed when the namespace can't be entered or the kernel refuses; ENOENT when the process has ended
 */
export async function readSockets(
  pid: number,
  breathe: () => Promise<void> | undefined,
): Promise<SocketTable> {
  let namespaceFd: number | undefined;
  let answers: (Buffer | number)[];
  try {
    namespaceFd = openSync(`/proc/${pid}/ns/net`, "r");
    answers = await netlinkDump(
      namespaceFd,
      NETLINK_SOCK_DIAG,
      kinds.map((kind) => kind.request()),
    );
  } catch (err) {
    throw SyscallFailed.from(err);
  } finally {
    if (namespaceFd !== undefined) closeSync(namespaceFd);
  }
  const byInode = new Map<number, DiagnosedSocket>();
  const missing: string[] = [];
  for (const [i, answer] of answers.entries()) {
    const kind = kinds[i]!;
    if (typeof answer === "number") {
      if (!noDiagnostics.has(answer))
        throw new SyscallFailed(`socket diagnostics of ${kind.what}: errno ${answer}`, {
          errno: answer,
          code: `E${answer}`,
          syscall: "sendmsg",
        });
      missing.push(kind.what);
      continue;
    }
    for (const message of messagesOf(answer)) {
      const socket = kind.parse(message);
      // 0: nobody holds it any more (TIME_WAIT), or nobody does yet (a connection to be accepted).
      if (socket.inode !== 0) byInode.set(socket.inode, socket);
      const pause = breathe();
      if (pause) await pause;
    }
  }
  return { byInode, missing };
}
