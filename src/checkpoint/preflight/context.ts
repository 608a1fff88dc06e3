import type { AnyNamespaceKind, Inventory, OpenFile, ProcessInventory } from "../../linux/inventory.ts";
import type { MountInfo } from "../../linux/mount-options.ts";
import { inodeInBrackets } from "../../linux/proc.ts";
import { Slices } from "../../linux/slices.ts";
import type { DiagnosedSocket } from "../../linux/sock-diag.ts";
import { catalogue, type Finding, type FindingId, type Requirement } from "./catalogue.ts";

/** What the dump's options are, as far as they are set. */
export interface PreflightPolicy {
  readonly tcp?: "keep" | "close" | "skip-in-flight" | undefined;
  readonly extUnix?: boolean | undefined;
  readonly fileLocks?: boolean | undefined;
  readonly shellJob?: boolean | undefined;
  readonly linkRemap?: boolean | undefined;
  /** Directories in which CRIU searches for watched files; that they hold all of them is believed. */
  readonly irmapScanPaths?: readonly string[] | undefined;
  /** default: CRIU's, 1 MiB */
  readonly ghostLimitBytes?: number | undefined;
}

export interface PreflightInput {
  /** All processes of the container, by its cgroup; host pids. */
  readonly pids: readonly number[];
  /** The container's init; default: the process with pid 1 in its namespace, else the one that the others descend from. */
  readonly rootPid?: number | undefined;
  /** What the container's configuration says; absent for processes without one. */
  readonly spec?: {
    /** Where the configuration mounts something: that comes back with the container. */
    readonly mountPoints: readonly string[];
    readonly terminal?: boolean | undefined;
  };
  /** Directory into which the images will go; it need not exist yet. */
  readonly destination?: string | undefined;
  readonly policy?: PreflightPolicy;
  /** The engine that dumps; absent: CRIU alone. */
  readonly engine?: "runc" | "crun" | undefined;
  /** What is known of CRIU; null: there is none. Absent: not looked at. */
  readonly criu?: CriuFacts | null | undefined;
  /** Devices that a CRIU plugin dumps, as `major:minor` or `major:*`. */
  readonly pluginDevices?: readonly string[] | undefined;
}

export interface CriuFacts {
  /** "4.2.1" */
  readonly version: string;
  /** built with libbpf: dumps BPF hashes and arrays */
  readonly bpfMaps?: boolean | undefined;
  /** What `criu check` says that the kernel or CRIU's own privileges lack. */
  readonly missing?: readonly string[] | undefined;
}

/** CRIU's own default. Source: criu(8), --ghost-limit. */
const defaultGhostLimitBytes = 1024 * 1024;

/** The inventory, and what every check asks of it. */
export class Context {
  readonly input: PreflightInput;
  readonly inventory: Inventory;
  readonly root: ProcessInventory | undefined;
  /** The root and all that descend from it: what CRIU dumps. */
  readonly tree: readonly ProcessInventory[];
  /** The others: what came by exec. */
  readonly outside: readonly ProcessInventory[];
  readonly treePids: ReadonlySet<number>;
  /** The sockets that the tree holds, by inode, each with the first descriptor that was found for it. */
  readonly treeSockets: ReadonlyMap<number, { readonly process: ProcessInventory; readonly file: OpenFile }>;
  /** Mounts of all mount namespaces of the tree, by mount id, which is unique in the kernel. */
  readonly mounts: ReadonlyMap<number, MountInfo>;
  /** Gives the event loop its turn when a check has taken long enough. */
  readonly breathe = new Slices().breathe;
  readonly #seen = new Map<string, { finding: Finding | Requirement; more: number }>();

  constructor(input: PreflightInput, inventory: Inventory) {
    this.input = input;
    this.inventory = inventory;
    this.root = rootOf(inventory.processes, input.rootPid);
    const pids = descendantsOf(inventory.processes, this.root);
    this.tree = inventory.processes.filter((process) => pids.has(process.pid));
    this.outside = inventory.processes.filter((process) => !pids.has(process.pid));
    this.treePids = pids;
    const sockets = new Map<number, { process: ProcessInventory; file: OpenFile }>();
    for (const process of this.tree)
      for (const file of process.files) {
        const inode = socketInode(file);
        if (inode !== undefined && !sockets.has(inode)) sockets.set(inode, { process, file });
      }
    this.treeSockets = sockets;
    const namespaces = new Set(this.tree.map((process) => process.namespaces.mnt));
    this.mounts = new Map(
      [...inventory.mounts].flatMap(([namespace, mounts]) =>
        namespaces.has(namespace) ? mounts.map((mount) => [mount.mountId, mount] as const) : [],
      ),
    );
  }

  get policy(): PreflightPolicy {
    return this.input.policy ?? {};
  }

  get ghostLimitBytes(): number {
    return this.policy.ghostLimitBytes ?? defaultGhostLimitBytes;
  }

  /** Whether the root is in a namespace of its own, or of another than ours at least. */
  ownsNamespace(kind: AnyNamespaceKind): boolean {
    const inode = this.root?.namespaces[kind];
    return inode !== undefined && inode !== this.inventory.own[kind];
  }

  /** Whether CRIU knows a namespace: one of the tree's, or its own, which is ours. */
  knowsNamespace(inode: number): boolean {
    const includes = (namespaces: ProcessInventory["namespaces"]) =>
      Object.values(namespaces).includes(inode);
    return includes(this.inventory.own) || this.tree.some((process) => includes(process.namespaces));
  }

  socket(inode: number): DiagnosedSocket | undefined {
    for (const table of this.inventory.sockets.values()) {
      const found = table.byInode.get(inode);
      if (found) return found;
    }
    return undefined;
  }

  /**
   * @param object  what it is about: the same object in another process is counted, not told again
   */
  report(id: FindingId, process: ProcessInventory | undefined, what: string, object = what): void {
    this.#add(`${id} ${object}`, {
      id,
      ...identity(process),
      what,
      severity: catalogue[id].severity,
      why: catalogue[id].why,
      advice: catalogue[id].advice,
    });
  }

  require(
    id: RequirementId,
    process: ProcessInventory | undefined,
    what: string,
    met: boolean,
    { object = what, value }: { object?: string; value?: number } = {},
  ): void {
    const { severity, why, advice, option } = catalogue[id];
    this.#add(`${id} ${object}`, {
      id,
      ...identity(process),
      what,
      severity,
      why,
      advice,
      option,
      met,
      ...(value !== undefined && { value }),
    });
  }

  #add(key: string, finding: Finding | Requirement): void {
    const known = this.#seen.get(key);
    if (known) known.more++;
    else this.#seen.set(key, { finding, more: 0 });
  }

  /** In the order in which they were found. */
  all(): (Finding | Requirement)[] {
    return [...this.#seen.values()].map(({ finding, more }) =>
      more === 0 ? finding : { ...finding, alsoIn: more },
    );
  }
}

type RequirementId = {
  [Id in FindingId]: (typeof catalogue)[Id] extends { option: string } ? Id : never;
}[FindingId];

function identity(process: ProcessInventory | undefined): Pick<Finding, "process"> {
  if (!process) return {};
  return { process: { pid: process.pid, pidInContainer: process.pidInContainer, comm: process.stat.comm } };
}

function socketInode(file: OpenFile): number | undefined {
  return file.link.startsWith("socket:[") ? inodeInBrackets(file.link) : undefined;
}

function rootOf(
  processes: readonly ProcessInventory[],
  rootPid: number | undefined,
): ProcessInventory | undefined {
  if (rootPid !== undefined) return processes.find((process) => process.pid === rootPid);
  const init = processes.find((process) => process.pidInContainer === 1);
  if (init) return init;
  const pids = new Set(processes.map((process) => process.pid));
  const roots = processes.filter((process) => !pids.has(process.stat.parentPid));
  return roots.sort((a, b) => a.stat.startTime - b.stat.startTime || a.pid - b.pid)[0];
}

function descendantsOf(
  processes: readonly ProcessInventory[],
  root: ProcessInventory | undefined,
): ReadonlySet<number> {
  const found = new Set<number>();
  if (!root) return found;
  const children = Map.groupBy(processes, (process) => process.stat.parentPid);
  const waiting = [root.pid];
  for (let pid = waiting.pop(); pid !== undefined; pid = waiting.pop()) {
    found.add(pid);
    for (const child of children.get(pid) ?? []) if (!found.has(child.pid)) waiting.push(child.pid);
  }
  return found;
}

/** How an open file is named to people. */
export function nameOf(file: OpenFile): string {
  return file.what === "fd" ? `fd ${file.fd}: ${file.link}` : `${file.what}: ${file.link}`;
}
