import { resolve } from "node:path";
import { Args, Flags } from "@oclif/core";
import { Unavailable } from "../errors/index.ts";
import { checkpointRef } from "./checkpoint.ts";
import { CedanaCommand, ProgressLine } from "./command.ts";
import { jsonFlag } from "./flags.ts";

export class RestoreContainerd extends CedanaCommand {
  static override summary = "Restore a checkpoint as a container under containerd";
  static override description =
    "Without --id, the container that was dumped is restored in its place: it must be in containerd and have no running task. With --id, a container like it is made.";
  static override examples = [
    "cedana restore containerd web",
    "cedana restore containerd web@20261125T191500123Z --id web-2 --output /var/log/web-2.log",
  ];
  static override args = {
    checkpoint: Args.string({
      required: true,
      ignoreStdin: true,
      description: "NAME, NAME@GENERATION, or the path of a directory or an archive, with a slash in it",
    }),
  };
  static override flags = {
    id: Flags.string({ helpValue: "ID", description: "id of the container to make" }),
    like: Flags.string({
      helpValue: "ID",
      description: "container that the one to make is like; default: the one that was dumped",
    }),
    namespace: Flags.string({
      char: "n",
      helpValue: "NAMESPACE",
      description: "containerd namespace of the checkpoint and the container",
      default: "default",
    }),
    address: Flags.string({
      helpValue: "SOCKET",
      description: "containerd's socket",
      default: "/run/containerd/containerd.sock",
    }),
    output: Flags.string({
      helpValue: "FILE",
      description: "file for the container's stdout and stderr; default: nobody reads them",
    }),
    ...jsonFlag,
  };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(RestoreContainerd);
    const { Api } = await import("./api.ts");
    using api = await Api.open();
    using progress = new ProgressLine();
    const { id, like, namespace, address, output, json } = flags;
    const request = {
      checkpoint: checkpointRef(args.checkpoint, flags),
      ...{ id, like, namespace, address },
      output: output && resolve(output),
    };
    for await (const event of api.events("RestoreContainer", request, this.interruptible())) {
      if (event.progress) progress.show(event.progress);
      if (!event.result) continue;
      progress[Symbol.dispose]();
      const { result } = event;
      if (json) this.printJson(result);
      else this.log(`${result.id} runs, pid ${result.pid}, restored from ${result.checkpoint}`);
      return;
    }
    throw new Unavailable("cedanad ended the call without a result: its log says why");
  }
}
