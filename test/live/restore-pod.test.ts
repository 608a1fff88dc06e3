// A container of a pod goes on in another pod: another sandbox, other namespaces, another host name, by its annotation alone.

import { describe, expect, it } from "vitest";
import { type CriContainer, Pod } from "./harness/cri.ts";
import { type ContainerdVersion, containerdBinaries, type Live } from "./harness/live.ts";
import { liveFor } from "./harness/suite.ts";
import { until } from "./harness/until.ts";

/** Its listener takes every address; its connection is to the first pod's. */
const IDENTITY = ["/programs/identity", "192.0.2.1"];

for (const containerd of ["1.7", "2.1"] satisfies ContainerdVersion[]) {
  const sharesProcesses = containerd === "1.7"; // in one of the two
  const missing = !containerdBinaries(containerd) && `containerd ${containerd} is not installed`;
  describe.skipIf(missing)(`a pod under containerd ${containerd}${missing ? ` (${missing})` : ""}`, () => {
    let live: Live;
    liveFor({ containerd, engine: "runc", cri: containerd === "1.7" ? "type" : "path" }, (started) => {
      live = started;
    });

    it("takes on what was a container of another pod, with its files, in its own namespaces", async () => {
      const line = /^(\d+) (\S+) (\S+)$/;
      const lastLine = (container: CriContainer) => line.exec(container.lines().at(-1) ?? "")?.slice(1);
      const saysAfter = (container: CriContainer, number: number) =>
        until(
          () => {
            const found = lastLine(container);
            return found && Number(found[0]) > number && found;
          },
          { what: () => `a line after ${number}: ${container.lines().slice(-2)}` },
        );
      let last: string[];
      {
        await using pod = await Pod.run(live, { hostname: "first", sharesProcesses });
        const container = await pod.run(IDENTITY, { annotations: { "cedana.io/tcp": "keep" } });
        await container.exec(["sh", "-c", "echo kept > /kept"]);
        last = await saysAfter(container, 3);
        expect(last.slice(1)).toEqual(["first", "open"]);
        await live.cedana("dump", "containerd", container.id, "--name", "moving");
      }
      await using pod = await Pod.run(live, { hostname: "second", sharesProcesses });
      const moved = await pod.run(IDENTITY, { annotations: { "cedana.io/restore-from": "moving" } });
      expect((await saysAfter(moved, Number(last[0]))).slice(1)).toEqual(["second", "closed"]);
      expect((await moved.exec(["cat", "/kept"])).stdout).toBe("kept\n");
      expect((await moved.exec(["hostname"])).stdout).toBe("second\n");
    });
  });
}
