import { resolve } from "node:path";
import { Args, Flags } from "@oclif/core";
import type { Checkpoint, CheckpointRefInit, Finding, Process } from "../proto/generated/cedana_api.ts";
import { CedanaCommand, mib, ProgressLine } from "./command.ts";
import { jsonFlag, secretFlags } from "./flags.ts";

// `cedana checkpoint …`: the checkpoints of cedanad's store, and any other by its path.

const ownerFlags = {
  namespace: Flags.string({
    char: "n",
    helpValue: "NAMESPACE",
    description: "containerd namespace that owns the name",
    default: "default",
  }),
  "pod-namespace": Flags.string({
    helpValue: "NAMESPACE",
    description: "Kubernetes namespace of the pod that owns the name",
  }),
};
const checkpointArg = {
  checkpoint: Args.string({
    required: true,
    ignoreStdin: true,
    description: "NAME, NAME@GENERATION, or the path of a directory or an archive, with a slash in it",
  }),
};

/** What people write, as the API has it. */
export function checkpointRef(
  checkpoint: string,
  flags: { namespace: string; "pod-namespace"?: string | undefined },
): CheckpointRefInit {
  if (checkpoint.includes("/")) return { path: resolve(checkpoint) };
  return { namespace: flags.namespace, podNamespace: flags["pod-namespace"], name: checkpoint };
}

export class CheckpointList extends CedanaCommand {
  static override summary = "List the checkpoints of the store, the oldest of each name first";
  static override examples = ["cedana checkpoint list", "cedana checkpoint list -n k8s.io web"];
  static override args = {
    name: Args.string({ ignoreStdin: true, description: "only checkpoints of this name" }),
  };
  static override flags = {
    namespace: Flags.string({
      char: "n",
      helpValue: "NAMESPACE",
      description: "only checkpoints that this containerd namespace owns",
    }),
    "pod-namespace": Flags.string({
      helpValue: "NAMESPACE",
      description: "of these, only those of this Kubernetes namespace",
      dependsOn: ["namespace"],
    }),
    ...jsonFlag,
  };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(CheckpointList);
    const { Api } = await import("./api.ts");
    using api = await Api.open();
    const { checkpoints } = await api.call("ListCheckpoints", {
      namespace: flags.namespace,
      podNamespace: flags["pod-namespace"],
      name: args.name,
    });
    if (flags.json) this.printJson(checkpoints);
    else if (checkpoints.length === 0) this.log("no checkpoints");
    else
      this.printTable(
        ["OWNER", "CHECKPOINT", "CONTAINER", "ENGINE", "SIZE", "TAKEN"],
        checkpoints.map((one) => [ownerText(one), `${one.name}@${one.generation}`, ...factsText(one)]),
      );
  }
}

function ownerText({ namespace, podNamespace }: Checkpoint): string {
  return podNamespace === "" ? namespace : `${namespace}/${podNamespace}`;
}

function factsText({ fault, containerId, engine, bytes, createdAt }: Checkpoint): string[] {
  return fault === "" ? [containerId, engine, mib(Number(bytes)), createdAt] : [`✖ ${fault}`];
}

export class CheckpointInspect extends CedanaCommand {
  static override summary = "Show of which container a checkpoint is, how it was taken, and its processes";
  static override examples = [
    "cedana checkpoint inspect web",
    "cedana checkpoint inspect /var/tmp/cp --json",
  ];
  static override args = checkpointArg;
  static override flags = { ...ownerFlags, ...jsonFlag };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(CheckpointInspect);
    const { Api } = await import("./api.ts");
    using api = await Api.open();
    const { manifestJson, ...rest } = await api.call("InspectCheckpoint", {
      checkpoint: checkpointRef(args.checkpoint, flags),
    });
    const manifest = manifestJson === "" ? undefined : JSON.parse(manifestJson);
    if (flags.json) {
      this.printJson({ ...rest, manifest });
      return;
    }
    this.log(rest.path);
    if (!manifest) this.log("  it has no manifest: it was taken by another program");
    else for (const [name, value] of manifestLines(manifest)) this.log(`  ${name.padEnd(10)} ${value}`);
    this.log(`  memory     ${mib(Number(rest.memoryBytes))}`);
    for (const line of treeLines(rest.processes)) this.log(`  ${line}`);
  }
}

type Manifest = import("../checkpoint/manifest.ts").CheckpointManifest;

function manifestLines(manifest: Manifest): [string, string][] {
  const { engine, options, image, files } = manifest;
  const used = Object.entries(options)
    .filter(([, value]) => value !== false && value !== "" && !(Array.isArray(value) && value.length === 0))
    .map(([name, value]) => (value === true ? name : `${name}=${String(value)}`));
  const bytes = files.reduce((sum, { size }) => sum + size, 0);
  const lines: [string, string | undefined][] = [
    ["container", [manifest.namespace, manifest.containerId].filter(Boolean).join("/")],
    ["image", image?.name],
    ["taken", `${manifest.createdAt}, in ${Math.round(manifest.timings.totalMs)} ms`],
    ["engine", `${engine.name} ${engine.version}`],
    ["CRIU", manifest.criuVersion],
    ["kernel", manifest.kernel],
    ["plugins", manifest.plugins?.map(({ name, version }) => `${name} ${version}`.trim()).join(", ")],
    ["options", used.join(", ")],
    ...gpuLines(manifest),
    ["files", `${files.length}, ${mib(bytes)}`],
  ];
  return lines.filter((line): line is [string, string] => Boolean(line[1]));
}

/** What it says of GPUs: by what means, the driver, each device that was used, each process. */
function gpuLines({ gpu }: Manifest): [string, string][] {
  if (!gpu) return [];
  const used = new Set(gpu.processes.flatMap(({ devices = [] }) => devices));
  const driver = gpu.driver === undefined ? "" : `, driver ${gpu.driver}`;
  return [
    ["GPU state", `of ${gpu.processes.length} processes, by ${gpu.means}${driver}`],
    ...gpu.devices
      .filter(({ uuid }) => used.size === 0 || used.has(uuid))
      .map(({ uuid, name, memoryBytes }): [string, string] => [
        "GPU",
        `${name}, ${mib(memoryBytes)}, ${uuid}`,
      ]),
    ...gpu.processes.map(({ pidInContainer, comm, memoryBytes, times }): [string, string] => {
      const bytes = memoryBytes === undefined ? "" : `, ${mib(memoryBytes)} of GPU memory`;
      const parts = Object.entries(times).map(([name, ms]) => `${name.replace("Ms", "")} ${ms} ms`);
      return ["on GPU", `${pidInContainer} ${comm}${bytes}: ${parts.join(", ")}`];
    }),
  ];
}

function treeLines(processes: readonly Process[], parent = 0, indent = ""): string[] {
  const pids = new Set(processes.map(({ pid }) => pid));
  const below = processes.filter(({ parentPid }) =>
    parent === 0 ? !pids.has(parentPid) : parentPid === parent,
  );
  return below.flatMap((one) => [
    `${indent}${one.pid} ${one.command}${one.threads > 1 ? `, ${one.threads} threads` : ""}, ${mib(Number(one.memoryBytes))}`,
    ...treeLines(processes, one.pid, `${indent}  `),
  ]);
}

export class CheckpointVerify extends CedanaCommand {
  static override summary = "Say whether a checkpoint can be restored, without restoring it";
  static override description =
    "Compares every file with the manifest, looks into CRIU's images, and at what this node lacks. Exit code 0: it is whole; 2: it isn't, or this node can't restore it.";
  static override examples = [
    "cedana checkpoint verify web",
    "cedana checkpoint verify ./web.tar.zst --key-file key --no-here",
  ];
  static override args = checkpointArg;
  static override flags = {
    ...ownerFlags,
    here: Flags.boolean({
      description: "look at what this node lacks: architecture, CPU, CRIU and its plugins",
      default: true,
      allowNo: true,
    }),
    ...secretFlags,
    ...jsonFlag,
  };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(CheckpointVerify);
    const { secretOf } = await import("./secret.ts");
    const secret = await secretOf(flags["key-file"], flags["passphrase-file"]);
    const { Api } = await import("./api.ts");
    using api = await Api.open();
    using progress = new ProgressLine();
    const request = {
      checkpoint: checkpointRef(args.checkpoint, flags),
      here: flags.here,
      ...(secret && { secret }),
    };
    for await (const event of api.events("VerifyCheckpoint", request, this.interruptible())) {
      if (event.progress) progress.show(event.progress);
      if (!event.result) continue;
      progress[Symbol.dispose]();
      const { ok, findings, digests, bytes } = event.result;
      if (flags.json) this.printJson(event.result);
      else {
        for (const finding of findings) this.log(findingText(finding));
        this.log(
          ok
            ? `${args.checkpoint} is whole: ${mib(Number(bytes))}, ${digests} files as they were dumped`
            : `${args.checkpoint} can't be restored${flags.here ? " here" : ""}`,
        );
      }
      if (!ok) this.exit(2);
    }
  }
}

function findingText({ severity, fault, file, message }: Finding): string {
  return `${severity}: ${file && !message.startsWith(file) ? `${file}: ` : ""}${message} (${fault})`;
}
