import { join } from "node:path";
import { readOne } from "../criu/image/index.ts";
import { localAddresses } from "../linux/addresses.ts";
import type { ChangedImage } from "./changed-images.ts";
import type { Found } from "./finding.ts";
import type { DumpedSocket, ImageFacts } from "./image-facts.ts";

/*
 * Who a restored container is: another host name and other addresses than the one that was dumped may be its.
 *
 * The host name is in the images, and CRIU gives it to the new namespace. Where the new container has another, CRIU gets a copy with that
 * (changed-images.ts).
 */

/** Where a restored container has its network. */
export type NetworkOfRestore =
  /** the host's */
  | "host"
  /** a new one, with nothing but loopback in it (runc), or with the interfaces of the dump (crun) */
  | "empty"
  | "dumped"
  /** path of one that is there already */
  | { readonly path: string };

/** Of TCP sockets that have no connection. */
const TCP_CLOSE = 7;
const TCP_LISTEN = 10;

/**
 * Sockets that have addresses of the container that was dumped.
 * @returns whether established connections have to come back closed: their own address isn't here
 */
export async function compareAddresses(
  sockets: readonly DumpedSocket[],
  network: NetworkOfRestore,
  found: Found,
): Promise<boolean> {
  const bound = sockets.filter(({ address, freeBind }) => address !== undefined && !freeBind);
  if (network === "dumped" || bound.length === 0) return false;
  const here = await addressesOf(network);
  if (!here) return false; // nothing is known of it: CRIU will find out
  const foreign = bound.filter(({ address }) => !here.has(address!));
  const isConnection = ({ isTcp, state }: DumpedSocket) =>
    isTcp && state !== TCP_CLOSE && state !== TCP_LISTEN;
  for (const socket of foreign) {
    const { address, port } = socket;
    if (!isConnection(socket))
      found.error(
        "address",
        `it has a socket at ${address} port ${port}, which is no address of the new container`,
      );
  }
  const connections = foreign.filter(isConnection);
  const addresses = [...new Set(connections.map(({ address }) => address))];
  if (addresses.length > 0)
    found.warning(
      "address",
      `its TCP connections from ${addresses.join(", ")} come back closed: the new container has other addresses`,
    );
  return connections.length > 0;
}

async function addressesOf(
  network: Exclude<NetworkOfRestore, "dumped">,
): Promise<{ has(address: string): boolean } | undefined> {
  if (network === "empty") return { has: isLoopback };
  const addresses = await localAddresses(network === "host" ? "/proc/self/ns/net" : network.path);
  return addresses && { has: (address) => isLoopback(address) || addresses.has(address) };
}

function isLoopback(address: string): boolean {
  return address.startsWith("127.") || address === "::1";
}

/**
 * The image of the host name with the container's own, when the images have another.
 * @returns undefined where they haven't
 */
export async function withHostname(
  imagePath: string,
  { hostname: dumped, hostnameImage }: ImageFacts,
  hostname: string | undefined,
): Promise<ChangedImage | undefined> {
  if (hostname === undefined || hostnameImage === undefined || dumped === hostname) return undefined;
  const before = await readOne(join(imagePath, hostnameImage), "UTSNS");
  return { name: hostnameImage, kind: "utsns_entry", message: { ...before, nodename: hostname } };
}
