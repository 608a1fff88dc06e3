import { isAbsolute } from "node:path";
import { InvalidRequest } from "../errors/index.ts";

/**
 * Options that reach CRIU past the engine, as the text of a configuration file.
 *
 * CRIU reads the file that `CRIU_CONFIG_FILE` names also when an engine starts it as `criu swrk`, after
 * /etc/criu/default.conf and before what the engine asks for; an option that the engine doesn't mention stays as the
 * file says.
 * @throws InvalidRequest for what has quotes or control characters
 * Source: criu(8), "CONFIGURATION FILES".
 */
export function criuConfig(options: {
  readonly tcpClose?: boolean | undefined;
  readonly skipInFlight?: boolean | undefined;
  readonly leaveStopped?: boolean | undefined;
  readonly lazyPages?: boolean | undefined;
  readonly networkLock?: "skip" | "nftables" | undefined;
  /** where CRIU looks for plugins; a directory without any keeps those of the machine away */
  readonly pluginDirectory?: string | undefined;
  /** What is mounted from outside, besides what the engine says. */
  readonly externalMounts?: readonly { readonly key: string; readonly source: string }[] | undefined;
  /** What cgroups are restored below instead of where they were, by controller; that of version 2 is "". */
  readonly cgroupRoots?: readonly (readonly [controller: string, path: string])[] | undefined;
  /** Where all hierarchies of cgroups are mounted, so that CRIU needs to mount none. */
  readonly cgroupYard?: string | undefined;
}): string {
  return [
    options.tcpClose && "tcp-close",
    options.skipInFlight && "skip-in-flight",
    options.leaveStopped && "leave-stopped",
    options.lazyPages && "lazy-pages",
    options.networkLock && `network-lock ${options.networkLock}`,
    options.pluginDirectory !== undefined &&
      `libdir ${quoted(absolutePath("plugin directory", options.pluginDirectory), "plugin directory")}`,
    ...(options.externalMounts ?? []).map(
      ({ key, source }) => `external ${quoted(`mnt[${key}]:${source}`, "mount")}`,
    ),
    ...(options.cgroupRoots ?? []).map(([controller, path]) => cgroupRoot(controller, path)),
    options.cgroupYard !== undefined &&
      `cgroup-yard ${quoted(absolutePath("directory of cgroups", options.cgroupYard), "directory of cgroups")}`,
  ]
    .filter(Boolean)
    .map((line) => `${line}\n`)
    .join("");
}

/** The same line by line. */
export function criuLines(options: Parameters<typeof criuConfig>[0]): string[] {
  return criuConfig(options).split("\n").filter(Boolean);
}

function cgroupRoot(controller: string, path: string): string {
  return `cgroup-root ${quoted(`${controller}:${path}`, "cgroup path")}`;
}

// What comes from a caller, a container's configuration or images must not become another option.
function quoted(text: string, what: string): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: these are what is to be refused
  if (/["\\\u0000-\u001f\u007f]/.test(text))
    throw new InvalidRequest(`${what} ${JSON.stringify(text)} has characters that CRIU can't be told`);
  return `"${text}"`;
}

function absolutePath(what: string, path: string): string {
  if (!isAbsolute(path)) throw new InvalidRequest(`${what} ${JSON.stringify(path)} is not an absolute path`);
  return path;
}
