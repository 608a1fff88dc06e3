import { describe, expect, it } from "vitest";
import { InvalidRequest } from "../../src/errors/index.ts";
import { stdioKind } from "../../src/shim/keeper.ts";
import { logFileUri, planStdio } from "../../src/shim/stdio.ts";

const plan = (stdio: { terminal?: boolean; stdin?: string; stdout?: string; stderr?: string }) =>
  planStdio("io", { terminal: false, stdin: "", stdout: "", stderr: "", ...stdio }, "c1", "ns");

describe("stdio of a process", () => {
  it("takes paths and fifo URIs as FIFOs, and nothing as nothing", () => {
    expect(plan({ stdin: "/f/0", stdout: "/f/1", stderr: "fifo:///f/2" })).toMatchObject({
      stdin: "/f/0",
      stdout: "/f/1",
      stdoutKind: stdioKind.fifo,
      stderr: "/f/2",
      stderrKind: stdioKind.fifo,
    });
    expect(plan({})).toMatchObject({ stdoutKind: stdioKind.none, stderrKind: stdioKind.none, stdin: "" });
  });

  it("sends stderr into the log file of stdout when it has none of its own", () => {
    expect(plan({ stdout: "file:///var/log/a%20b" })).toMatchObject({
      stdout: "/var/log/a b",
      stderr: "/var/log/a b",
      stderrKind: stdioKind.file,
    });
    expect(plan({ stdout: "file:///a", stderr: "file:///b" })).toMatchObject({ stderr: "/b" });
    expect(plan({ stdout: "file:///a", terminal: true })).toMatchObject({ stderrKind: stdioKind.none });
  });

  it.each(["/var/log/a", "/a b/ä%20", "/what?/#1/x;y&z=+", "/a\\b"])(
    "finds the log file %s in its URI again",
    (path) => {
      expect(plan({ stdout: logFileUri(path) })).toMatchObject({ stdout: path, stdoutKind: stdioKind.file });
    },
  );

  it.each(["file:///a%", "fifo:///a%00b", "binary:///%ff"])(
    "refuses %s, which decodes to no path",
    (stdout) => {
      expect(() => plan({ stdout })).toThrow(InvalidRequest);
    },
  );

  it("gives a log program the query as arguments and the container as environment", () => {
    expect(
      plan({ stdout: "binary:///bin/log?id=x&level=a%26b", stderr: "binary:///bin/log?id=x" }),
    ).toMatchObject({
      stdoutKind: stdioKind.logProgram,
      stderrKind: stdioKind.logProgram,
      driverArgv: ["/bin/log", "id", "x", "level", "a&b"],
      driverEnv: ["CONTAINER_ID=c1", "CONTAINER_NAMESPACE=ns"],
    });
  });

  it.each([
    [{ stdout: "npipe:////./pipe" }, /scheme npipe/],
    [{ stdout: "relative/path" }, /neither an absolute path nor a URI/],
    [{ stdin: "file:///x" }, /stdin .* must be a FIFO/],
    [{ stdout: "/f", stderr: "binary:///bin/log" }, /stderr .* names a log program/],
  ])("refuses %j", (stdio, message) => {
    expect(() => plan(stdio)).toThrow(InvalidRequest);
    expect(() => plan(stdio)).toThrow(message);
  });
});
