import { Args, Flags } from "@oclif/core";
import { CedanaCommand } from "./command.ts";
import { jsonFlag, namespaceFlag } from "./flags.ts";

export class Preflight extends CedanaCommand {
  static override summary = "Say what keeps a container from being checkpointed; nothing is touched";
  static override description =
    "Names every blocker, and every option that a checkpoint needs. Exit code 2: it can't be checkpointed as it is.";
  static override examples = [
    "cedana preflight web",
    "cedana preflight $(podman inspect --format {{.Id}} web)",
    "cedana preflight --pid 4711 --destination /backup",
    "cedana preflight web --json",
  ];
  static override args = {
    container: Args.string({
      ignoreStdin: true,
      description: "id of a container under cedana's shim, or of one of runc's or crun's",
    }),
  };
  static override flags = {
    pid: Flags.integer({
      helpValue: "PID",
      description: "a process and all that descend from it, instead of a container",
    }),
    ...namespaceFlag,
    root: Flags.string({
      helpValue: "DIRECTORY",
      description:
        "an engine's state with the container in it; default: /run/runc, /run/crun and $XDG_RUNTIME_DIR/crun",
    }),
    destination: Flags.string({
      helpValue: "DIRECTORY",
      description: "where the checkpoint would go, to see whether it has the space",
    }),
    ...jsonFlag,
  };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(Preflight);
    const { runPreflight } = await import("./preflight-report.ts"); // big, and only this command needs it
    const { text, document } = await runPreflight({ ...flags, container: args.container });
    this.log(flags.json ? JSON.stringify(document, undefined, 2) : text);
    if (!document.ok) this.exit(2);
  }
}
