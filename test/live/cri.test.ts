// Kubernetes' way to us: pods and containers by containerd's CRI service, with our shim as runtime handler.

import { execFileSync } from "node:child_process";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { Pod } from "./harness/cri.ts";
import { type ContainerdVersion, containerdBinaries, type Live } from "./harness/live.ts";
import { liveFor } from "./harness/suite.ts";

const COUNTER = ["/programs/counter", "20", "7"];

for (const containerd of ["1.7", "2.1"] satisfies ContainerdVersion[]) {
  const missing = !containerdBinaries(containerd) && `containerd ${containerd} is not installed`;
  describe.skipIf(missing)(`a pod under containerd ${containerd}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    // Both ways in which a configuration may name us; CRI checkpoints only under the Go shim's type.
    liveFor({ containerd, engine: "runc", cri: containerd === "1.7" ? "type" : "path" }, (started) => {
      live = started;
    });

    it("runs its containers in one shim, and takes them along when it is stopped", async () => {
      await using pod = await Pod.run(live);
      const first = await pod.run(COUNTER);
      const second = await pod.run(COUNTER);
      await first.numberAfter(0);
      await second.numberAfter(0);
      expect(live.shims()).toHaveLength(1);
      expect(await first.exec(["sh", "-c", "echo in; echo err >&2; exit 3"])).toEqual({
        stdout: "in\n",
        stderr: "err\n",
        exitCode: 3,
      });
      await first.stop(10);
      expect(await first.status()).toMatchObject({ state: "EXITED", exitCode: 7 });
      await first.remove();
      await second.numberAfter(1);
    });

    it("says why a container ended", async () => {
      await using pod = await Pod.run(live);
      const failing = await pod.run(["/bin/sh", "-c", "echo last words; exit 5"]);
      expect(await failing.exited()).toMatchObject({ exitCode: 5, reason: "Error" });
      expect(failing.lines()).toEqual(["last words"]);
      await expect(pod.run(["/no/such/program"])).rejects.toThrow(/no such file/);
    });

    // As the kubelet does at a drain: the pod goes, and another one of the same template comes, here or where the store is mounted, too.
    it("is checkpointed when it is stopped, and its successor in another pod goes on, once", async () => {
      const annotations = { "cedana.io/checkpoint-on": "SIGTERM", "cedana.io/auto-resume": "drained" };
      let last: number;
      {
        await using pod = await Pod.run(live, { annotations });
        const container = await pod.run(COUNTER);
        await container.numberAfter(5);
        await container.stop(60);
        last = Number(container.lines().at(-1));
        expect(await container.status()).toMatchObject({ state: "EXITED", exitCode: 143 }); // not the 7 of its handler
        await container.remove();
      }
      await using pod = await Pod.run(live, { annotations });
      const successor = await pod.run(COUNTER);
      await successor.numberAfter(last);
      expect(Number(successor.lines()[0])).toBe(last + 1);
      const other = await pod.run(COUNTER);
      await other.numberAfter(-1);
      expect(other.lines()[0]).toBe("0");
    });

    // CRI's CheckpointContainer came with containerd 2.0. Its restore (until 2.4) pulls the base image from a registry, always.
    it.skipIf(containerd === "1.7")("is checkpointed into an archive while it runs on", async () => {
      const archive = join(live.dir, "checkpoint.tar");
      await using pod = await Pod.run(live);
      const container = await pod.run(COUNTER);
      await container.numberAfter(2);
      await container.checkpoint(archive);
      const members = execFileSync("tar", ["-tf", archive], { encoding: "utf8" }).split("\n");
      expect(members).toEqual(
        expect.arrayContaining(["checkpoint/inventory.img", "spec.dump", "config.dump"]),
      );
      const last = await container.numberAfter(Number(container.lines().at(-1)));
      const numbers = container.lines().map(Number);
      expect(numbers).toEqual(Array.from({ length: numbers.length }, (_, at) => at));
      await container.numberAfter(last);
    });
  });
}
