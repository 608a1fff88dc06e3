// OCI specs like ctr's default one, with the few things that tests vary.

export interface SpecOptions {
  args: string[];
  cwd?: string | undefined;
  env?: string[] | undefined;
  terminal?: boolean | undefined;
  annotations?: Record<string, string> | undefined;
  mounts?: { destination: string; type: string; source: string; options: string[] }[] | undefined;
  /** bytes; needs the memory controller */
  memoryLimit?: number | undefined;
  pidsLimit?: number | undefined;
  /** namespaces joined by path; `host` leaves the namespace out */
  namespaces?: Partial<Record<"pid" | "ipc" | "uts" | "network", string>> | undefined;
  /** changes the finished spec */
  edit?: ((spec: Spec) => void) | undefined;
}

// biome-ignore lint/suspicious/noExplicitAny: a document that tests also break on purpose
export type Spec = Record<string, any>;

const CAPABILITIES = [
  "CAP_CHOWN",
  "CAP_DAC_OVERRIDE",
  "CAP_FSETID",
  "CAP_FOWNER",
  "CAP_MKNOD",
  "CAP_NET_RAW",
  "CAP_SETGID",
  "CAP_SETUID",
  "CAP_SETFCAP",
  "CAP_SETPCAP",
  "CAP_NET_BIND_SERVICE",
  "CAP_SYS_CHROOT",
  "CAP_KILL",
  "CAP_AUDIT_WRITE",
];

export function processSpec(options: Pick<SpecOptions, "args" | "cwd" | "env" | "terminal">): Spec {
  return {
    terminal: options.terminal ?? false,
    user: { uid: 0, gid: 0 },
    args: options.args,
    env: ["PATH=/programs:/usr/bin:/bin", "TERM=dumb", ...(options.env ?? [])],
    cwd: options.cwd ?? "/",
    capabilities: { bounding: CAPABILITIES, effective: CAPABILITIES, permitted: CAPABILITIES },
    rlimits: [{ type: "RLIMIT_NOFILE", hard: 1024, soft: 1024 }],
    noNewPrivileges: true,
  };
}

const tmpfs = (destination: string, source: string, ...options: string[]) => ({
  destination,
  type: source === "shm" ? "tmpfs" : source,
  source,
  options: ["nosuid", ...options],
});

export function containerSpec(options: SpecOptions & { cgroupsPath: string; programs: string }): Spec {
  const namespaces = (["pid", "ipc", "uts", "network"] as const)
    .filter((type) => options.namespaces?.[type] !== "host")
    .map((type) => {
      const path = options.namespaces?.[type];
      return path ? { type, path } : { type };
    });
  const spec: Spec = {
    ociVersion: "1.0.2",
    process: processSpec(options),
    root: { path: "rootfs" },
    mounts: [
      tmpfs("/proc", "proc", "noexec", "nodev"),
      tmpfs("/dev", "tmpfs", "strictatime", "mode=755", "size=65536k"),
      tmpfs("/dev/pts", "devpts", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
      tmpfs("/dev/shm", "shm", "noexec", "nodev", "mode=1777", "size=65536k"),
      tmpfs("/dev/mqueue", "mqueue", "noexec", "nodev"),
      tmpfs("/sys", "sysfs", "noexec", "nodev", "ro"),
      tmpfs("/run", "tmpfs", "strictatime", "mode=755", "size=65536k"),
      { destination: "/programs", type: "bind", source: options.programs, options: ["rbind", "ro"] },
      ...(options.mounts ?? []),
    ],
    linux: {
      cgroupsPath: options.cgroupsPath,
      namespaces: [...namespaces, { type: "mount" }],
      resources: {
        devices: [{ allow: false, access: "rwm" }],
        ...(options.memoryLimit !== undefined && { memory: { limit: options.memoryLimit } }),
        ...(options.pidsLimit !== undefined && { pids: { limit: options.pidsLimit } }),
      },
      maskedPaths: ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
      readonlyPaths: ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
    },
    ...(options.annotations && { annotations: options.annotations }),
  };
  options.edit?.(spec);
  return spec;
}
