import { resolve } from "node:path";
import { Args, Flags } from "@oclif/core";
import { compressions } from "../checkpoint/archive/compressions.ts";
import type { Extracted, ReadOptions } from "../checkpoint/archive/index.ts";
import { CedanaCommand, mib } from "./command.ts";
import { jsonFlag, secretFlags } from "./flags.ts";
import { secretOf } from "./secret.ts";

// `cedana archive …`: checkpoints as files. No cedanad is asked: whoever may read the checkpoint may do this.

const layouts = ["cedana", "podman", "crio", "containerd-cri"] as const;

const limitFlags = {
  "max-bytes": Flags.integer({
    helpValue: "BYTES",
    description: "refuse an archive that holds more; default: what is free, less a twentieth",
    min: 0,
  }),
  "max-ratio": Flags.integer({
    helpValue: "TIMES",
    description: "refuse an archive that grows to more than so many times its size; zeros don't count",
    min: 1,
  }),
};

abstract class ArchiveCommand extends CedanaCommand {
  protected async secret(flags: {
    "key-file"?: string | undefined;
    "passphrase-file"?: string | undefined;
  }): Promise<{ secret?: Uint8Array }> {
    const secret = await secretOf(flags["key-file"], flags["passphrase-file"]);
    return secret ? { secret } : {};
  }

  protected async readOptions(flags: {
    "key-file"?: string | undefined;
    "passphrase-file"?: string | undefined;
    "max-bytes"?: number | undefined;
    "max-ratio"?: number | undefined;
  }): Promise<ReadOptions> {
    return {
      ...(await this.secret(flags)),
      limits: { bytes: flags["max-bytes"], ratio: flags["max-ratio"] },
    };
  }

  /** What was read, for people or as JSON. */
  protected tell(what: string, found: Extracted, json: boolean): void {
    if (json) {
      this.log(JSON.stringify(found, undefined, 2));
      return;
    }
    this.describe(what, found.description);
    this.log(
      `${found.files} files, ${mib(found.bytes)}; archive ${mib(found.archiveBytes)}, ${found.compression}${found.encrypted ? ", encrypted" : ""}`,
    );
    this.log(
      found.verified > 0
        ? `${found.verified} files are as the manifest says`
        : "no digests to compare with: the archive is whole, more is not known",
    );
  }

  protected describe(
    what: string,
    { container, layout, rootfsDiff, manifest }: Extracted["description"],
  ): void {
    this.log(`${what}: checkpoint of ${container.id || "an unnamed container"}, layout ${layout}`);
    const facts = {
      name: container.name,
      image: container.image,
      pod: [container.namespace, container.pod].filter(Boolean).join("/"),
      taken: container.createdAt,
      engine: [container.runtime, manifest?.engine.version].filter(Boolean).join(" "),
      kernel: manifest?.kernel ?? "",
      rootfs: rootfsDiff ? "changes included" : "",
    };
    for (const [name, value] of Object.entries(facts)) if (value) this.log(`  ${name.padEnd(7)} ${value}`);
  }
}

const archiveArg = Args.string({ description: "file of the archive", required: true });

export class ArchiveCreate extends ArchiveCommand {
  static override summary = "Write a checkpoint's directory as one file";
  static override description = "The archive is there when it is whole. Its key or passphrase encrypts it.";
  static override examples = [
    "cedana archive create /var/tmp/cp web.tar.zst",
    "cedana archive create /var/tmp/cp web.tar --layout podman --compression gzip",
  ];
  static override args = {
    directory: Args.string({ description: "directory of the checkpoint", required: true }),
    archive: Args.string({ description: "file to write", required: true }),
  };
  static override flags = {
    ...jsonFlag,
    ...secretFlags,
    compression: Flags.string({ description: "how to compress", options: compressions, default: "zstd" }),
    level: Flags.integer({
      helpValue: "N",
      description: "1 is quickest; zstd up to 19, gzip and lz4 up to 9",
      default: 1,
    }),
    layout: Flags.string({
      description: "whose tools are to restore it",
      options: layouts,
      default: "cedana",
    }),
    replace: Flags.boolean({ description: "replace a file that is there" }),
    verify: Flags.boolean({ description: "compare every file with the manifest on the way" }),
  };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(ArchiveCreate);
    const { createArchive } = await import("../checkpoint/archive/index.ts");
    const { level, replace, verify } = flags;
    const made = await createArchive(resolve(args.directory), resolve(args.archive), {
      compression: flags.compression as (typeof compressions)[number],
      layout: flags.layout as (typeof layouts)[number],
      level,
      replace,
      verify,
      ...(await this.secret(flags)),
    });
    this.log(
      flags.json
        ? JSON.stringify(made, undefined, 2)
        : `${args.archive}: ${made.files} files, ${mib(made.tarBytes)} in ${mib(made.archiveBytes)}`,
    );
  }
}

export class ArchiveExtract extends ArchiveCommand {
  static override summary = "Extract a checkpoint's archive, of ours, Podman's, CRI-O's or containerd's";
  static override description = "The directory is there when all of the archive is checked.";
  static override examples = ["cedana archive extract web.tar.zst /var/tmp/cp2"];
  static override args = {
    archive: archiveArg,
    directory: Args.string({ description: "directory to make", required: true }),
  };
  static override flags = {
    ...jsonFlag,
    ...secretFlags,
    ...limitFlags,
    replace: Flags.boolean({ description: "replace a directory that is there" }),
  };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(ArchiveExtract);
    const { extractArchive } = await import("../checkpoint/archive/index.ts");
    const options = { ...(await this.readOptions(flags)), replace: flags.replace };
    this.tell(
      args.directory,
      await extractArchive(resolve(args.archive), resolve(args.directory), options),
      flags.json,
    );
  }
}

export class ArchiveShow extends ArchiveCommand {
  static override summary = "Show of which container a checkpoint is, and when and how it was taken";
  static override description = "An archive is read to its end, so it is known to be whole.";
  static override examples = ["cedana archive show web.tar.zst"];
  static override args = {
    checkpoint: Args.string({ description: "archive, or directory", required: true }),
  };
  static override flags = { ...jsonFlag, ...secretFlags, ...limitFlags };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(ArchiveShow);
    const { describeDirectory, isDirectory, verifyArchive } = await import("../checkpoint/archive/index.ts");
    const path = resolve(args.checkpoint);
    if (!(await isDirectory(path))) {
      this.tell(args.checkpoint, await verifyArchive(path, await this.readOptions(flags)), flags.json);
      return;
    }
    const description = await describeDirectory(path);
    if (flags.json) this.log(JSON.stringify({ description }, undefined, 2));
    else this.describe(args.checkpoint, description);
  }
}

export class ArchiveVerify extends ArchiveCommand {
  static override summary = "Compare a checkpoint with the digests of its manifest";
  static override description =
    "Nothing is written. `cedana checkpoint verify` also looks into CRIU's images, and whether this node can restore them.";
  static override examples = ["cedana archive verify web.tar.zst", "cedana archive verify /var/tmp/cp"];
  static override args = {
    checkpoint: Args.string({ description: "archive, or directory", required: true }),
  };
  static override flags = { ...jsonFlag, ...secretFlags, ...limitFlags };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(ArchiveVerify);
    const { isDirectory, verifyArchive, verifyDirectory } = await import("../checkpoint/archive/index.ts");
    const path = resolve(args.checkpoint);
    const { verified } = (await isDirectory(path))
      ? await verifyDirectory(path)
      : await verifyArchive(path, await this.readOptions(flags));
    if (flags.json) this.log(JSON.stringify({ verified }, undefined, 2));
    else this.log(`${args.checkpoint} is whole; ${verified} files are as the manifest says`);
  }
}
