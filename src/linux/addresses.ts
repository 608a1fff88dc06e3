import { closeSync, openSync } from "node:fs";
import { SyscallFailed } from "../errors/index.ts";
import { netlinkDump } from "./addon.ts";
import { attributesOf, dumpRequest, formatIpv6, messagesOf } from "./sock-diag.ts";

const NETLINK_ROUTE = 0;
const RTM_GETADDR = 22;
/** struct ifaddrmsg: family, prefix length, flags, scope, and the interface's index */
const IFADDRMSG_BYTES = 8;
const IFA_ADDRESS = 1;
/** of a point-to-point link: IFA_ADDRESS is the other end's */
const IFA_LOCAL = 2;

/**
 * Addresses of the interfaces of a network namespace, as people write them.
 * @param namespace  path of the namespace: /proc/PID/ns/net, or a file that it is mounted on
 * @returns undefined when there is no such namespace
 * @throws SyscallFailed when it can't be entered or the kernel refuses
 * Source: rtnetlink(7), RTM_GETADDR.
 */
export async function localAddresses(namespace: string): Promise<Set<string> | undefined> {
  let fd: number;
  try {
    fd = openSync(namespace, "r");
  } catch {
    return undefined; // ENOENT: it has gone
  }
  try {
    const request = dumpRequest(RTM_GETADDR, IFADDRMSG_BYTES, () => {}); // of every family
    const [answer] = await netlinkDump(fd, NETLINK_ROUTE, [request]);
    if (typeof answer === "number")
      throw new SyscallFailed(`addresses of ${namespace}: errno ${answer}`, {
        errno: answer,
        code: `E${answer}`,
        syscall: "sendmsg",
      });
    return new Set([...messagesOf(answer!)].map(parseAddress).filter((address) => address !== undefined));
  } catch (error) {
    throw SyscallFailed.from(error);
  } finally {
    closeSync(fd);
  }
}

function parseAddress(message: Buffer): string | undefined {
  const attributes = attributesOf(message.subarray(IFADDRMSG_BYTES));
  const bytes = attributes.get(IFA_LOCAL) ?? attributes.get(IFA_ADDRESS);
  return bytes && showAddress(bytes);
}

/** 4 or 16 bytes, in the order of the network. */
export function showAddress(bytes: Buffer): string {
  return bytes.length === 4 ? [...bytes].join(".") : formatIpv6(bytes);
}
