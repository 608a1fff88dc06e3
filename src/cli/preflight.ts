import { Args, Flags } from "@oclif/core";
import { CedanaCommand } from "./command.ts";

export class Preflight extends CedanaCommand {
  static override description =
    "Say what keeps a container from being checkpointed, and which options a checkpoint needs; nothing is touched. Exit status 2: it can't be checkpointed as it is";
  static override args = { container: Args.string({ description: "id of a container of cedanad's" }) };
  static override flags = {
    pid: Flags.integer({ description: "a process, with all that descend from it, instead of a container" }),
    namespace: Flags.string({ description: "containerd namespace, when the id is in several" }),
    destination: Flags.string({
      description: "directory for the checkpoint, to see whether it has the space",
    }),
    json: Flags.boolean({ description: "print JSON (see preflight.schema.json)" }),
  };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(Preflight);
    const { runPreflight } = await import("./preflight-report.ts"); // big, and only this command needs it
    const { text, document } = await runPreflight({ ...flags, container: args.container });
    this.log(flags.json ? JSON.stringify(document, undefined, 2) : text);
    if (!document.ok) this.exit(2);
  }
}
