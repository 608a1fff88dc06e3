import { execFile } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { formatOfName } from "../../src/criu/image/format.ts";
import { Workplace } from "../criu/harness.ts";
import { randomImage, randomSource } from "../criu/synthetic.ts";

const repository = join(import.meta.dirname, "../..");
const isBuilt = existsSync(join(repository, "dist/commands.js"));

interface Outcome {
  readonly status: number;
  readonly stdout: string;
  readonly stderr: string;
}

function cedana(args: string[], stdin = ""): Promise<Outcome> {
  return new Promise((resolve) => {
    const child = execFile(join(repository, "bin/cedana"), args, (error, stdout, stderr) =>
      resolve({
        status: error ? Number(error.code) : 0,
        stdout,
        stderr,
      }),
    );
    child.stdin!.end(stdin);
  });
}

describe.skipIf(!isBuilt)("cedana image (needs `npm run build`)", () => {
  let place: Workplace;
  let images: string;
  beforeEach(() => {
    place = new Workplace();
    images = join(place.path, "images");
    mkdirSync(images);
    for (const [file, type] of [
      ["pstree.img", "PSTREE"],
      ["files.img", "FILES"],
    ] as const)
      writeFileSync(join(images, file), randomImage(formatOfName(type)!, randomSource(3)));
    writeFileSync(join(images, "route-9.img"), "$\x121E");
    writeFileSync(join(images, "pages-1.img"), "");
  });
  afterEach(() => place[Symbol.dispose]());

  it("decodes a file to stdout, and encodes what comes from stdin", async () => {
    const decoded = await cedana(["image", "decode", join(images, "files.img")]);
    expect(decoded).toMatchObject({ status: 0, stderr: "" });
    expect(decoded.stdout).toMatch(/^\{"magic": "FILES", "entries": \[\n/);
    const output = join(place.path, "files.img");
    expect(await cedana(["image", "encode", "--output", output], decoded.stdout)).toMatchObject({
      status: 0,
    });
    expect(readFileSync(output)).toEqual(readFileSync(join(images, "files.img")));
    expect(statSync(output).mode & 0o777).toBe(0o600);
  });

  it("decodes a directory, all but its memory", async () => {
    const output = join(place.path, "json");
    const { status, stdout } = await cedana(["image", "decode", images, "-o", output]);
    expect({ status, stdout }).toEqual({ status: 0, stdout: `3 images decoded to ${output}\n` });
    expect(readdirSync(output)).toEqual(["files.img.json", "pstree.img.json", "route-9.img.json"]);
    expect((await cedana(["image", "decode", images])).stderr).toContain("say with --output");
  });

  it("leaves no file behind that isn't whole", async () => {
    const output = join(place.path, "out");
    const failed = await cedana(
      ["image", "encode", "-o", output],
      '{"magic": "PSTREE", "entries": [{"pid": 1}]}',
    );
    expect(failed.status).toBe(1);
    expect(failed.stderr).toContain("entry 0: pstree_entry.ppid is missing");
    expect(readdirSync(place.path)).toEqual(["images"]);
  });

  it("says by its exit status whether images are whole", async () => {
    const broken = await cedana(["image", "verify", images]);
    expect(broken.status).toBe(2);
    expect(broken.stdout).toMatch(
      /^error: inventory.img: is missing: this is no dump, or one that failed \(missing\)$/m,
    );
    expect(broken.stdout).toMatch(/^broken: 3 images/m);
    const missing = await cedana(["image", "verify", join(images, "none"), "--json"]);
    expect(missing).toMatchObject({ status: 1, stdout: "" });
    expect(missing.stderr).toContain("ENOENT");
  });
});
