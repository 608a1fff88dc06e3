import { open, readdir } from "node:fs/promises";
import { join } from "node:path";
import { messageOf, NotFound } from "../../errors/index.ts";
import { Findings, type ImageFinding } from "./findings.ts";
import { formatOfFile, rawKindOf } from "./format.ts";
import { Memory } from "./memory.ts";
import { ImageFault, ImageReader } from "./read.ts";
import { pidOf, References } from "./references.ts";
import type { Message } from "./value.ts";

/*
 * Whether a directory of images is whole, without restoring it. Two passes: every file by itself (words, messages, sizes), then
 * what the files say of each other. Nothing of the memory pages is read but their files' sizes, and of every other file one entry at a
 * time is in memory, so a checkpoint of any size takes a few MB; the time is that of reading all but the pages.
 *
 * What is found is what a restore would stumble over; that a file differs from what was dumped where it still makes sense, only
 * digests can tell, and those are the manifest's.
 */

export interface ImageReport {
  /** no errors */
  readonly ok: boolean;
  readonly findings: readonly ImageFinding[];
  /** more were found than are listed */
  readonly truncated: boolean;
  /** only memory, to be completed by a dump */
  readonly isPreDump: boolean;
  /** files that are images */
  readonly images: number;
  readonly tasks: number;
  readonly threads: number;
  /** memory in these images, and in those of parents */
  readonly pages: bigint;
  readonly parentPages: bigint;
  /** CRIU plugins that the restore needs */
  readonly plugins: readonly string[];
}

interface VerifyOptions {
  /** files that aren't CRIU's and aren't looked at, besides logs, descriptors.json and our manifest */
  ignore?: (name: string) => boolean;
  /** no image but those of memory: where it is, and that all of it is there; of earlier images, too */
  memoryOnly?: boolean;
  signal?: AbortSignal | undefined;
}

const IMG_VERSIONS = [1, 2];

/** Files beside the images that aren't CRIU's. */
const notImages =
  /\.(?:log|json|lock|pid|sock|conf)$|^(?:parent|cedana\..*|dump\.log.*|.*\.log\..*|\.criu.*)$/;

/** First words of what iproute2 saves. */
const ipWords: Readonly<Record<string, number>> = {
  ifaddr: 0x4736_1222,
  route: 0x4531_1224,
  route6: 0x4531_1224,
  rule: 0x7170_6986,
};

/**
 * @throws NotFound when there is no such directory; the error of read(2); an abort
 */
export async function verifyImages(directory: string, options: VerifyOptions = {}): Promise<ImageReport> {
  const check = new Check(directory, options);
  await check.run();
  return check.report();
}

class Check {
  readonly #directory: string;
  readonly #options: VerifyOptions;
  readonly #findings = new Findings();
  readonly #references = new References(this.#findings);
  readonly #memory: Memory;
  #names = new Set<string>();
  #images = 0;
  #parentPages = 0n;

  constructor(directory: string, options: VerifyOptions) {
    this.#directory = directory;
    this.#options = options;
    this.#memory = new Memory(this.#findings, directory);
  }

  async run(): Promise<void> {
    const { signal, memoryOnly } = this.#options;
    const readMemory = readPagemaps(this.#findings, signal);
    if (memoryOnly) {
      await readMemory(this.#memory, this.#directory, "");
      await this.#memory.checkPages([]);
      this.#parentPages = await this.#memory.checkParents(readMemory);
      return;
    }
    this.#names = new Set(await list(this.#directory));
    // By name: mm-* is before pagemap-*.
    for (const name of [...this.#names].sort()) {
      signal?.throwIfAborted();
      if (this.#options.ignore?.(name) || notImages.test(name)) continue;
      await this.#checkFile(name);
    }
    if (!this.#names.has("inventory.img")) {
      this.#findings.error("missing", "inventory.img", "is missing: this is no dump, or one that failed");
      return;
    }
    this.#checkInventory();
    await this.#memory.checkPages(this.#names);
    if (!this.#isPreDump) this.#references.check(this.#names);
    this.#parentPages = await this.#memory.checkParents(readMemory);
  }

  report(): ImageReport {
    const plugins = (this.#references.inventory?.plugins_entry as Message | undefined)?.plugins;
    return {
      ok: !this.#findings.hasErrors,
      findings: this.#findings.list,
      truncated: this.#findings.isTruncated,
      isPreDump: this.#isPreDump,
      images: this.#images,
      tasks: this.#references.tasks,
      threads: this.#references.threads,
      pages: this.#memory.pages,
      parentPages: this.#parentPages,
      plugins: (plugins as string[] | undefined) ?? [],
    };
  }

  async #checkFile(name: string): Promise<void> {
    const raw = rawKindOf(name);
    if (raw === "pages") return; // with the pagemaps
    if (raw === "opaque") {
      this.#images++;
      await this.#checkOpaque(name);
      return;
    }
    const format = formatOfFile(name);
    if (!format) {
      if (name.endsWith(".img"))
        this.#findings.warning("stray", name, "is no image that CRIU 4.2 has: nothing in it was checked");
      return;
    }
    this.#images++;
    try {
      await using image = await ImageReader.open(join(this.#directory, name), { exact: false });
      if (image.format !== format) {
        this.#findings.error(
          "magic",
          { file: name, offset: 0 },
          `holds ${image.format.name}, and is called like ${format.name}`,
        );
        return;
      }
      let at = 0;
      for await (const entry of image.entries()) {
        const place = { file: name, offset: entry.offset };
        if (format.name === "PAGEMAP") this.#memory.addPagemap(place, entry.value, entry.message);
        if (format.name === "MM") this.#memory.addMappings(place, pidOf(name), entry.value);
        this.#references.add(name, format.name, entry);
        at++;
      }
      const single = /^(?:INVENTORY|CORE|IDS|MM|FS|CGROUP|SECCOMP|STATS|UTSNS|TIMENS|GHOST_FILE|TCP_STREAM)$/;
      if (at === 0 && single.test(format.name))
        this.#findings.error(
          "length",
          { file: name, offset: image.size },
          "ends where its entry should begin",
        );
    } catch (error) {
      if (!(error instanceof ImageFault)) throw error;
      this.#findings.error(error.kind, error, error.what);
    }
  }

  async #checkOpaque(name: string): Promise<void> {
    await using file = await open(join(this.#directory, name));
    const head = Buffer.alloc(4);
    const { bytesRead } = await file.read(head, 0, 4, 0);
    if (name.includes(".tar.gz")) {
      if (bytesRead < 2 || head.readUInt16BE(0) !== 0x1f8b)
        this.#findings.error("magic", { file: name, offset: 0 }, "is not compressed by gzip");
      return;
    }
    const word = ipWords[name.split("-")[0]!];
    if (word === undefined || bytesRead === 0) return; // text, or nothing to restore
    if (bytesRead < 4 || head.readUInt32LE(0) !== word)
      this.#findings.error(
        "magic",
        { file: name, offset: 0 },
        `doesn't begin with 0x${word.toString(16)}, as ip(8) saves it`,
      );
  }

  get #isPreDump(): boolean {
    return this.#references.inventory?.pre_dump_mode !== undefined && !this.#names.has("pstree.img");
  }

  #checkInventory(): void {
    const version = Number(this.#references.inventory?.img_version);
    if (this.#references.inventory && !IMG_VERSIONS.includes(version))
      this.#findings.error(
        "version",
        "inventory.img",
        `images of version ${version}: of a newer CRIU than we know`,
      );
  }
}

/** What Memory reads earlier images with. */
function readPagemaps(findings: Findings, signal: AbortSignal | undefined) {
  return async (into: Memory, directory: string, prefix: string): Promise<void> => {
    for (const name of (await list(directory)).sort()) {
      signal?.throwIfAborted();
      if (formatOfFile(name)?.name !== "PAGEMAP") continue;
      try {
        await using image = await ImageReader.open(join(directory, name), { exact: false });
        for await (const { value, offset, message } of image.entries())
          into.addPagemap({ file: name, offset }, value, message);
      } catch (error) {
        if (!(error instanceof ImageFault)) throw error;
        findings.error(error.kind, { file: `${prefix}${name}`, offset: error.offset }, error.what);
      }
    }
  };
}

async function list(directory: string): Promise<string[]> {
  try {
    return await readdir(directory);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code !== "ENOENT" && code !== "ENOTDIR") throw error;
    throw new NotFound(`the images ${directory}: ${messageOf(error)}`, { cause: error });
  }
}
