import { describe, expect, it } from "vitest";
import { fromDetailedStatus, toDetailedStatus } from "../../src/daemon/api/status.ts";
import * as errors from "../../src/errors/index.ts";

const across = (error: unknown) => {
  const { code, message, details } = toDetailedStatus(error);
  return fromDetailedStatus(code, message, details);
};

describe("an error across the API", () => {
  it.each([
    new errors.InvalidRequest("a"),
    new errors.NotFound("a"),
    new errors.AlreadyExists("a"),
    new errors.PermissionDenied("a"),
    new errors.ResourceExhausted("a"),
    new errors.WrongState("a"),
    new errors.Unsupported("a"),
    new errors.Unavailable("a"),
    new errors.TimedOut("a"),
    new errors.Cancelled("a"),
    new errors.BrokenImage("a"),
    new errors.CrashedTwice("a"),
    new errors.CedanaError("a"),
  ])("is of the same class: $name", (error) => {
    const back = across(error);
    expect(back.constructor).toBe(error.constructor);
    expect([back.message, errors.toStatus(back).code]).toEqual(["a", errors.toStatus(error).code]);
  });

  it("keeps what its class knows, and in which step it was", () => {
    const criu = new errors.CriuFailed("dump", { exitStatus: 1, log: "(00.1) Error: x" });
    criu.step = "criuDump";
    expect(across(criu)).toMatchObject({
      name: "CriuFailed",
      message: "dump (step criuDump)",
      exitStatus: 1,
      log: "(00.1) Error: x",
    });
    expect(across(new errors.RuntimeFailed("run", { exitStatus: 0 }))).toMatchObject({ exitStatus: 0 });
    expect(across(new errors.RuntimeFailed("run"))).toMatchObject({ exitStatus: undefined });
    const call = new errors.SyscallFailed("open x", { errno: 2, code: "ENOENT", syscall: "open" });
    expect(across(call)).toMatchObject({ name: "SyscallFailed", errno: 2, code: "ENOENT", syscall: "open" });
  });

  it("of a class that it doesn't know is the nearest that it does, or the bare status", () => {
    class Special extends errors.BrokenImage {
      override name = "Special";
    }
    expect(across(new Special("half"))).toMatchObject({ name: "BrokenImage", message: "half" });
    const remote = across(new errors.RemoteFailed("containerd", { code: 9 }));
    expect(remote).toMatchObject({ name: "RemoteFailed", code: 9 });
    expect(across(new TypeError("bug"))).toMatchObject({ name: "RemoteFailed", code: 2, message: "bug" });
    expect(across("text")).toMatchObject({ code: 2, message: "text" });
  });

  it("of gRPC itself says what happened to the call", () => {
    expect(fromDetailedStatus(14, "No connection", undefined)).toBeInstanceOf(errors.Unavailable);
    expect(fromDetailedStatus(1, "Cancelled on client", undefined)).toBeInstanceOf(errors.Cancelled);
    expect(fromDetailedStatus(4, "Deadline exceeded", undefined)).toBeInstanceOf(errors.TimedOut);
  });

  it("fits into headers, however long it is", () => {
    const long = new errors.CriuFailed("x".repeat(1e6), { log: "y".repeat(1e6) });
    expect(toDetailedStatus(long).details.length).toBeLessThan(8 * 1024);
    expect(across(long).message).toMatch(/^x+ \[…\] x+$/);
  });
});
