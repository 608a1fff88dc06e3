import { Args, Flags } from "@oclif/core";
import { CedanaCommand } from "./command.ts";
import { jsonFlag } from "./flags.ts";

// `cedana image …`: CRIU's image files by themselves. Needs neither cedanad nor CRIU. The code behind it loads when it runs.

export class ImageDecode extends CedanaCommand {
  static override summary = "Print an image of CRIU as JSON, as `crit decode` does";
  static override description =
    "Of a directory, every image is written as a file into another one (--output).";
  static override examples = [
    "cedana image decode checkpoint/pstree.img | jq '.entries[].pid'",
    "cedana image decode checkpoint --output json",
  ];
  static override args = {
    image: Args.string({
      required: true,
      ignoreStdin: true,
      description: "image file, or directory of images",
    }),
  };
  static override flags = {
    output: Flags.string({
      char: "o",
      helpValue: "PATH",
      description: "file, or directory, to write to instead of stdout",
    }),
    pretty: Flags.boolean({
      description: "print addresses in hexadecimal, flags by name, devices as major:minor",
    }),
    payload: Flags.boolean({
      default: true,
      allowNo: true,
      description: "print what lies behind messages: contents of pipes, queues, deleted files",
    }),
  };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(ImageDecode);
    const { decodeDirectory, decodeFile } = await import("./image-files.ts");
    const { output, payload, pretty } = flags;
    const count = await decodeDirectory(args.image, output, { payload, pretty });
    if (count === undefined) await decodeFile(args.image, output, { payload, pretty });
    else this.log(`${count} images decoded to ${flags.output}`);
  }
}

export class ImageEncode extends CedanaCommand {
  static override summary = "Make an image of CRIU from the JSON of `image decode` or `crit decode`";
  static override examples = ["cedana image encode pstree.json --output checkpoint/pstree.img"];
  static override args = {
    json: Args.string({ description: "JSON file; default: stdin", ignoreStdin: true }),
  };
  static override flags = {
    output: Flags.string({
      char: "o",
      helpValue: "FILE",
      description: "image to write instead of stdout; it is there when it is whole",
    }),
  };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(ImageEncode);
    const { encodeFile } = await import("./image-files.ts");
    await encodeFile(args.json, flags.output);
  }
}

export class ImageVerify extends CedanaCommand {
  static override summary = "Say whether a directory of CRIU's images is whole, without restoring it";
  static override description = "Exit code 0: it is; 2: it isn't, or (--here) not for this machine.";
  static override examples = ["cedana image verify /var/lib/cedana/checkpoints/web/checkpoint"];
  static override args = {
    directory: Args.string({ required: true, ignoreStdin: true, description: "directory of images" }),
  };
  static override flags = {
    ...jsonFlag,
    here: Flags.boolean({
      description: "also look whether this machine can restore it: architecture, CPU, CRIU's plugins",
    }),
  };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(ImageVerify);
    const { stringify, verifyImages } = await import("../criu/image/index.ts");
    const report = await verifyImages(args.directory);
    const unsuitable = flags.here && report.ok ? await findUnsuitableHere(args.directory) : [];
    if (flags.json) this.log(stringify(flags.here ? { ...report, unsuitable } : report));
    else {
      for (const { severity, kind, file, offset, what } of report.findings)
        this.log(`${severity}: ${file}${offset === undefined ? "" : ` at ${offset}`}: ${what} (${kind})`);
      if (report.truncated) this.log("… and more");
      for (const problem of unsuitable) this.log(`not here: ${problem}`);
      const { images, tasks, threads, pages, parentPages, plugins } = report;
      this.log(
        `${report.ok ? "whole" : "broken"}: ${images} images, ${tasks} tasks, ${threads} threads, ${pages} pages${
          parentPages > 0n ? ` and ${parentPages} in earlier images` : ""
        }${report.isPreDump ? ", a pre-dump" : ""}${plugins.length > 0 ? `, needs ${plugins.join(", ")}` : ""}`,
      );
    }
    if (!report.ok || unsuitable.length > 0) this.exit(2);
  }
}

async function findUnsuitableHere(directory: string): Promise<string[]> {
  const { findUnsuitable } = await import("../criu/suitability.ts");
  return await findUnsuitable(directory);
}
