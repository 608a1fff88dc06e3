// Callers' paths on a file system whose server doesn't answer: everybody else is served meanwhile.

import { mkdirSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import { canFuse, deadFuse } from "./harness/dead-fuse.ts";
import { isControl, type Live } from "./harness/live.ts";
import { enginesForCheckpoints, missingFor } from "./harness/matrix.ts";
import { liveFor } from "./harness/suite.ts";

const [combination] = enginesForCheckpoints;
const missing = isControl
  ? "the Go shim has a process for each pod"
  : canFuse
    ? missingFor(combination!)
    : "no /dev/fuse";

describe.skipIf(missing)(`a dead file system${missing ? ` (${missing})` : ""}`, () => {
  let live: Live;
  let place: string;
  liveFor(combination, async (started) => {
    live = started;
    place = join(live.dir, "dead");
    mkdirSync(place);
  });

  it("under an image path or a checkpoint keeps nobody else from being served, and the container goes on", async () => {
    await using victim = await live.run(["counter"]);
    await using other = await live.run(["counter"]);
    await victim.nextNumber();
    const { pid } = live.cedanad()!;
    const waiting: Promise<string>[] = [];
    {
      using _dead = deadFuse(place);
      // As many as libuv's pool has threads, and more.
      for (let n = 0; n < 6; n++)
        waiting.push(
          live.restore(join(place, `old-${n}`), ["counter"]).then(
            () => "restored",
            (error: Error) => error.message,
          ),
        );
      let isOver = false;
      waiting.push(
        victim.checkpoint({ imagePath: join(place, "image") }).then(
          () => "checkpointed",
          (error: Error) => error.message,
        ),
      );
      void Promise.race(waiting).then(() => {
        isOver = true;
      });
      for (let n = 0; n < 3; n++) {
        expect(await other.status()).toBe("RUNNING");
        expect((await other.execToEnd(["true"])).status).toBe(0);
        await using another = await live.run(["counter"]);
        await another.nextNumber();
      }
      expect(isOver).toBe(false);
      await other.checkpoint();
    }
    // What waited sees the server's end, or, a moment later, the directory below the mount, or that it has gone.
    for (const outcome of await Promise.all(waiting))
      expect(outcome).toMatch(/no answer|not connected|does not exist|ENOENT|^checkpointed$/);
    expect(live.cedanad()!.pid).toBe(pid);
    victim.stdout.skip();
    const before = await victim.nextNumber();
    expect(await victim.nextNumber()).toBe(before + 1);
  });
});
