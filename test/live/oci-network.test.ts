import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { missingCallers, Podman, type Side } from "./harness/callers.ts";
import type { EngineName } from "./harness/live.ts";
import { IMAGE } from "./harness/programs.ts";
import { until } from "./harness/until.ts";

// Podman's own networks and published ports, over a checkpoint, in a network namespace that is all of the machine to it. As in
// oci-checkpoint.test.ts, CEDANA_TEST_OCI=engine is the control.

const missing = missingCallers();
const side: Side = process.env.CEDANA_TEST_OCI === "engine" ? "engine" : "wrapper";

describe.skipIf(missing).each<EngineName>(["runc", "crun"])(
  `podman's networks over %s${missing ? ` (${missing})` : ""}`,
  (engine) => {
    let podman: Podman;
    beforeAll(async () => {
      podman = await Podman.start(engine, { ownNetwork: true });
    });
    afterEach(async () => {
      await podman.on(side, "rm", "--all", "--force", "--time", "0");
      await podman.place.expectNoLeftovers((argv) => /cedanad/.test(argv));
    });
    afterAll(async () => await podman?.stop());

    async function ok(...args: string[]): Promise<string> {
      const { status, stdout, stderr } = await podman.on(side, ...args);
      expect(status, `podman ${args.join(" ")}: ${stderr}\n${podman.place.cedanadLog().slice(-2000)}`).toBe(
        0,
      );
      return stdout.trim();
    }
    /** What a server behind a port of the host answers. */
    async function answer(port: number): Promise<string> {
      const ask = `printf 'GET /index.html HTTP/1.0\\r\\n\\r\\n' | busybox nc -w 2 127.0.0.1 ${port}`;
      const get = ["sh", "-c", ask]; // busybox's wget does not survive being linked statically
      return await until(async () => (await podman.place.run(get)).stdout.split("\r\n\r\n")[1]?.trim(), {
        everyMs: 50,
        what: () => `an answer at port ${port}`,
      });
    }
    const addressOf = async (name: string) =>
      await ok("inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name);

    it("a listening server keeps its address and port, and gets others with another name", {
      timeout: 90_000,
    }, async () => {
      const archive = `${podman.place.dir}/c.tar`;
      const serve = "echo hello >/index.html; exec busybox httpd -f -p 80 -h /";
      const flags = ["--network", "podman", "--publish", "127.0.0.1:8081:80"];
      await ok("run", "--detach", "--name", "c", ...flags, IMAGE, "sh", "-c", serve);
      expect(await answer(8081)).toBe("hello");
      const address = await addressOf("c");
      await ok("container", "checkpoint", "c");
      await ok("container", "restore", "c");
      expect(await answer(8081)).toBe("hello");
      expect(await addressOf("c")).toBe(address);

      await ok("container", "checkpoint", "--leave-running", "--export", archive, "c");
      expect(await answer(8081)).toBe("hello");
      const others = ["--ignore-static-ip", "--ignore-static-mac", "--publish", "127.0.0.1:8082:80"];
      await ok("container", "restore", "--import", archive, "--name", "d", ...others);
      expect(await answer(8082)).toBe("hello");
      expect(await answer(8081)).toBe("hello"); // the first one is still there
      expect(await addressOf("d")).not.toBe(address);
    });
  },
);
