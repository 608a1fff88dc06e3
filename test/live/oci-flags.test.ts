import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import {
  copyFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmdirSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { type AddressInfo, createServer } from "node:net";
import { join } from "node:path";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { CallerPlace, missingCallers, type Side } from "./harness/callers.ts";
import { DeadlyCriu } from "./harness/deadly-criu.ts";
import { busyboxRootfs, programs, repository } from "./harness/programs.ts";
import { containerSpec, type SpecOptions } from "./harness/spec.ts";
import { cgroupRoots, entries, pidsInCgroups } from "./harness/system.ts";
import { until } from "./harness/until.ts";

// Options of checkpoint and restore that only migration tools use, through cedana-runtime. crun has fewer of its own than runc.

const missing = missingCallers(); // for the mount namespace and the reaper
const tracksDirtyPages = spawnSync("criu", ["check", "--feature", "mem_dirty_track"]).status === 0;
const side: Side = process.env.CEDANA_TEST_OCI === "engine" ? "engine" : "wrapper";
/** Of the program that the chains of pre-dumps are about; it has some more. */
const PAGES = 256;

describe.skipIf(missing).each(["runc", "crun"] as const)(
  "cedana-runtime checkpoint and restore over %s",
  (engine) => {
    const withRunc = it.skipIf(engine === "crun");
    let place: CallerPlace;
    let bundle: string;
    let deadly: DeadlyCriu;
    const started: ChildProcess[] = [];
    beforeAll(async () => {
      deadly = new DeadlyCriu();
      place = await CallerPlace.start(engine, { first: deadly.directory });
      bundle = join(place.dir, "b");
      busyboxRootfs(bundle);
      configure("b", await programs());
    });
    afterEach(async () => {
      for (const root of ["one", "two"]) await runtime(root, "delete", "--force", "box");
      for (const child of started.splice(0)) child.kill("SIGKILL");
      for (const name of ["images", "pages", "work", "out", "pid", "status", "one", "two"])
        rmSync(at(name), { recursive: true, force: true });
      await place.expectNoLeftovers((argv) => /cedanad/.test(argv));
    });
    afterAll(async () => {
      await place?.stop();
      deadly?.[Symbol.dispose]();
    });

    const at = (name: string) => join(place.dir, name);
    const runtime = (root: string, ...args: string[]) =>
      place.run(place.runtime(side, "--root", at(root), ...args));
    let testPrograms = "";
    function configure(
      cgroup: string,
      mounted = testPrograms,
      args = ["counter", "20"],
      namespaces: SpecOptions["namespaces"] = {},
    ): void {
      testPrograms = mounted;
      const cgroupsPath = place.cgroupsPath(cgroup);
      const spec = containerSpec({ args, cgroupsPath, programs: mounted, namespaces });
      writeFileSync(join(bundle, "config.json"), JSON.stringify(spec));
    }

    function background(script: string, argv: string[]): ChildProcess {
      const [program, ...rest] = place.inside(["sh", "-c", script, "sh", ...argv]);
      const stdio = ["ignore", "ignore", "ignore", "pipe"] as const;
      const child = spawn(program!, rest, { env: place.env, cwd: place.dir, stdio: [...stdio] });
      started.push(child);
      return child;
    }
    /** A program whose --status-fd is 7. @returns it, when something has come there, which is ended by its end */
    async function withStatus(output: string, argv: string[]): Promise<ChildProcess> {
      const fifo = at(`${output}.status`);
      rmSync(fifo, { force: true });
      expect(spawnSync("mkfifo", [fifo]).status).toBe(0);
      background(`cat ${fifo} >${fifo}.said; echo end >${fifo}.end`, []);
      const child = background(`exec "$@" >>${at(output)} 2>&1 7>${fifo} 3>&-`, argv); // for runc it must not be readable, too
      const said = () => (existsSync(`${fifo}.said`) ? readFileSync(`${fifo}.said`) : Buffer.alloc(0));
      await until(() => said().length > 0 || existsSync(`${fifo}.end`), {
        what: () => `a status: ${readFileSync(at(output), "utf8")}`,
      });
      expect([...said()], readFileSync(at(output), "utf8")).toEqual([0]);
      return child;
    }
    /** A container's output by a real pipe: Node's are sockets, which CRIU can't put in the place of a pipe. */
    function counting(root: string, ...args: string[]): ChildProcess {
      const line = place.runtime(side, "--root", at(root), ...args, "--detach", "--bundle", bundle, "box");
      return background(`"$@" 2>&1 3>&- | cat >>${at("out")} 3>&-`, line);
    }
    const endOf = async (child: ChildProcess) =>
      await until(() => child.exitCode !== null, { what: () => "the end of a command" });
    const goesOn = async (before: number) =>
      await until(() => numbers().length > before + 1, {
        what: () => `it to go on: ${readFileSync(at("out"), "utf8").slice(-2000)}`,
      });
    const numbers = () =>
      existsSync(at("out"))
        ? readFileSync(at("out"), "utf8")
            .split("\n")
            .filter((line) => /^\d+$/.test(line))
            .map(Number)
        : [];
    async function begin(args?: string[], namespaces?: SpecOptions["namespaces"]): Promise<void> {
      configure("b", testPrograms, args, namespaces);
      counting("one", "run");
      await until(() => numbers().length > 2, {
        what: () =>
          `it to count: ${existsSync(at("out")) ? readFileSync(at("out"), "utf8").slice(-2000) : "it says nothing"}`,
      });
    }

    async function freePort(): Promise<string> {
      const server = createServer();
      await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
      const { port } = server.address() as AddressInfo;
      await new Promise((resolve) => server.close(resolve));
      return String(port);
    }

    withRunc(
      "tells on --status-fd that lazy pages can be fetched, and serves them",
      {
        timeout: 60_000,
      },
      async () => {
        await begin();
        const [images, work] = [at("images"), at("work")];
        mkdirSync(work);
        const port = await freePort();
        const flags = ["--lazy-pages", "--page-server", `127.0.0.1:${port}`, "--status-fd", "7"];
        const argv = place.runtime(
          "wrapper",
          "--root",
          at("one"),
          "checkpoint",
          ...flags,
          "--image-path",
          images,
          "box",
        );
        const dump = await withStatus("dump.out", argv);
        const ended = new Promise((resolve) => dump.once("exit", resolve));
        expect(entries(images)).toContain("inventory.img"); // the caller takes them along now
        const before = numbers().length;
        const pages = ["lazy-pages", "--page-server", "--address", "127.0.0.1", "--port", port];
        background(`exec "$@" >>${at("pages.out")} 2>&1 3>&-`, ["criu", ...pages, "-D", images, "-W", work]);
        await until(() => existsSync(join(work, "lazy-pages.socket")));
        configure("c");
        counting("two", "restore", "--lazy-pages", "--image-path", images, "--work-path", work);
        await goesOn(before);
        expect(numbers()).toEqual(numbers().map((_, n) => n));
        expect(await ended, readFileSync(at("dump.out"), "utf8")).toBe(0);
        await until(() => existsSync(at("dump.out.status.end"))); // nobody else holds it, cedanad above all
      },
    );

    withRunc(
      "sends memory to a page server, and restores from what it has got",
      { timeout: 60_000 },
      async () => {
        await begin();
        const [images, pages] = [at("images"), at("pages")];
        mkdirSync(pages);
        const port = await freePort();
        const server = ["page-server", "--images-dir", pages, "--address", "127.0.0.1", "--port", port];
        await withStatus("server.out", ["criu", ...server, "--status-fd", "7"]);
        const to = ["--page-server", `127.0.0.1:${port}`, "--image-path", images];
        const { status, stderr } = await runtime("one", "checkpoint", ...to, "box");
        expect(status, stderr).toBe(0);
        expect(entries(images).filter((name) => /^pages-/.test(name))).toEqual([]);
        expect(entries(pages).filter((name) => /^pages-/.test(name))).not.toEqual([]);
        cpSync(pages, images, { recursive: true });
        const before = numbers().length;
        counting("one", "restore", "--image-path", images);
        await goesOn(before);
        expect(numbers()).toEqual(numbers().map((_, n) => n));
      },
    );

    describe.runIf(tracksDirtyPages)("chains of pre-dumps", () => {
      const images = (name: string) => join(at("images"), name);
      const take = (name: string, ...flags: string[]) =>
        runtime("one", "checkpoint", ...flags, "--image-path", images(name), "box");
      async function taken(name: string, ...flags: string[]): Promise<void> {
        const { status, stderr } = await take(name, ...flags);
        expect(status, `${name} ${flags.join(" ")}: ${stderr}`).toBe(0);
      }
      const pages = (name: string) =>
        entries(images(name))
          .filter((file) => /^pages-/.test(file))
          .reduce((sum, file) => sum + statSync(join(images(name), file)).size / 4096, 0);
      const lines = () =>
        (existsSync(at("out")) ? readFileSync(at("out"), "utf8") : "")
          .split("\n")
          .filter((line) => /^\d+ \d+ \d+$/.test(line))
          .map((line) => line.split(" ").map(Number));
      async function begin(): Promise<void> {
        touched = 0;
        configure("b", testPrograms, ["pages", String(PAGES)]);
        counting("one", "run");
        await until(() => lines().length > 2, { what: () => "it to begin" });
        mkdirSync(at("images"), { recursive: true });
      }
      /** Memory is as it was: all that was ever written to it is there. */
      async function isWhole(touched: number): Promise<void> {
        const before = lines().length;
        const [, done, sum] = await until(() => (lines().length > before + 1 ? lines().at(-1)! : undefined), {
          what: () => `it to go on: ${readFileSync(at("out"), "utf8").slice(-2000)}`,
        });
        expect([done, sum]).toEqual([touched, touched]);
        expect(lines().map(([n]) => n)).toEqual(lines().map((_, n) => n));
      }
      /** Restores it, as it was after so many changes, also where it runs; it can be changed, and is deleted. */
      async function restores(name: string, changes: number, root = "one"): Promise<void> {
        await runtime("one", "delete", "--force", "box");
        const log = readFileSync(at("out"), "utf8").split("\n");
        const last = log.findLastIndex((line) => line.split(" ")[1] === String(changes));
        const n = Number(log[last]?.split(" ")[0]);
        writeFileSync(at("out"), "");
        counting(root, "restore", "--image-path", images(name));
        await until(() => lines().length > 1, { what: () => `${name}: ${readFileSync(at("out"), "utf8")}` });
        expect(lines()[0]!.slice(1), name).toEqual([changes, changes]);
        expect(lines()[0]![0]).toBeLessThanOrEqual(n + 1);
        await touch(root);
        expect(lines().at(-1)!.slice(1)).toEqual([changes + 1, changes + 1]);
        expect((await runtime(root, "delete", "--force", "box")).status).toBe(0);
        writeFileSync(at("out"), log.join("\n"));
      }
      const manifest = (name: string) => JSON.parse(readFileSync(join(images(name), "cedana.json"), "utf8"));
      let touched = 0;
      /** Changes the next page. */
      async function touch(root = "one"): Promise<void> {
        touched = lines().at(-1)![1]! + 1;
        const { status, stderr } = await runtime(root, "kill", "box", "USR1");
        expect(status, stderr).toBe(0);
        await until(() => lines().at(-1)![1] === touched, { what: () => "a page to be changed" });
      }

      it("from pre-dump to pre-dump to the dump: each has what has changed, and the newest is restored, twice", async () => {
        await begin();
        await taken("first", "--pre-dump");
        expect(pages("first")).toBeGreaterThan(PAGES);
        for (let n = 0; n < 3; n++) await touch();
        await taken("second", "--pre-dump", "--parent-path", "../first");
        expect(pages("second")).toBeLessThan(PAGES / 2);
        expect(pages("second")).toBeGreaterThanOrEqual(3);
        await touch();
        await taken("last", "--parent-path", "../second");
        expect(pages("last")).toBeLessThan(PAGES / 2);
        for (const root of ["one", "two"]) await restores("last", 4, root);
      });

      it.runIf(side === "wrapper")(
        "builds on the latest images alone: those before them lack what was changed since",
        async () => {
          await begin();
          await taken("first", "--pre-dump");
          await touch();
          await taken("second", "--leave-running", "--parent-path", "../first");
          expect(manifest("second").options.parentPath).toBe("../first");
          await touch();
          await taken("third", "--leave-running", "--parent-path", "../first");
          expect(manifest("third").options.parentPath).toBeUndefined();
          expect(place.cedanadLog()).toMatch(/dumped whole, without its parent \.\.\/first/);
          expect(pages("third")).toBeGreaterThan(PAGES);
          await touch();
          await taken("fourth", "--pre-dump", "--parent-path", "../first");
          expect(pages("fourth")).toBeGreaterThan(PAGES);
          await touch();
          await taken("last", "--parent-path", "../fourth");
          expect(pages("last")).toBeLessThan(PAGES / 2);
          for (const [name, at] of [
            ["second", 1],
            ["third", 2],
            ["last", 4],
          ] as const)
            await restores(name, at);
        },
      );

      it.runIf(side === "wrapper")("refuses what can't be built on, and the container runs on", async () => {
        await begin();
        await taken("first", "--pre-dump");
        await taken("second", "--pre-dump", "--parent-path", "../first");
        const refused = async (words: RegExp, name: string, ...flags: string[]) => {
          const before = entries(at("images"));
          const { status, stderr } = await take(name, ...flags);
          expect([status, stderr]).toEqual([1, expect.stringMatching(words)]);
          expect(entries(at("images"))).toEqual(before);
          await isWhole(touched);
        };
        for (const flags of [[], ["--pre-dump"]]) {
          await refused(
            /--parent-path \/.* must be relative/,
            "new",
            ...flags,
            "--parent-path",
            images("second"),
          );
          await refused(/parent \.\.\/none .*holds no images/, "new", ...flags, "--parent-path", "../none");
          await refused(/would take the place of images/, "second", ...flags, "--parent-path", ".");
          await refused(/would take the place of images/, "first", ...flags, "--parent-path", "../second");
        }
        const file = join(images("first"), entries(images("first")).find((name) => /^pages-/.test(name))!);
        renameSync(file, at("pages"));
        for (const flags of [[], ["--pre-dump"]])
          await refused(
            /not whole: parent\/pages-1\.img is missing/,
            "new",
            ...flags,
            "--parent-path",
            "../second",
          );
        copyFileSync(at("pages"), file);
        truncateSync(file, 4096);
        await refused(/not whole: parent\/pages-1\.img has 4096 bytes/, "new", "--parent-path", "../second");
        renameSync(at("pages"), file);
        await taken("new", "--parent-path", "../second"); // nothing of all that is in the way
        await restores("new", touched);
      });

      it.runIf(side === "wrapper")(
        "restores only on what it was built on, and says what has become of that",
        { timeout: 90_000 },
        async () => {
          await begin();
          await taken("first", "--pre-dump");
          await taken("second", "--pre-dump", "--parent-path", "../first");
          await touch();
          await taken("last", "--parent-path", "../second");
          const verify = () =>
            place.run([join(repository, "bin/cedana"), "checkpoint", "verify", images("last")]);
          const whole = await verify();
          expect(whole.status, whole.stdout + whole.stderr).toBe(0);
          const breaks = async (words: RegExp) => {
            const verified = await verify();
            expect([verified.status, verified.stdout + verified.stderr]).toEqual([
              2,
              expect.stringMatching(words),
            ]);
            const { status, stderr } = await runtime(
              "one",
              "restore",
              "--detach",
              "--bundle",
              bundle,
              "--image-path",
              images("last"),
              "box",
            );
            expect([status, stderr]).toEqual([1, expect.stringMatching(words)]);
            expect((await runtime("one", "state", "box")).stderr).toMatch(/does not exist|No such file/);
          };
          const [first, kept] = [images("first"), at("pages")];
          renameSync(first, kept);
          await breaks(/of which number 1 is missing/);
          mkdirSync(first);
          for (const name of entries(kept)) copyFileSync(join(kept, name), join(first, name));
          truncateSync(join(first, "pages-1.img"), 4096);
          await breaks(/parent\/parent\/pages-1\.img.* has 4096 bytes/);
          for (const name of entries(images("second"))) // another pre-dump, whole
            if (name !== "parent") copyFileSync(join(images("second"), name), join(first, name));
          await breaks(/of which number 1 is another one now/);
          rmSync(first, { recursive: true });
          renameSync(kept, first);
          renameSync(images("second"), kept);
          await breaks(/builds on the pre-dump \.\.\/second .*missing/);
          renameSync(kept, images("second"));
          await restores("last", 1);
        },
      );

      it.runIf(side === "wrapper")(
        "takes the place of an earlier pre-dump, whole; nothing is left of one whose container is killed",
        async () => {
          await begin();
          await taken("first", "--pre-dump");
          const before = statSync(join(images("first"), "inventory.img")).ino;
          await touch();
          await taken("first", "--pre-dump");
          expect(statSync(join(images("first"), "inventory.img")).ino).not.toBe(before);
          expect(entries(images("first")).filter((name) => name.startsWith("."))).toEqual([]);
          await touch();
          const [pre, killed] = await Promise.all([
            take("second", "--pre-dump", "--parent-path", "../first"),
            runtime("one", "kill", "box", "KILL"),
          ]);
          expect(killed.status, killed.stderr).toBe(0);
          expect(existsSync(images("second"))).toBe(pre.status === 0);
          await until(async () => /stopped/.test((await runtime("one", "state", "box")).stdout), {
            what: () => "the end of the container",
          });
          const { status, stderr } = await take("last", "--parent-path", "../first");
          expect(status, stderr).not.toBe(0);
          expect(existsSync(images("last"))).toBe(false);
        },
      );
    });

    it("restores in the foreground, as long as the container lives, and ends with its status", async () => {
      await begin();
      const dumped = await runtime("one", "checkpoint", "--image-path", at("images"), "box");
      expect(dumped.status, dumped.stderr).toBe(0);
      const before = numbers().length;
      const flags = ["--image-path", at("images"), "--bundle", bundle, "--pid-file", at("pid"), "box"];
      const line = place.runtime("wrapper", "--root", at("one"), "restore", ...flags);
      background(`{ "$@" 2>&1 3>&-; echo $? >${at("status")}; } | cat >>${at("out")} 3>&-`, line);
      await goesOn(before);
      const { pid } = JSON.parse((await runtime("one", "state", "box")).stdout);
      expect(readFileSync(at("pid"), "utf8").trim()).toBe(String(pid));
      expect(existsSync(at("status"))).toBe(false);
      expect((await runtime("one", "kill", "box", "KILL")).status).toBe(0);
      const status = () => existsSync(at("status")) && readFileSync(at("status"), "utf8");
      expect(await until(() => status() || undefined, { what: () => "the end of restore" })).toBe("137\n");
      const left = await runtime("one", "state", "box");
      if (engine === "runc") expect(left.stderr).toContain("does not exist");
      else expect(JSON.parse(left.stdout).status).toBe("stopped"); // crun leaves what has ended to its caller's delete
      expect(numbers()).toEqual(numbers().map((_, n) => n));
    });

    it("takes checkpoints that are asked for at once one after another, and the container runs on", async () => {
      await begin();
      const taken = await Promise.all(
        ["first", "second", "third"].map((name) =>
          runtime("one", "checkpoint", "--leave-running", "--image-path", join(at("images"), name), "box"),
        ),
      );
      for (const { status, stderr } of taken) expect(status, stderr).toBe(0);
      expect(JSON.parse((await runtime("one", "state", "box")).stdout).status).toBe("running");
      await goesOn(numbers().length);
    });

    it("leaves nothing of a restore in whose middle it is killed, and the next one succeeds", {
      timeout: 60_000,
    }, async () => {
      await begin();
      const dumped = await runtime("one", "checkpoint", "--image-path", at("images"), "box");
      expect(dumped.status, dumped.stderr).toBe(0);
      deadly.killNextAt("post-restore", "wrapper");
      await endOf(counting("one", "restore", "--image-path", at("images")));
      expect(deadly.killed()).toBe("cedana-runtime");
      await until(() => entries(join(place.runDir, "c")).length === 0, {
        what: () => "the end of the restore",
      });
      expect(entries(at("one"))).toEqual([]);
      expect(
        pidsInCgroups(place.namespace).filter((pid) => existsSync(`/proc/${pid}/root/programs/counter`)),
      ).toEqual([]);
      const before = numbers().length;
      counting("one", "restore", "--image-path", at("images"));
      await goesOn(before); // not after the last one: what was killed may have been let go before
    });

    it("leaves a container alone whose id is asked for again", async () => {
      await begin();
      const dumped = await runtime(
        "one",
        "checkpoint",
        "--leave-running",
        "--image-path",
        at("images"),
        "box",
      );
      expect(dumped.status, dumped.stderr).toBe(0);
      const spec = JSON.parse(readFileSync(join(bundle, "config.json"), "utf8"));
      spec.annotations = { "cedana.io/restore-from": "nothing", "cedana.io/on-restore-failure": "fresh" };
      writeFileSync(join(bundle, "config.json"), JSON.stringify(spec));
      const twice = [
        ["restore", "--detach", "--image-path", at("images")],
        ["create"], // from a checkpoint that there isn't
      ];
      for (const command of twice) {
        const { status, stderr } = await runtime("one", ...command, "--bundle", bundle, "box");
        expect([status, stderr], command[0]).toEqual([1, expect.stringMatching(/exists/)]);
      }
      expect(JSON.parse((await runtime("one", "state", "box")).stdout).status).toBe("running");
      expect(entries(join(place.runDir, "oci"))).toEqual([]);
      await goesOn(numbers().length);
      expect(numbers()).toEqual(numbers().map((_, n) => n));
    });

    it("dumps to the end or not at all when it is killed in the middle", { timeout: 60_000 }, async () => {
      for (const moment of ["pre-dump", "post-dump"] as const) {
        await begin();
        deadly.killNextAt(moment, "wrapper");
        const flags = ["--root", at("one"), "checkpoint", "--image-path", at("images"), "box"];
        await endOf(background('"$@" >/dev/null 2>&1 3>&-; true', place.runtime("wrapper", ...flags)));
        expect(deadly.killed(), moment).toBe("cedana-runtime");
        await until(() => entries(join(place.runDir, "c")).length === 0, {
          what: () => "the end of the dump",
        });
        expect(entries(join(place.runDir, "oci")).filter((name) => name.includes("~"))).toEqual([]);
        const before = numbers().length;
        if (existsSync(join(at("images"), "cedana.json"))) {
          expect(
            JSON.parse(readFileSync(join(at("images"), "cedana.json"), "utf8")).options.leaveRunning,
          ).toBe(false);
          await runtime("one", "delete", "--force", "box");
          counting("one", "restore", "--image-path", at("images"));
        } else expect(entries(at("images")), moment).toEqual([]);
        await goesOn(before);
        expect(numbers()).toEqual(numbers().map((_, n) => n));
        await runtime("one", "delete", "--force", "box");
        for (const name of ["images", "out"]) rmSync(at(name), { recursive: true, force: true });
      }
    });

    const dump = (...flags: string[]) =>
      runtime("one", "checkpoint", ...flags, "--image-path", at("images"), "--work-path", at("work"), "box");

    it.each<[flags: string[], without: RegExp | undefined, args: string[]]>([
      [["--tcp-established", "--tcp-skip-in-flight"], /skip-in-flight/, ["inflight"]],
      [
        ["--link-remap"],
        /link.remap/i,
        ["sh", "-c", "exec 5>/f; busybox ln /f /g; busybox rm /f; exec counter 20"],
      ],
      [["--tcp-established", "--network-lock", "nftables"], /tcp/, ["tcp"]],
      [
        ["--shell-job", "--ext-unix-sk", "--file-locks=true", "--manage-cgroups-mode=ignore"],
        undefined,
        ["counter"],
      ],
    ])(
      "%j reaches CRIU, also where runc has no such option, and the restore by the manifest",
      async (flags, without, args) => {
        await begin(args);
        if (without) {
          const refused = await dump();
          expect(refused.status).toBe(1);
          expect(refused.stderr).toMatch(without);
          expect(existsSync(at("images"))).toBe(false);
          await goesOn(numbers().length);
        }
        const dumped = await dump(...flags);
        expect(dumped.status, dumped.stderr).toBe(0);
        const before = numbers().length;
        counting("one", "restore", "--image-path", at("images"));
        await goesOn(before);
        expect(numbers()).toEqual(numbers().map((_, n) => n));
        for (const name of ["f", "g"]) rmSync(join(bundle, "rootfs", name), { force: true });
      },
    );

    it("refuses modes and locks that there are not, and the container runs on", async () => {
      await begin();
      for (const [flag, words] of [
        ["--manage-cgroups-mode=nonsense", /"nonsense"; it may be soft, full, strict, ignore/],
        ["--network-lock=nonsense", /"nonsense"; it may be iptables, nftables or skip/],
      ] as const) {
        const { status, stderr } = await dump(flag);
        expect([status, stderr]).toEqual([1, expect.stringMatching(words)]);
      }
      await goesOn(numbers().length);
    });

    it("--tcp-close closes connections at the dump, or at the restore alone", {
      timeout: 60_000,
    }, async () => {
      const failed = async () =>
        await until(() => /^FAILED/m.test(readFileSync(at("out"), "utf8")), {
          what: () => `a closed connection: ${readFileSync(at("out"), "utf8").slice(-500)}`,
        });
      for (const [atDump, atRestore] of [
        [["--tcp-close"], []],
        [["--tcp-established"], ["--tcp-close"]],
      ] as const) {
        await begin(["tcp"]);
        const dumped = await dump(...atDump);
        expect(dumped.status, dumped.stderr).toBe(0);
        expect(readFileSync(at("out"), "utf8")).not.toMatch(/^FAILED/m);
        const restoring = counting("one", "restore", ...atRestore, "--image-path", at("images"));
        await failed();
        await endOf(restoring); // which its container may outrun
        expect(readFileSync(at("out"), "utf8")).not.toMatch(/restore/); // it was restored, though it ended at once
        await runtime("one", "delete", "--force", "box");
        for (const name of ["images", "out"]) rmSync(at(name), { recursive: true, force: true });
      }
    });

    it("keeps its ids free where it shares a pid namespace", async () => {
      /** @returns the path of a pid namespace with one process */
      const othersPids = async () => {
        const script = 'echo "$$"; exec sleep 1000';
        const child = spawn("unshare", ["--pid", "--fork", "--kill-child", "sh", "-c", script]);
        started.push(child);
        await new Promise((resolve) => child.stdout.once("data", resolve));
        const init = readFileSync(`/proc/${child.pid}/task/${child.pid}/children`, "utf8").trim();
        return `/proc/${init}/ns/pid`;
      };
      await begin(undefined, { pid: await othersPids() });
      const dumped = await runtime("one", "checkpoint", "--image-path", at("images"), "box");
      expect(dumped.status, dumped.stderr).toBe(0);
      const before = numbers().length;
      const pid = await othersPids();
      configure("c", testPrograms, undefined, { pid });
      counting("two", "restore", "--image-path", at("images"));
      await goesOn(before);
      const argv = [`--pid=${pid}`, "cat", "/proc/sys/kernel/ns_last_pid"];
      expect(Number(spawnSync("nsenter", argv, { encoding: "utf8" }).stdout)).toBeGreaterThan(300);
    });

    it.skipIf(engine === "runc" || !existsSync("/sys/fs/cgroup/freezer"))(
      "makes none of others' cgroups again, which a checkpoint by the engine alone has taken along",
      async () => {
        const others = cgroupRoots().map((root) => join(root, `${place.namespace}-others`));
        const there = () => others.filter((path) => existsSync(path));
        try {
          for (const path of others) mkdirSync(path);
          await begin();
          mkdirSync(at("work"));
          const paths = ["--image-path", at("images"), "--work-path", at("work")];
          const argv = place.runtime("engine", "--root", at("one"), "checkpoint", ...paths, "box");
          const dumped = await place.run(argv);
          expect(dumped.status, dumped.stderr).toBe(0);
          for (const path of others) rmdirSync(path);
          const before = numbers().length;
          counting("two", "restore", ...paths);
          await goesOn(before);
          expect(there()).toEqual([]);
        } finally {
          for (const path of there()) rmdirSync(path);
        }
      },
    );

    withRunc("hands the options of an LSM on to the engine as they are", async () => {
      // An engine that writes down what it is told, and says of itself what runc does.
      const engine = at("runc-that-listens");
      writeFileSync(
        engine,
        `#!/bin/sh\nfor one; do case $one in --version | --help | state | delete) exec runc "$@" ;; esac; done\necho "$@" >>${at("told")}\nexit 1\n`,
        { mode: 0o755 },
      );
      await begin();
      const dumped = await runtime("one", "checkpoint", "--image-path", at("images"), "box");
      expect(dumped.status, dumped.stderr).toBe(0);
      const lsm = ["--lsm-profile", "apparmor:box", "--lsm-mount-context=system_u:object_r:c1"];
      const { status } = await place.run(
        place.runtime(
          "wrapper",
          "--engine",
          engine,
          "--root",
          at("one"),
          "restore",
          ...lsm,
          "--image-path",
          at("images"),
          "--bundle",
          bundle,
          "box",
        ),
      );
      expect(status).toBe(1);
      expect(readFileSync(at("told"), "utf8")).toMatch(
        / restore .*--lsm-profile=apparmor:box --lsm-mount-context=system_u:object_r:c1 box$/m,
      );
    });
  },
);
