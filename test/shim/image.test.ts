import fs from "node:fs";
import { createServer, type Http2Server } from "node:http2";
import os from "node:os";
import path from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { GetContainerResponse } from "../../src/proto/generated/containerd_containers.ts";
import { GetImageResponse } from "../../src/proto/generated/containerd_images.ts";
import { imageOf } from "../../src/shim/image.ts";
import type { Task } from "../../src/shim/task.ts";

let directory: string;
let containerd: Http2Server;
/** what containerd answers, by service: a message, or the status of an error */
let answers: Record<string, Uint8Array | { status: number; message: string }>;
let warnings: unknown[];
let task: Task;
beforeEach(async () => {
  directory = fs.mkdtempSync(path.join(os.tmpdir(), "image-"));
  const address = path.join(directory, "containerd.sock");
  answers = {};
  warnings = [];
  containerd = createServer();
  containerd.on("stream", (stream, headers) => {
    const answer = answers[String(headers[":path"]).split("/")[1]!.replace("containerd.services.", "")]!;
    if (!(answer instanceof Uint8Array)) {
      stream.respond(
        { ":status": 200, "grpc-status": answer.status, "grpc-message": answer.message },
        { endStream: true },
      );
      return;
    }
    const length = Buffer.alloc(5);
    length.writeUInt32BE(answer.length, 1);
    stream.respond({ ":status": 200 }, { waitForTrailers: true });
    stream.on("wantTrailers", () => stream.sendTrailers({ "grpc-status": 0 }));
    stream.end(Buffer.concat([length, answer]));
  });
  await new Promise<void>((resolve) => containerd.listen(address, resolve));
  const log = { info() {}, error() {}, warn: (fields: { err: Error }) => warnings.push(fields.err.message) };
  task = { id: "c1", namespace: "ns", pod: { containerdAddress: address }, log } as unknown as Task;
});
afterEach(async () => {
  await new Promise((resolve) => containerd.close(resolve));
  fs.rmSync(directory, { recursive: true });
});

it("is what containerd says", async () => {
  answers["containers.v1.Containers"] = GetContainerResponse.encode({
    container: { image: "docker.io/a:1" },
  });
  answers["images.v1.Images"] = GetImageResponse.encode({ image: { target: { digest: "sha256:1" } } });
  expect(await imageOf(task, {})).toEqual({ name: "docker.io/a:1", digest: "sha256:1" });
  answers["images.v1.Images"] = { status: 5, message: "image %22x%22: not found" };
  expect(await imageOf(task, {})).toEqual({ name: "docker.io/a:1" });
  expect(warnings).toEqual([]);
});

it("is nothing where containerd fails, whatever it says", async () => {
  answers["containers.v1.Containers"] = { status: 13, message: "100% of %ff" };
  expect(await imageOf(task, {})).toBeUndefined();
  expect(warnings).toEqual([`containerd (${path.join(directory, "containerd.sock")}): Get: 100% of %ff`]);
});
