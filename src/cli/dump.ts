import { Args, Flags } from "@oclif/core";
import { compressions } from "../checkpoint/archive/compressions.ts";
import { Unavailable } from "../errors/index.ts";
import { CedanaCommand, ProgressLine } from "./command.ts";

export class DumpContainerd extends CedanaCommand {
  static override description =
    "Take a checkpoint of a container under containerd into the node's store; it runs on, and stands still only as long as CRIU needs";
  static override args = { container: Args.string({ description: "id of the container", required: true }) };
  static override flags = {
    namespace: Flags.string({ description: "containerd namespace, when the id is in several" }),
    name: Flags.string({
      description: "name of the checkpoint; default: cedana.io/checkpoint-name, or POD.CONTAINER, or the id",
    }),
    exit: Flags.boolean({ description: "the container ends with the dump" }),
    compression: Flags.string({
      description: "make one file of it, compressed like this; without it, it is a directory",
      options: compressions,
    }),
    "encrypt-key-file": Flags.string({
      description: "encrypt that file with this one's bytes",
      dependsOn: ["compression"],
    }),
    "encrypt-passphrase-file": Flags.string({
      description: 'encrypt it with the passphrase in this one\'s first line; "-" is stdin',
      dependsOn: ["compression"],
      exclusive: ["encrypt-key-file"],
    }),
    json: Flags.boolean({ description: "print JSON" }),
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
          `${result.name}@${result.generation}: ${(Number(result.bytes) / 2 ** 20).toFixed(1)} MiB in ${result.path}; it stood still for ${result.frozenMs.toFixed(0)} ms`,
        );
      return;
    }
    throw new Unavailable("cedanad ended the call without a result: its log says why");
  }
}
