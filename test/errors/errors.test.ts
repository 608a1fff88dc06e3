import { describe, expect, it } from "vitest";
import * as errors from "../../src/errors/index.ts";

const {
  BrokenImage,
  CedanaError,
  CriuFailed,
  messageOf,
  NotFound,
  RemoteFailed,
  RuntimeFailed,
  statusCode,
  SyscallFailed,
  TimedOut,
  toExitCode,
  toStatus,
} = errors;

describe("toStatus", () => {
  it.each([
    [errors.InvalidRequest, "InvalidRequest", 3],
    [errors.TimedOut, "TimedOut", 4],
    [errors.NotFound, "NotFound", 5],
    [errors.AlreadyExists, "AlreadyExists", 6],
    [errors.PermissionDenied, "PermissionDenied", 7],
    [errors.ResourceExhausted, "ResourceExhausted", 8],
    [errors.WrongState, "WrongState", 9],
    [errors.Unsupported, "Unsupported", 12],
    [errors.Unavailable, "Unavailable", 14],
    [errors.Cancelled, "Cancelled", 1],
    [errors.BrokenImage, "BrokenImage", 15],
    [errors.CriuFailed, "CriuFailed", 13],
    [errors.RuntimeFailed, "RuntimeFailed", 13],
    [errors.CrashedTwice, "CrashedTwice", 13],
    [errors.CedanaError, "CedanaError", 13],
  ] as const)("gives %o the number of %s", (type, name, code) => {
    const error = new type("what happened");
    expect(error).toBeInstanceOf(CedanaError);
    expect(error.name).toBe(name);
    expect(toStatus(error)).toEqual({ code, message: "what happened" });
  });

  it("knows every class that is exported", () => {
    const classes = Object.values(errors).filter(
      (value) => typeof value === "function" && /^class/.test(String(value)),
    );
    expect(classes.length).toBe(17); // the table above, SyscallFailed, RemoteFailed
  });

  it("says INTERNAL for a system call and keeps what failed", () => {
    const error = new SyscallFailed("open work path wp-7: ENOENT", {
      errno: 2,
      code: "ENOENT",
      syscall: "open",
    });
    expect(toStatus(error)).toEqual({ code: statusCode.INTERNAL, message: "open work path wp-7: ENOENT" });
  });

  it("says UNKNOWN for an error that is not ours, with its message", () => {
    expect(toStatus(new TypeError("x is not a function"))).toEqual({
      code: 2,
      message: "x is not a function",
    });
    expect(toStatus("thrown text")).toEqual({ code: 2, message: "thrown text" });
    expect(toStatus(undefined)).toEqual({ code: 2, message: "undefined" });
    expect(toStatus(Object.create(null)).code).toBe(2);
    expect(toStatus("")).toEqual({ code: 2, message: "an error without a message" });
  });

  it("passes on what another service answered", () => {
    expect(toStatus(new RemoteFailed("no such task", { code: 5 }))).toEqual({
      code: 5,
      message: "no such task",
    });
  });

  it("takes an abort for what it is", () => {
    expect(toStatus(AbortSignal.abort().reason).code).toBe(statusCode.CANCELLED);
    expect(toStatus(new DOMException("late", "TimeoutError")).code).toBe(statusCode.DEADLINE_EXCEEDED);
  });

  it("cuts a message that would not fit in a frame, and keeps both its ends", () => {
    const { message } = toStatus(new NotFound(`begin ${"x".repeat(5_000_000)} end`));
    expect(message.length).toBeLessThan(17_000);
    expect(message).toMatch(/^begin .* end$/s);
  });
});

describe("messageOf", () => {
  it("appends causes, without what was already said", () => {
    const disk = new Error("ENOSPC: no space left on device");
    const write = new BrokenImage("write manifest", { cause: disk });
    expect(messageOf(new CedanaError("dump of task a", { cause: write }))).toBe(
      "dump of task a: write manifest: ENOSPC: no space left on device",
    );
    expect(messageOf(new CedanaError(`dump of task a: ${disk.message}`, { cause: disk }))).toBe(
      "dump of task a: ENOSPC: no space left on device",
    );
  });

  it("ends although causes form a cycle", () => {
    const first = new CedanaError("first");
    const second = new CedanaError("second", { cause: first });
    first.cause = second;
    expect(messageOf(first)).toBe("first: second");
  });

  it("takes a cause that is no error, and the members of an AggregateError", () => {
    expect(messageOf(new CedanaError("stop", { cause: "the client went away" }))).toBe(
      "stop: the client went away",
    );
    expect(messageOf(new AggregateError([new Error("one"), new Error("two")]))).toBe("one; two");
  });
});

describe("SyscallFailed.from", () => {
  it("keeps errno, code and syscall of Node's error, errno made positive", () => {
    const node = Object.assign(new Error("ENOENT: no such file, open 'x'"), {
      errno: -2,
      code: "ENOENT",
      syscall: "open",
    });
    const error = SyscallFailed.from(node);
    expect(error).toBeInstanceOf(SyscallFailed);
    expect(error).toMatchObject({ errno: 2, code: "ENOENT", syscall: "open", cause: node });
    expect(messageOf(error)).toBe("ENOENT: no such file, open 'x'");
  });

  it("leaves other errors alone", () => {
    const error = new TimedOut("late");
    expect(SyscallFailed.from(error)).toBe(error);
    expect(SyscallFailed.from("text")).toBeInstanceOf(CedanaError);
  });
});

describe("toExitCode", () => {
  it("passes on the engine's status, and is 1 for all else", () => {
    expect(toExitCode(new RuntimeFailed("runc create", { exitStatus: 127 }))).toBe(127);
    expect(toExitCode(new RuntimeFailed("runc create", { exitStatus: 0 }))).toBe(1);
    expect(toExitCode(new RuntimeFailed("runc create was killed"))).toBe(1);
    expect(toExitCode(new CriuFailed("dump", { exitStatus: 52, log: "Error" }))).toBe(1);
    expect(toExitCode(new Error("x"))).toBe(1);
  });
});
