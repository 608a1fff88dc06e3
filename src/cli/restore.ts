import { resolve } from "node:path";
import { Args, Flags } from "@oclif/core";
import { Unavailable } from "../errors/index.ts";
import { checkpointRef } from "./checkpoint.ts";
import { CedanaCommand, ProgressLine } from "./command.ts";

export class RestoreContainerd extends CedanaCommand {
  static override description =
    "Restore a checkpoint as a container under containerd: the container that was dumped, which must not be running, or with --id a new one like it";
  static override examples = [
    "cedana restore containerd web",
    "cedana restore containerd web@20261125T191500123Z --id web-2 --output /var/log/web-2.log",
  ];
  static override args = {
    checkpoint: Args.string({
      required: true,
      ignoreStdin: true,
      description: "NAME (by default the container's id), NAME@GENERATION, or a path with a slash in it",
    }),
  };
  static override flags = {
    id: Flags.string({ description: "of the container; default: the one that was dumped" }),
    like: Flags.string({
      description: "existing container that a new one is like; default: the one that was dumped",
    }),
    namespace: Flags.string({ char: "n", description: "containerd namespace", default: "default" }),
    address: Flags.string({ description: "containerd's socket", default: "/run/containerd/containerd.sock" }),
    output: Flags.string({ description: "file for its stdout and stderr; default: nobody reads them" }),
    json: Flags.boolean({ description: "print JSON" }),
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
