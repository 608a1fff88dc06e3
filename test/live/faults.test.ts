// cedanad that can't start, requests that end it, an older cedanad, and hostile bytes on a shim's socket.

import { connect } from "node:net";
import { describe, expect, it } from "vitest";
import { BreakableDaemon } from "./harness/breakable.ts";
import { Live } from "./harness/live.ts";
import { until } from "./harness/until.ts";

describe("cedanad that can't start", () => {
  it("fails other calls clearly, while an accepted Wait goes on and the container runs", async () => {
    using daemon = new BreakableDaemon();
    await using live = await Live.start({
      containerd: "1.7",
      engine: "runc",
      env: { CEDANA_DAEMON: daemon.program, CEDANA_KEEPER_PATIENCE_MS: "1000" },
    });
    await using task = await live.run(["counter", "20", "6"]);
    const before = await task.nextNumber();
    let waited: unknown;
    const waiting = task.exited!.then(
      (exit) => (waited = exit),
      (error) => (waited = error),
    );
    daemon.break();
    process.kill(live.cedanad()!.pid, "SIGKILL");
    await expect(task.kill(15)).rejects.toThrow(
      /cedanad could not be reached within 1\d\d\d ms: see .*cedanad\.log/,
    );
    await new Promise((resolve) => setTimeout(resolve, 1_500)); // past the patience for the Wait as well
    expect(waited).toBeUndefined();
    expect(await task.nextNumber()).toBe(before + 1);
    daemon.mend();
    await until(
      async () =>
        await task.kill(15).then(
          () => true,
          () => false,
        ),
      { what: () => "a cedanad again" },
    );
    await waiting;
    expect(waited).toMatchObject({ exitStatus: 6 });
  });
});

describe("a request that ends cedanad", () => {
  it("is answered with an error at its third delivery, and not executed", async () => {
    await using live = await Live.start({
      containerd: "1.7",
      engine: "runc",
      env: { CEDANA_FAULT: "crash:Pause" },
    });
    await using task = await live.run(["counter", "20", "0"]);
    await task.nextNumber();
    await expect(task.pause()).rejects.toThrow(/Pause was in work when cedanad ended, twice/);
    expect(await task.status()).toBe("RUNNING");
    const before = await task.nextNumber();
    expect(await task.nextNumber()).toBe(before + 1);
  });
});

describe("an error that nobody catches", () => {
  it("costs the pod whose call it was its connection, and nobody else anything", async () => {
    await using live = await Live.start({
      containerd: "1.7",
      engine: "runc",
      env: { CEDANA_FAULT: "uncaught:Pause" },
    });
    await using task = await live.run(["counter", "20", "0"]);
    await using other = await live.run(["counter", "20", "0"]);
    const { pid } = live.cedanad()!;
    await expect(task.pause()).rejects.toThrow(/Pause was in work when cedanad ended, twice/);
    expect(live.cedanad()!.pid).toBe(pid);
    expect(live.cedanadLog()).toMatch(
      new RegExp(
        `the fault that CEDANA_FAULT asks for.*uncaught, in the work for the pod of keeper \\d+ \\(${task.id}\\)`,
      ),
    );
    expect((await other.execToEnd(["true"])).status).toBe(0);
    await task.resume();
    const before = await task.nextNumber();
    expect(await task.nextNumber()).toBe(before + 1);
  });
});

describe("a cedanad that speaks only version 1 of the keeper's protocol", () => {
  it("serves a keeper that speaks both", async () => {
    await using live = await Live.start({
      containerd: "1.7",
      engine: "runc",
      env: { CEDANA_KEEPER_PROTOCOL_MAX: "1" },
    });
    const { status, stdout } = await live.runToEnd(["sh", "-c", "echo old; exit 4"]);
    expect([stdout, status]).toEqual(["old\n", 4]);
  });
});

describe("hostile bytes on a shim's socket", () => {
  it("neither end the shim nor stall it for containerd", async () => {
    await using live = await Live.start({ containerd: "1.7", engine: "runc" });
    await using task = await live.run(["counter"]);
    const { pid } = live.shimOf(task.id);
    const header = (length: number, stream: number, type: number, flags: number) => {
      const bytes = Buffer.alloc(10);
      bytes.writeUInt32BE(length, 0);
      bytes.writeUInt32BE(stream, 4);
      bytes.writeUInt8(type, 8);
      bytes.writeUInt8(flags, 9);
      return bytes;
    };
    const attacks = [
      Buffer.from([0, 0]), // half a header
      header(0xffffffff, 1, 1, 0), // 4 GiB announced
      Buffer.concat([header(5 << 20, 1, 1, 0), Buffer.alloc(1 << 20)]), // too long, and cut short
      Buffer.concat([header(3, 1, 1, 0), Buffer.from("abc")]), // no request
      header(0, 2, 1, 0), // a server's stream
      header(0, 1, 9, 0xff), // an unknown type
      Buffer.concat(Array(200).fill(header(0, 1, 3, 0))), // data for no stream
      Buffer.from(Array.from({ length: 65_536 }, (_, at) => (Math.imul(at, 2_654_435_761) >>> 13) & 0xff)),
    ];
    for (const bytes of attacks) {
      const socket = connect(task.shimSocket());
      socket.on("error", () => {}); // the shim may cut the connection off at any time
      await new Promise((resolve) => socket.write(bytes, resolve));
      expect(await task.status()).toBe("RUNNING"); // while that connection is open
      socket.destroy();
    }
    expect(await task.status()).toBe("RUNNING");
    expect(live.shimOf(task.id).pid).toBe(pid);
  });
});
