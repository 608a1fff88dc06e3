import {
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import {
  decodeImage,
  encodeImage,
  type ImageReport,
  verifyImages,
  verifyImagesInWorker,
} from "../../src/criu/image/index.ts";
import { parse, stringify } from "../../src/criu/image/json.ts";
import { encodeMessage } from "../../src/criu/image/message.ts";
import { CriuWorker } from "../../src/criu/worker.ts";
import { NotFound } from "../../src/errors/index.ts";
import { Victim, Workplace, whyNoDump } from "./harness.ts";
import { randomBytes, randomSource } from "./synthetic.ts";

// biome-ignore lint/suspicious/noExplicitAny: entries of any image, to be spoiled
type Entries = any[];
const reason = whyNoDump();

let original: Workplace;
let whole: string;
let place: Workplace;
let images: string;

async function editImage(
  file: string,
  change: (entries: Entries) => void,
  directory = images,
): Promise<void> {
  const parts: string[] = [];
  for await (const part of decodeImage(join(directory, file))) parts.push(part);
  const image = parse(parts.join("")) as { entries: Entries };
  change(image.entries);
  const bytes: Uint8Array[] = [];
  async function* text() {
    yield stringify(image);
  }
  for await (const part of encodeImage(text())) bytes.push(part);
  writeFileSync(join(directory, file), Buffer.concat(bytes));
}

const faults = (report: ImageReport) =>
  report.findings.map(({ severity, kind, file, what }) => `${severity} ${kind} ${file}: ${what}`);
const nameOf = (pattern: RegExp) => readdirSync(images).find((name) => pattern.test(name))!;
function patch(file: string, change: (bytes: Buffer) => Buffer | undefined): void {
  const bytes = readFileSync(join(images, file));
  writeFileSync(join(images, file), change(bytes) ?? bytes);
}

describe.skipIf(reason)(`verifying a dump${reason ? ` (${reason})` : ""}`, () => {
  beforeAll(async () => {
    original = new Workplace();
    whole = join(original.path, "images");
    mkdirSync(whole);
    await using victim = await Victim.zoo(original.path);
    await using worker = await CriuWorker.start();
    const options = { tcpEstablished: true, fileLocks: true, linkRemap: true, shellJob: true };
    await worker.dump({ pid: victim.pid, imagesDir: whole, leaveRunning: true, ...options });
  });
  afterAll(() => original[Symbol.dispose]());
  beforeEach(() => {
    place = new Workplace();
    images = join(place.path, "images");
    cpSync(whole, images, { recursive: true });
  });
  afterEach(() => place[Symbol.dispose]());

  it("finds nothing in one that is whole, here and in a thread", async () => {
    const report = await verifyImages(images);
    expect(faults(report)).toEqual([]);
    expect(report).toMatchObject({
      ok: true,
      truncated: false,
      isPreDump: false,
      tasks: 3,
      threads: 4,
      plugins: [],
    });
    expect(report.pages).toBeGreaterThan(100n);
    expect(report.parentPages).toBe(0n);
    expect(await verifyImagesInWorker(images)).toEqual(report);
    await expect(verifyImages(join(images, "none"))).rejects.toThrow(NotFound);
    await expect(verifyImagesInWorker(join(images, "none"))).rejects.toThrow(NotFound);
    const abort = AbortSignal.abort(new Error("enough"));
    await expect(verifyImages(images, { signal: abort })).rejects.toThrow("enough");
    await expect(verifyImagesInWorker(images, { signal: abort })).rejects.toThrow("enough");
  });

  const cases: [title: string, spoil: () => unknown, found: RegExp][] = [
    ["no inventory", () => rmSync(join(images, "inventory.img")), /error missing inventory.img: .*no dump/],
    ["no tree", () => rmSync(join(images, "pstree.img")), /error missing pstree.img/],
    [
      "no core",
      () => rmSync(join(images, "core-3.img")),
      /error missing core-3.img: .*task 3, of pstree.img at \d+/,
    ],
    [
      "no core of a thread",
      () => rmSync(join(images, "core-2.img")),
      /error missing core-2.img: .*thread 2 of task 1/,
    ],
    ["no memory", () => rmSync(join(images, "mm-1.img")), /error missing mm-1.img: .*memory of task 1/],
    ["no pagemap", () => rmSync(join(images, "pagemap-1.img")), /error missing pagemap-1.img/],
    ["no descriptors", () => rmSync(join(images, "fdinfo-2.img")), /error missing fdinfo-2.img/],
    ["no directories", () => rmSync(join(images, "fs-1.img")), /error missing fs-1.img/],
    ["no ids", () => rmSync(join(images, "ids-1.img")), /error missing ids-1.img/],
    ["no files", () => rmSync(join(images, "files.img")), /error missing files.img: .*references/],
    [
      "no host name",
      () => rmSync(join(images, nameOf(/^utsns/))),
      /error missing utsns-\d+.img: .*namespace of task/,
    ],
    ["no mounts", () => rmSync(join(images, nameOf(/^mountpoints/))), /error missing mountpoints-\d+.img/],
    [
      "no content of a deleted file",
      () => rmSync(join(images, "ghost-file-1.img")),
      /error missing ghost-file-1.img: .*content of deleted file/,
    ],
    [
      "no state of a connection",
      () => rmSync(join(images, nameOf(/^tcp-stream/))),
      /error missing tcp-stream-.*TCP connection of socket/,
    ],
    [
      "no content of a memfd",
      () => rmSync(join(images, nameOf(/^pagemap-shmem-[1-9]/))),
      /error missing pagemap-shmem-\d+.img: .*content of memfd/,
    ],

    [
      "other words",
      () =>
        patch("core-1.img", (bytes) => {
          bytes.write("oops");
          return undefined;
        }),
      /error magic core-1.img: begins with 0x73706f6f/,
    ],
    [
      "words of another type",
      () => cpSync(join(images, "fs-1.img"), join(images, "ids-1.img")),
      /error magic ids-1.img: holds FS, and is called like IDS/,
    ],
    [
      "an unknown type",
      () =>
        patch("mm-1.img", (bytes) => {
          bytes.writeUInt32LE(7, 4);
          return undefined;
        }),
      /error magic mm-1.img: the type word 0x7 is unknown/,
    ],
    [
      "an empty file",
      () => truncateSync(join(images, "pstree.img"), 0),
      /error magic pstree.img: 0 bytes are no image/,
    ],
    [
      "words alone",
      () => truncateSync(join(images, "core-1.img"), 8),
      /error length core-1.img: ends where its entry should begin/,
    ],
    [
      "a file cut short",
      () => patch("files.img", (bytes) => bytes.subarray(0, -5)),
      /error length files.img: .*where the file has \d+ left/,
    ],
    [
      "a file cut in a size",
      () => patch("pstree.img", (bytes) => Buffer.concat([bytes, Buffer.from("ab")])),
      /error length pstree.img: ends inside of the size/,
    ],
    [
      "data cut short",
      () => patch("pipes-data.img", (bytes) => bytes.subarray(0, -1)),
      /error length pipes-data.img: 9 bytes of data belong/,
    ],
    [
      "an entry longer than its file",
      () =>
        patch("fs-1.img", (bytes) => {
          bytes.writeUInt32LE(99, 8);
          return undefined;
        }),
      /error length fs-1.img: a fs_entry of 99 bytes/,
    ],
    [
      "a message that is none",
      () =>
        patch("fs-1.img", (bytes) => {
          bytes.fill(0xff, 12);
          return undefined;
        }),
      /error message fs-1.img: not a fs_entry/,
    ],
    [
      "a message without a required field",
      () =>
        patch("fs-1.img", (bytes) => Buffer.concat([bytes.subarray(0, 8), Buffer.from([2, 0, 0, 0, 8, 1])])),
      /error message fs-1.img: .*lacks its field root_id/,
    ],
    [
      "a firewall of other words",
      () => writeFileSync(join(images, nameOf(/^ifaddr/)), "no addresses"),
      /error magic ifaddr-\d+.img: doesn't begin with 0x47361222/,
    ],
    [
      "a tarball that is none",
      () => writeFileSync(join(images, "tmpfs-dev-7.tar.gz.img"), "no gzip"),
      /error magic tmpfs-dev-7.tar.gz.img: .*gzip/,
    ],

    [
      "pages cut short",
      () => truncateSync(join(images, "pages-3.img"), 4096),
      /error pages pages-3.img: has 4096 bytes, where pagemap-1.img has \d+ pages/,
    ],
    [
      "pages too many",
      () => patch("pages-1.img", (bytes) => Buffer.concat([bytes, Buffer.alloc(4096)])),
      /error pages pages-1.img: has 12288 bytes/,
    ],
    ["no pages", () => rmSync(join(images, "pages-3.img")), /error missing pages-3.img: .*pagemap-1.img has/],
    ["pages of nobody", () => writeFileSync(join(images, "pages-99.img"), ""), /warning stray pages-99.img/],
    [
      "pages in the wrong order",
      () => editImage("pagemap-1.img", (entries) => entries.push(entries[1])),
      /error pages pagemap-1.img: pages from 0x[0-9a-f]+ on overlap/,
    ],
    [
      "pages at half a page",
      () =>
        editImage("pagemap-1.img", (entries) => {
          entries.at(-1).vaddr = BigInt(entries.at(-1).vaddr) + 16n;
        }),
      /error pages pagemap-1.img: pages .* don't begin with a page/,
    ],
    [
      "no pages in an entry",
      () =>
        editImage("pagemap-1.img", (entries) => {
          entries.at(-1).nr_pages = 0n;
        }),
      /error pages pagemap-1.img: .* are none/,
    ],
    [
      "pages outside of mappings",
      () => editImage("mm-1.img", ([mm]) => mm.vmas.pop() && mm.vmas.pop()),
      /error pages pagemap-1.img: pages .* are in no mapping of mm-1.img/,
    ],
    [
      "mappings that overlap",
      () => editImage("mm-1.img", ([mm]) => mm.vmas.push(mm.vmas[0])),
      /error pages mm-1.img: the mapping at 0x[0-9a-f]+ ends before it begins, or overlaps/,
    ],

    [
      "a task twice",
      () => editImage("pstree.img", (entries) => entries.push(entries[1])),
      /error reference pstree.img: task 3 was there before/,
    ],
    [
      "a task of no parent",
      () =>
        editImage("pstree.img", (entries) => {
          entries[1].ppid = 77;
        }),
      /error reference pstree.img: the parent 77 of task 3/,
    ],
    [
      "two roots",
      () =>
        editImage("pstree.img", (entries) => {
          entries[1].ppid = 0;
        }),
      /error reference pstree.img: 2 tasks have no parent/,
    ],
    [
      "a core of no task",
      () => cpSync(join(images, "core-3.img"), join(images, "core-88.img")),
      /warning stray core-88.img/,
    ],
    [
      "memory of no task",
      () => cpSync(join(images, "mm-3.img"), join(images, "mm-88.img")),
      /warning stray mm-88.img/,
    ],
    [
      "a descriptor of no file",
      () =>
        editImage("fdinfo-2.img", (entries) => {
          entries[3].id = 999;
        }),
      /error reference fdinfo-2.img: descriptor \d+ is file 999, which is not in files.img/,
    ],
    [
      "a descriptor of another type",
      () =>
        editImage("fdinfo-2.img", (entries) => {
          entries[3].type = "PIPE";
        }),
      /error reference fdinfo-2.img: .*of type PIPE, which files.img has as/,
    ],
    [
      "a file twice",
      () => editImage("files.img", (entries) => entries.push(entries[0])),
      /error reference files.img: file \d+ was there before, at \d+/,
    ],
    [
      "a file that says nothing",
      () =>
        editImage("files.img", (entries) => {
          delete entries[0].reg;
        }),
      /error message files.img: file \d+ of type REG says nothing/,
    ],
    [
      "a file on no mount",
      () =>
        editImage("files.img", (entries) => {
          entries[0].reg.mnt_id = 9999;
        }),
      /error reference files.img: file \d+ is on mount 9999/,
    ],
    [
      "a mapping of no file",
      () =>
        editImage("mm-1.img", ([mm]) => {
          mm.vmas[0].shmid = 998n;
        }),
      /error reference mm-1.img: the mapping at 0x400000 is file 998/,
    ],
    [
      "no program",
      () =>
        editImage("mm-1.img", ([mm]) => {
          mm.exe_file_id = 997;
        }),
      /error reference mm-1.img: the program is file 997/,
    ],
    [
      "no working directory",
      () =>
        editImage("fs-1.img", ([fs]) => {
          fs.cwd_id = 996;
        }),
      /error reference fs-1.img: the working directory is file 996/,
    ],
    [
      "a deleted file of no file",
      () =>
        editImage("remap-fpath.img", ([remap]) => {
          remap.orig_id = 995;
        }),
      /error reference remap-fpath.img: a deleted file is file 995/,
    ],
    [
      "content of no pipe",
      () =>
        editImage("pipes-data.img", ([data]) => {
          data.pipe_id = 5;
        }),
      /error reference pipes-data.img: content is of pipe 5/,
    ],
    [
      "content of no FIFO",
      () =>
        editImage("fifo-data.img", ([data]) => {
          data.pipe_id = 6;
        }),
      /error reference fifo-data.img: content is of FIFO 6/,
    ],
    [
      "packets of no socket",
      () =>
        editImage("sk-queues.img", ([packet]) => {
          packet.id_for = 994;
        }),
      /error reference sk-queues.img: content is of socket 994/,
    ],
    [
      "a terminal without settings",
      () => editImage("tty-info.img", (entries) => entries.pop()),
      /error reference files.img: file \d+ is terminal \d+/,
    ],
    [
      "a filter that isn't there",
      () =>
        editImage("core-1.img", ([core]) => {
          core.thread_core.seccomp_filter = 5;
        }),
      /error reference core-1.img: seccomp filter 5 is not in seccomp.img, which has 1/,
    ],
    [
      "no registers",
      () =>
        editImage("core-1.img", ([core]) => {
          delete core.thread_info;
        }),
      /error message core-1.img: has no registers/,
    ],

    [
      "images of a newer CRIU",
      () =>
        editImage("inventory.img", ([inventory]) => {
          inventory.img_version = 9;
        }),
      /error version inventory.img: images of version 9/,
    ],
    [
      "an image that we don't know",
      () => writeFileSync(join(images, "flux-1.img"), "x"),
      /warning stray flux-1.img: is no image that CRIU 4.2 has/,
    ],
    [
      "earlier images that are gone",
      () => symlinkSync("../nowhere", join(images, "parent")),
      /warning parent parent: the link to earlier images, ..\/nowhere, leads nowhere; nothing was left to them/,
    ],
    [
      "earlier images that are these",
      () => symlinkSync(".", join(images, "parent")),
      /error parent parent: .* leads back to where it came from/,
    ],
    [
      "pages left to no earlier images",
      () => leaveToParent(),
      /error parent pagemap-3.img: leaves pages to earlier images, and there is no link/,
    ],
  ];

  it.each(cases)("finds %s", async (_, spoil, found) => {
    await spoil();
    const report = await verifyImages(images);
    expect(faults(report).join("\n")).toMatch(found);
    expect(report.ok).toBe(!faults(report).some((fault) => fault.startsWith("error")));
    if (found.source.startsWith("error")) expect(report.ok).toBe(false);
  });

  /** Turns the first pages of task 3 into pages that earlier images have, and takes them out of these. */
  async function leaveToParent(): Promise<{ count: number }> {
    let [id, count] = [0, 0];
    await editImage("pagemap-3.img", (entries) => {
      id = entries[0].pages_id;
      count = Number(entries[1].nr_pages);
      entries[1].flags = 1;
    });
    patch(`pages-${id}.img`, (bytes) => bytes.subarray(4096 * count));
    return { count };
  }

  it("follows images to earlier ones, and finds what those lack", async () => {
    const before = join(place.path, "before");
    mkdirSync(before);
    for (const name of readdirSync(images))
      if (/^(?:inventory|pages-|pagemap-)/.test(name)) cpSync(join(images, name), join(before, name));
    await editImage(
      "inventory.img",
      ([inventory]) => {
        inventory.pre_dump_mode = 1;
      },
      before,
    );
    const { count } = await leaveToParent();
    symlinkSync("../before", join(images, "parent"));
    const report = await verifyImages(images);
    expect(faults(report)).toEqual([]);
    const all = (await verifyImages(before)).pages;
    expect(report.pages).toBe(all - BigInt(count));
    expect(report.parentPages).toBe(all);
    expect(await verifyImages(images, { memoryOnly: true })).toMatchObject({
      ok: true,
      images: 0,
      pages: report.pages,
      parentPages: all,
    });
    // By itself the pre-dump is whole, and known as one.
    expect(await verifyImages(before)).toMatchObject({ ok: true, isPreDump: true, tasks: 0 });

    await editImage("pagemap-3.img", (entries) => entries.splice(1, 1), before);
    expect(faults(await verifyImages(images)).join("\n")).toMatch(
      /error parent pagemap-3.img: leaves pages from 0x[0-9a-f]+ on to earlier images, which lack them/,
    );
    truncateSync(join(before, "pages-1.img"), 100);
    expect(faults(await verifyImages(images)).join("\n")).toMatch(
      /error pages parent\/pages-1.img: has 100 bytes/,
    );
    writeFileSync(join(before, "pagemap-3.img"), "no image");
    for (const memoryOnly of [false, true])
      expect(faults(await verifyImages(images, { memoryOnly })).join("\n")).toMatch(
        /error magic parent\/pagemap-3.img: begins with/,
      );
    rmSync(before, { recursive: true });
    expect(faults(await verifyImagesInWorker(images, { memoryOnly: true }))).toEqual([
      "error parent parent: the link to earlier images, ../before, leads nowhere",
    ]);
  });

  it("finds something to say, and never fails, whatever bytes there are", async () => {
    const names = readdirSync(images).filter((name) => name.endsWith(".img") && !name.startsWith("pages"));
    for (let seed = 1; seed <= 60; seed++) {
      const random = randomSource(seed);
      const name = names[random(names.length)]!;
      const good = readFileSync(join(images, name));
      const cut = random(good.length);
      const bad = Buffer.concat([
        good.subarray(0, cut),
        randomBytes(random, random(4)),
        good.subarray(cut + random(4)),
      ]);
      writeFileSync(join(images, name), bad);
      const report = await verifyImages(images);
      if (bad.length < good.length && !/tar|table|route|rule|addr/.test(name))
        expect(report.ok, `${name}, seed ${seed}`).toBe(false);
      writeFileSync(join(images, name), good);
    }
  });

  it("lists many faults up to a limit", async () => {
    const entry = encodeMessage("pagemap_entry", {
      vaddr: 4096n,
      compat_nr_pages: 0,
      flags: 4,
      nr_pages: 1n,
    });
    const size = Buffer.alloc(4);
    size.writeUInt32LE(entry.length);
    patch("pagemap-1.img", (bytes) =>
      Buffer.concat([bytes, ...Array.from({ length: 3000 }, () => [size, entry]).flat()]),
    );
    const report = await verifyImages(images);
    expect(report.findings).toHaveLength(1000);
    expect(report.truncated).toBe(true);
  });

  it("is not misled by what else lies there", async () => {
    for (const name of ["dump.log", "descriptors.json", "cedana.json", "README"])
      writeFileSync(join(images, name), "");
    mkdirSync(join(images, "work.log"));
    renameSync(join(images, "dump.log"), join(images, "dump.log.1"));
    expect(existsSync(join(images, "stats-dump"))).toBe(true);
    expect(faults(await verifyImages(images))).toEqual([]);
  });
});
