import { Flags } from "@oclif/core";
import { compressions } from "../checkpoint/archive/compressions.ts";
import { Unavailable } from "../errors/index.ts";
import { CedanaCommand, mib, ProgressLine } from "./command.ts";
import { containerArg, jsonFlag, namespaceFlag } from "./flags.ts";

export class DumpContainerd extends CedanaCommand {
  static override summary = "Take a checkpoint of a container into the node's store";
  static override description =
    "The container runs on, and stands still only for its changed files and CRIU. Ctrl-C gives the dump up. `cedana checkpoint list` shows the store.";
  static override examples = [
    "cedana dump containerd web",
    "cedana dump containerd web --name nightly --compression zstd",
    "cedana dump containerd web --exit --json",
  ];
  static override args = containerArg;
  static override flags = {
    ...namespaceFlag,
    name: Flags.string({
      helpValue: "NAME",
      description:
        "name of the checkpoint; default: annotation cedana.io/checkpoint-name, else POD.CONTAINER, else the id",
    }),
    exit: Flags.boolean({ description: "end the container with the dump" }),
    compression: Flags.string({
      description: "write an archive, compressed in this way; default: a directory",
      options: compressions,
    }),
    "encrypt-key-file": Flags.string({
      helpValue: "FILE",
      description: "encrypt the archive; the key is the bytes of this file",
      dependsOn: ["compression"],
    }),
    "encrypt-passphrase-file": Flags.string({
      helpValue: "FILE",
      description: 'encrypt the archive; the passphrase is the first line of this file; "-" is stdin',
      dependsOn: ["compression"],
      exclusive: ["encrypt-key-file"],
    }),
    ...jsonFlag,
  };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(DumpContainerd);
    const { secretOf } = await import("./secret.ts");
    const secret = await secretOf(flags["encrypt-key-file"], flags["encrypt-passphrase-file"]);
    const { Api } = await import("./api.ts");
    using api = await Api.open();
    using progress = new ProgressLine();
    const request = {
      id: args.container,
      namespace: flags.namespace,
      name: flags.name,
      exit: flags.exit,
      compression: flags.compression,
      ...(secret && { secret }),
    };
    for await (const { progress: step, result } of api.events(
      "DumpContainer",
      request,
      this.interruptible(),
    )) {
      if (step) progress.show(step);
      if (!result) continue;
      progress[Symbol.dispose]();
      if (flags.json) this.printJson(result);
      else
        this.log(
          `${result.name}@${result.generation}: ${mib(Number(result.bytes))} in ${result.path}; it stood still for ${result.frozenMs.toFixed(0)} ms`,
        );
      return;
    }
    throw new Unavailable("cedanad ended the call without a result: its log says why");
  }
}
