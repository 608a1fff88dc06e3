import { readFile } from "node:fs/promises";
import { SyscallFailed } from "../errors/index.ts";

/** Files of /proc/PID/net with a line for each socket that packets from a network can reach, after a heading. */
const tables = [
  "tcp",
  "tcp6",
  "udp",
  "udp6",
  "udplite",
  "udplite6",
  "raw",
  "raw6",
  "icmp",
  "icmp6",
  "packet",
] as const;
/** SCTP and DCCP have files of other shapes; a heading is there in any case. */
const otherTables = ["sctp/eps", "sctp/assocs"] as const;

/**
 * Whether any socket in a process's network namespace could receive a packet: TCP in any state, UDP, raw, packet and so on. Unix and
 * netlink sockets don't count.
 * @throws SyscallFailed when the process has ended
 * Source: proc_pid_net(5).
 */
export async function hasNetworkSockets(pid: number): Promise<boolean> {
  const counts = await Promise.all(
    [...tables, ...otherTables].map((table) => countLines(`/proc/${pid}/net/${table}`)),
  );
  return counts.some((count) => count > 1); // the heading is one
}

async function countLines(path: string): Promise<number> {
  try {
    return (await readFile(path, "latin1")).split("\n").filter((line) => line.trim() !== "").length;
  } catch (error) {
    // The protocol isn't in this kernel. A process that has ended is told by the files that always are there.
    if ((error as NodeJS.ErrnoException).code === "ENOENT" && !/\/(tcp|udp|raw|packet)$/.test(path)) return 0;
    throw SyscallFailed.from(error);
  }
}
