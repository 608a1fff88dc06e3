import { InvalidRequest } from "../errors/index.ts";
import { CgroupMode, NetworkLock, type OptionsInit, PreDumpMode } from "../proto/generated/criu_rpc.ts";

/*
 * What CRIU can be told, as its RPC has it, in our units. Which options there are, and since which CRIU: `criu --help`, criu(8).
 * Every option that is left out has CRIU's own default, which is "no" for what allows something.
 *
 * Not here: what CRIU has replaced by `external` (veths, external mounts, unix sockets by inode), and options for programs that
 * dump themselves.
 */

/** Both a dump's and a restore's. */
export interface CommonOptions {
  /** images: a path, or an open directory of ours (CRIU reaches it through /proc, it need not be inherited) */
  imagesDir: string | number;
  /** CRIU's log, statistics and scratch; default: the images' */
  workDir?: string | number | undefined;
  /** in workDir, a name without slashes; default dump.log or restore.log */
  logFile?: string | undefined;
  /** 0 nothing but messages, 1 errors, 2 warnings (default), 3 information, 4 everything */
  logLevel?: 0 | 1 | 2 | 3 | 4 | undefined;
  /** a configuration file in the syntax of criu(8), whose settings win over all of these */
  configFile?: string | undefined;

  // What is outside of the tree, and how it is called: "mnt[name]:path", "net[inode]:name", "file[mnt:inode]", "tty[rdev:dev]" …
  external?: readonly string[] | undefined;
  /** mounts that CRIU finds to be external by itself */
  autoExternalMounts?: boolean | undefined;
  externalSharing?: boolean | undefined;
  externalMasters?: boolean | undefined;
  skipMounts?: readonly string[] | undefined;
  /** file systems that CRIU doesn't know but may treat as virtual ones; "all" for all */
  enableFilesystems?: readonly string[] | undefined;
  /** old way to build mounts, without MOUNT_SETATTR (CRIU 3.17 and newer) */
  mountNamespaceCompat?: boolean | undefined;

  tcpEstablished?: boolean | undefined;
  /** at a dump connections are left out, at a restore they come back closed */
  tcpClose?: boolean | undefined;
  /** connections that nobody has accepted are left out */
  tcpSkipInFlight?: boolean | undefined;
  /** how packets are held off while connections are dumped */
  networkLock?: "iptables" | "nftables" | "skip" | undefined;
  /** network namespace made anew, empty: whoever restores fills it */
  emptyNetworkNamespace?: boolean | undefined;
  externalUnixSockets?: boolean | undefined;

  shellJob?: boolean | undefined;
  fileLocks?: boolean | undefined;
  linkRemap?: boolean | undefined;
  /** a device whose name now is another device is taken anyway */
  evasiveDevices?: boolean | undefined;
  /** of inotify watches: look for the file everywhere, not only by its handle */
  forceIrmap?: boolean | undefined;
  irmapScanPaths?: readonly string[] | undefined;
  /** without root: with CAP_CHECKPOINT_RESTORE, and much that doesn't work */
  unprivileged?: boolean | undefined;

  cgroups?: "ignore" | "none" | "props" | "soft" | "full" | "strict" | "default" | undefined;
  /** by controller; without one, for all */
  cgroupRoots?: readonly { readonly path: string; readonly controller?: string }[] | undefined;
  /** which properties of cgroups are dumped: YAML, or a file of it */
  cgroupProps?: string | undefined;
  cgroupPropsFile?: string | undefined;
  cgroupDumpControllers?: readonly string[] | undefined;
  /** where CRIU finds cgroups mounted, instead of mounting them itself */
  cgroupYard?: string | undefined;

  /** memory by way of a page server: CRIU's lazy-pages, or one on another machine; `fd` is one of the worker's */
  pageServer?: { readonly address?: string; readonly port?: number; readonly fd?: number } | undefined;
  tls?: { caCert?: string; caCrl?: string; cert?: string; key?: string; verifyName?: boolean } | undefined;
  lazyPages?: boolean | undefined;
  /** pages that a later image has too are cut out of the earlier ones */
  autoDedup?: boolean | undefined;

  /** what of the CPU must be as it was. Writes and reads cpuinfo.img. Default: not looked at in images */
  cpu?: "none" | "fpu" | "instructions" | "strict" | undefined;
  /** AppArmor or SELinux label of restored tasks: "apparmor:name" or "selinux:label" */
  lsmProfile?: string | undefined;
  /** SELinux label of restored mounts */
  lsmMountContext?: string | undefined;
  /** statistics on CRIU's stdout, too */
  displayStats?: boolean | undefined;
}

export interface DumpOptions extends CommonOptions {
  pid: number;
  leaveRunning?: boolean | undefined;
  /** not running, but stopped (SIGSTOP) */
  leaveStopped?: boolean | undefined;
  /** images of a pre-dump: relative to the images, as CRIU makes a link of it */
  parentImages?: string | undefined;
  trackMemory?: boolean | undefined;
  /** how a pre-dump reads memory: by the tasks (splice) or from outside */
  preDumpMode?: "splice" | "read" | undefined;
  /** deleted files up to this size are taken along; default 1 MiB */
  ghostLimitBytes?: number | undefined;
  /** directory of a cgroup that CRIU freezes, or that is frozen already */
  freezeCgroup?: string | undefined;
  /** CRIU gives up when the tasks don't stop within; default 10 s */
  freezeTimeoutS?: number | undefined;
  /** a unix socket in which CRIU keeps pidfds between pre-dumps: finds out pids that are others by now */
  pidfdStoreFd?: number | undefined;
}

export interface RestoreOptions extends CommonOptions {
  /** root of the mount namespace */
  root?: string | undefined;
  /** the restored root task is the caller's child, not CRIU's: then the caller must reap it */
  sibling?: boolean | undefined;
  /** descriptors of the worker that take the place of external ones: key as `external` calls them */
  inheritFds?: readonly { readonly key: string; readonly fd: number }[] | undefined;
  /** namespaces that are joined instead of made: "net", "pid" …; `extra` is the user namespace's uid,gid */
  joinNamespaces?:
    | readonly { readonly kind: string; readonly file: string; readonly extra?: string }[]
    | undefined;
  /** restored tasks wait for SIGCONT */
  leaveStopped?: boolean | undefined;
  /** the pty whose slave is the console comes as a notification, `orphan-pts-master` */
  orphanPtsMaster?: boolean | undefined;
  weakSysctls?: boolean | undefined;
  /** files' read, write and execute bits may differ from the dump's */
  skipFileModeCheck?: boolean | undefined;
}

export type AnyOptions = Partial<Omit<DumpOptions, "imagesDir"> & Omit<RestoreOptions, "imagesDir">>;

const CLONE_NEWNET = 0x4000_0000;

/** Source: CRIU cr_options.h. 8: the image holds the CPU's description. */
const CPU_CAP = { none: 0, fpu: 1, instructions: 4, strict: 7 } as const;
const CPU_CAP_IMAGE = 8;

const cgroupModes = {
  ignore: CgroupMode.IGNORE,
  none: CgroupMode.CG_NONE,
  props: CgroupMode.PROPS,
  soft: CgroupMode.SOFT,
  full: CgroupMode.FULL,
  strict: CgroupMode.STRICT,
  default: CgroupMode.DEFAULT,
} as const;
const networkLocks = {
  iptables: NetworkLock.IPTABLES,
  nftables: NetworkLock.NFTABLES,
  skip: NetworkLock.SKIP,
} as const;
const preDumpModes = { splice: PreDumpMode.SPLICE, read: PreDumpMode.VM_READ } as const;

/**
 * As CRIU's RPC has them.
 * @param directories  open, of ours
 * @param childFd      the number that a descriptor of ours has in CRIU
 * @throws InvalidRequest for what CRIU would answer with nothing but EBADRQC, or ignore
 */
export function encodeOptions(
  options: AnyOptions,
  directories: { images: number; work: number | undefined },
  childFd: (fd: number) => number,
): OptionsInit {
  refuse(options);
  const { tls, pageServer: server } = options;
  return {
    imagesDirFd: directories.images,
    workDirFd: directories.work,
    logFile: options.logFile,
    logLevel: options.logLevel,
    configFile: options.configFile,
    external: options.external,
    autoExtMnt: options.autoExternalMounts,
    extSharing: options.externalSharing,
    extMasters: options.externalMasters,
    skipMnt: options.skipMounts,
    enableFs: options.enableFilesystems,
    mntnsCompatMode: options.mountNamespaceCompat,
    tcpEstablished: options.tcpEstablished,
    tcpClose: options.tcpClose,
    tcpSkipInFlight: options.tcpSkipInFlight,
    networkLock: options.networkLock && networkLocks[options.networkLock],
    emptyNs: options.emptyNetworkNamespace ? CLONE_NEWNET : undefined,
    extUnixSk: options.externalUnixSockets,
    shellJob: options.shellJob,
    fileLocks: options.fileLocks,
    linkRemap: options.linkRemap,
    evasiveDevices: options.evasiveDevices,
    forceIrmap: options.forceIrmap,
    irmapScanPaths: options.irmapScanPaths,
    unprivileged: options.unprivileged,
    manageCgroupsMode: options.cgroups && cgroupModes[options.cgroups],
    cgRoot: options.cgroupRoots?.map(({ path, controller }) => ({ path, ctrl: controller })),
    cgroupProps: options.cgroupProps,
    cgroupPropsFile: options.cgroupPropsFile,
    cgroupDumpController: options.cgroupDumpControllers,
    cgroupYard: options.cgroupYard,
    ps: server && {
      address: server.address,
      port: server.port,
      fd: server.fd === undefined ? undefined : childFd(server.fd),
    },
    tls: tls && true,
    tlsCacert: tls?.caCert,
    tlsCacrl: tls?.caCrl,
    tlsCert: tls?.cert,
    tlsKey: tls?.key,
    tlsNoCnVerify: tls?.verifyName === undefined ? undefined : !tls.verifyName,
    lazyPages: options.lazyPages,
    autoDedup: options.autoDedup,
    cpuCap: options.cpu && CPU_CAP[options.cpu] | CPU_CAP_IMAGE,
    lsmProfile: options.lsmProfile,
    lsmMountContext: options.lsmMountContext,
    displayStats: options.displayStats,
    leaveStopped: options.leaveStopped,

    pid: options.pid,
    leaveRunning: options.leaveRunning,
    parentImg: options.parentImages,
    trackMem: options.trackMemory,
    preDumpMode: options.preDumpMode && preDumpModes[options.preDumpMode],
    ghostLimit: options.ghostLimitBytes,
    freezeCgroup: options.freezeCgroup,
    timeout: options.freezeTimeoutS,
    pidfdStoreSk: options.pidfdStoreFd,

    root: options.root,
    rstSibling: options.sibling,
    inheritFd: options.inheritFds?.map(({ key, fd }) => ({ key, fd: childFd(fd) })),
    joinNs: options.joinNamespaces?.map(({ kind, file, extra }) => ({
      ns: kind,
      nsFile: file,
      extraOpt: extra,
    })),
    orphanPtsMaster: options.orphanPtsMaster,
    weakSysctls: options.weakSysctls,
    skipFileRwxCheck: options.skipFileModeCheck,
  };
}

/** The names that CRIU's RPC has for the options that are given: "tcp_established". */
export function rpcNames(options: AnyOptions): string[] {
  return namesOf(options, (value) => value !== undefined);
}

/** The names of all that `encodeOptions` may use. */
export function allRpcNames(): string[] {
  return namesOf({}, () => true);
}

function namesOf(options: AnyOptions, isWanted: (value: unknown) => boolean): string[] {
  const encoded = encodeOptions(options, { images: 0, work: undefined }, (fd) => fd);
  return Object.entries(encoded)
    .filter(([, value]) => isWanted(value))
    .map(([name]) => name.replaceAll(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`));
}

function refuse(options: AnyOptions): void {
  const { pid, logFile, parentImages, ghostLimitBytes: ghost, leaveRunning, leaveStopped } = options;
  if (pid !== undefined && !(Number.isInteger(pid) && pid > 0))
    throw new InvalidRequest(`pid ${pid} is of no process`);
  if (pid === process.pid) throw new InvalidRequest("we can't have ourselves dumped: CRIU is our child");
  if (logFile !== undefined && (logFile === "" || logFile.includes("/")))
    throw new InvalidRequest(`CRIU's log file ${JSON.stringify(logFile)} must be a name without a directory`);
  if (parentImages?.startsWith("/"))
    throw new InvalidRequest(
      `the parent's images ${parentImages} must be relative to the images: CRIU keeps the link`,
    );
  // CRIU's field has 32 bits.
  if (ghost !== undefined && !(Number.isInteger(ghost) && ghost >= 0 && ghost < 2 ** 32))
    throw new InvalidRequest(`the limit of deleted files must be less than 4 GiB, and is ${ghost}`);
  if (leaveRunning && leaveStopped) throw new InvalidRequest("tasks are left running or stopped, not both");
}
