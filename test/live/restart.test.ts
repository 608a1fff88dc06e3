// containerd goes away and comes back: also while cedanad can't start, and with events that nobody took meanwhile.

import { rmSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { eventsService } from "../../src/proto/index.ts";
import { Dispatcher, Server } from "../../src/ttrpc/index.ts";
import { BreakableDaemon } from "./harness/breakable.ts";
import { decodeEvent, type TaskEvent } from "./harness/events.ts";
import { type ContainerdVersion, Live } from "./harness/live.ts";
import { missingFor, oursOnly } from "./harness/matrix.ts";
import { isAlive } from "./harness/system.ts";
import { until } from "./harness/until.ts";

for (const containerd of ["1.7", "2.1"] as const satisfies ContainerdVersion[]) {
  const missing = missingFor({ containerd, engine: "runc" });
  describe.skipIf(missing)(`containerd ${containerd}${missing ? ` (${missing})` : ""}`, () => {
    it("finds every running container after a restart while cedanad can't start", async (context) => {
      oursOnly(context, "has no cedanad");
      using daemon = new BreakableDaemon();
      await using live = await Live.start({
        containerd,
        engine: "runc",
        env: { CEDANA_DAEMON: daemon.program },
      });
      const group = { "io.containerd.runc.v2.group": "pod" };
      await using first = await live.run(["counter", "20", "4"], { annotations: group });
      await using second = await live.run(["counter", "20", "5"], { annotations: group });
      await using third = await live.run(["counter", "20", "6"]);
      await using exec = await third.exec(["counter", "20", "7"]);
      const tasks = [first, second, third];
      const shims = live.shims().map(({ pid }) => pid);

      daemon.break();
      await live.killCedanad();
      await live.stopContainerd("SIGKILL");
      await live.startContainerd();
      // containerd asks for the states, gives up after 2 s (List: one after another), and lists what it knows.
      const states = await Promise.all(tasks.map((task) => task.state()));
      expect(states.map(({ id, status }) => [id, status])).toEqual(tasks.map(({ id }) => [id, "UNKNOWN"]));
      for (const { pid } of [...tasks, exec]) expect(isAlive(pid)).toBe(true);
      expect(live.shims().map(({ pid }) => pid)).toEqual(shims);

      daemon.mend();
      await until(async () => (await live.client.tasks.list()).every(({ status }) => status === "RUNNING"), {
        what: () => "RUNNING for all",
      });
      const execExit = exec.wait();
      await exec.kill(15);
      expect(await execExit).toBe(7);
      expect(await exec.delete()).toBe(7);
      for (const [index, task] of tasks.entries()) {
        const before = await task.nextNumber();
        expect(await task.nextNumber()).toBe(before + 1);
        await task.kill(15);
        expect(await task.wait()).toBe(4 + index);
        expect(await task.delete()).toBe(4 + index);
      }
    });
  });
}

it("a keeper that is killed while cedanad can't start is cleaned up by the launcher alone", async (context) => {
  oursOnly(context, "has no cedanad");
  using daemon = new BreakableDaemon();
  await using live = await Live.start({ env: { CEDANA_DAEMON: daemon.program } });
  const task = await live.run(["sh", "-c", "sleeper & exec sleeper"], { namespaces: { pid: "host" } });
  const { id } = task;
  daemon.break();
  await live.killCedanad();
  process.kill(live.shimOf(id).pid, "SIGKILL");
  const exit = await live.events.waitFor(id, "exit"); // containerd's, from what `delete` answered
  expect(exit.exitStatus).toBe(137);
  await until(async () => (await task.state().catch(() => undefined)) === undefined, {
    what: () => `containerd to forget ${id}`,
  });
  await task.io.close();
  await live.removeContainer(id);
  await live.expectNoLeftovers();
});

it("events wait in order for a containerd that is away", async (context) => {
  oursOnly(context, "queues events in another way, which is not tried here");
  await using live = await Live.start();
  await using task = await live.run(["counter", "20", "5"]);
  const execs = [];
  for (const code of [1, 2, 3]) execs.push(await task.exec(["counter", "20", String(code)]));
  await live.stopContainerd("SIGKILL");
  for (const exec of execs) {
    process.kill(exec.pid, "SIGTERM");
    await until(() => !isAlive(exec.pid), { what: () => "the end of an exec" });
  }
  process.kill(task.pid, "SIGTERM");
  await until(() => !isAlive(task.pid), { what: () => "the end of init" });
  await live.killCedanad(); // the queue is the keeper's

  // A stand-in for containerd's event service: containerd itself would take the events before anybody can subscribe.
  const seen: TaskEvent[] = [];
  const sockets = new Set<{ destroy(): void }>();
  let refusals = 1;
  const service = {
    async Forward(payload: Uint8Array): Promise<Uint8Array> {
      const { envelope } = eventsService.ForwardRequest.decode(payload);
      seen.push(decodeEvent(envelope!.topic, envelope!.event!));
      if (seen.length === 2 && refusals-- > 0) for (const socket of sockets) socket.destroy(); // before the answer
      return new Uint8Array();
    },
  };
  const dispatcher = new Dispatcher().register("containerd.services.events.ttrpc.v1.Events", service);
  const server = new Server({ dispatcher, context: (socket) => void sockets.add(socket) });
  const path = `${live.address}.ttrpc`;
  rmSync(path, { force: true });
  await server.listen({ path });
  try {
    await until(() => seen.length >= 5, { what: () => `five events; seen: ${JSON.stringify(seen)}` });
  } finally {
    await server.close();
  }
  const exits = seen.map(({ topic, execId, exitStatus }) => `${topic} ${execId} ${exitStatus}`);
  // The second was taken, but its taking was not answered: told again.
  expect(exits).toEqual(["exit e1 1", "exit e2 2", "exit e2 2", "exit e3 3", "exit  5"]);

  await live.startContainerd();
  await until(async () => (await task.state().catch(() => undefined))?.status !== "RUNNING", {
    what: () => "containerd's notice",
  });
});
