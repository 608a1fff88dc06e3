// The configuration of a private containerd.

import { execFileSync } from "node:child_process";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { PAUSE_IMAGE } from "./programs.ts";

interface Wanted {
  /** of the instance: what the configuration names is made in it */
  readonly dir: string;
  /** its socket */
  readonly address: string;
  readonly logLevel: string;
  readonly snapshotter: string;
  /** Kubernetes' interface, with one runtime handler; undefined: there is none */
  readonly cri:
    | {
        handler: string;
        type: string;
        path: string | undefined;
        engine: string;
        engineRoot: string;
        systemdCgroup: boolean;
      }
    | undefined;
}

/** The text of config.toml. What it names is made. */
export function containerdConfig(wanted: Wanted): string {
  // Not needed here, and slow to start or in need of directories outside of ours.
  const disabled = [
    ...(wanted.cri ? [] : ["io.containerd.grpc.v1.cri"]),
    "io.containerd.internal.v1.opt",
    "io.containerd.nri.v1.nri",
  ];
  return [
    "version = 2", // 2.x migrates it
    `root = "${wanted.dir}/root"`,
    `state = "${wanted.dir}/state"`,
    `disabled_plugins = ${JSON.stringify(disabled)}`,
    "oom_score = 0",
    "[grpc]",
    `  address = "${wanted.address}"`,
    "[ttrpc]",
    `  address = "${wanted.address}.ttrpc"`,
    "[debug]",
    `  level = "${wanted.logLevel}"`,
    ...(wanted.snapshotter === "blockfile" ? blockfileConfig(wanted.dir) : []),
    ...(wanted.cri ? criConfig(wanted.dir, wanted.cri) : []),
    "",
  ].join("\n");
}

/** For pods that aren't in the node's network: an address each on their lo, and nothing else. */
function writeCni(dir: string): void {
  const [configuration, programs] = [join(dir, "cni"), join(dir, "cni-bin")];
  for (const directory of [configuration, programs]) mkdirSync(directory, { mode: 0o755 });
  const conflist = { cniVersion: "0.3.1", name: "pods", plugins: [{ type: "address" }] };
  writeFileSync(join(configuration, "10-pods.conflist"), JSON.stringify(conflist));
  const cniVersion = "0.3.1";
  const says = (answer: object) =>
    `printf '%s\\n' '${JSON.stringify({ cniVersion, ...answer })}' | sed "s|ADDRESS|$address|; s|NETNS|$CNI_NETNS|"`;
  const script = [
    "#!/bin/sh",
    "cat >/dev/null", // its configuration
    `case "$CNI_COMMAND \${0##*/}" in`,
    `VERSION*) ${says({ supportedVersions: [cniVersion] })} ;;`,
    `"ADD address")`,
    `  echo >>${dir}/cni-pods`,
    `  address=192.0.2.$(wc -l <${dir}/cni-pods)`,
    `  nsenter --net="$CNI_NETNS" sh -c "ip link set lo up && ip address add $address/32 dev lo" >&2 || exit 1`,
    `  ${says({
      interfaces: [{ name: "eth0", sandbox: "NETNS" }],
      ips: [{ version: "4", interface: 0, address: "ADDRESS/32" }],
    })} ;;`,
    `ADD*) ${says({ interfaces: [], ips: [] })} ;;`,
    "esac",
  ];
  for (const name of ["address", "loopback"])
    writeFileSync(join(programs, name), `${script.join("\n")}\n`, { mode: 0o755 });
}

/** Each snapshot is a file with a file system, the first one an empty one. */
function blockfileConfig(dir: string): string[] {
  const scratch = join(dir, "scratch.img");
  execFileSync("mkfs.ext4", ["-q", scratch, "32M"], { stdio: "ignore" });
  return [
    `[plugins."io.containerd.snapshotter.v1.blockfile"]`,
    `  root_path = "${dir}/root/blockfile"`,
    `  scratch_file = "${scratch}"`,
    `  fs_type = "ext4"`,
  ];
}

function criConfig(dir: string, cri: NonNullable<Wanted["cri"]>): string[] {
  writeCni(dir);
  const plugin = `plugins."io.containerd.grpc.v1.cri"`;
  return [
    `[${plugin}]`,
    `  sandbox_image = "${PAUSE_IMAGE}"`,
    "  restrict_oom_score_adj = true", // this machine may not let us lower it
    "  disable_apparmor = true",
    `  stream_server_port = "0"`,
    "  netns_mounts_under_state_dir = true",
    `  [${plugin}.cni]`,
    `    conf_dir = "${dir}/cni"`,
    `    bin_dir = "${dir}/cni-bin"`,
    `  [${plugin}.containerd]`,
    `    default_runtime_name = "${cri.handler}"`,
    `  [${plugin}.containerd.runtimes.${cri.handler}]`,
    `    runtime_type = "${cri.type}"`,
    ...(cri.path ? [`    runtime_path = "${cri.path}"`] : []),
    `    pod_annotations = ["cedana.io/*"]`,
    `    container_annotations = ["cedana.io/*"]`,
    `    [${plugin}.containerd.runtimes.${cri.handler}.options]`,
    `      BinaryName = "${cri.engine}"`,
    `      Root = "${cri.engineRoot}"`,
    `      SystemdCgroup = ${cri.systemdCgroup}`,
  ];
}
