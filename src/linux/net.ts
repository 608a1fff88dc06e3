import { readFileSync } from "node:fs";
import { SyscallFailed } from "../errors/index.ts";

/**
 * Files of /proc/PID/net with a line, after a heading, for each socket that a packet from a network can reach and that is not in the counters
 * of sockstat. They are short; those of TCP and UDP are not read: the kernel looks through tables that are as large as the machine.
 */
const tables = ["packet", "icmp", "icmp6", "sctp/eps", "sctp/assocs"] as const;

/**
 * Whether any socket in a process's network namespace could receive a packet: TCP in any state, UDP, raw, packet and so on. Unix and
 * netlink sockets don't count.
 * @throws SyscallFailed when the process has ended
 * Source: proc_pid_net(5); kernel net/ipv4/proc.c, net/ipv6/proc.c (sockstat, sockstat6).
 */
export function hasNetworkSockets(pid: number): boolean {
  const counters = parseSockstat(read(pid, "sockstat") ?? "");
  const timeWait = counters.get("TCP tw") ?? 0; // of both versions of IP
  // Of any kind: none at all is the most frequent case.
  if (counters.get("sockets used") === 0 && timeWait === 0) return false;
  for (const [name, count] of parseSockstat(read(pid, "sockstat6") ?? "")) counters.set(name, count);
  for (const [name, count] of counters)
    if (count > 0 && (/^(?:TCP|UDP|UDPLITE|RAW)6? inuse$/.test(name) || name === "TCP tw")) return true;
  return tables.some((table) => (read(pid, table) ?? "").trimEnd().split("\n").length > 1);
}

/** `TCP: inuse 3 orphan 0 tw 0 alloc 4 mem 1` as "TCP inuse" → 3 and so on. */
export function parseSockstat(text: string): Map<string, number> {
  const counters = new Map<string, number>();
  for (const line of text.split("\n")) {
    const [protocol, rest = ""] = line.split(": ");
    for (const [, name, count] of rest.matchAll(/(\w+) (\d+)/g))
      counters.set(`${protocol} ${name}`, Number(count));
  }
  return counters;
}

/** @returns undefined when this kernel hasn't got the protocol. Read at once: procfs never waits, and a trip through the thread pool takes longer */
function read(pid: number, table: string): string | undefined {
  try {
    return readFileSync(`/proc/${pid}/net/${table}`, "latin1");
  } catch (error) {
    // A process that has ended is told by the file that always is there.
    if ((error as NodeJS.ErrnoException).code === "ENOENT" && table !== "sockstat") return undefined;
    throw SyscallFailed.from(error);
  }
}
