import { type ClientHttp2Session, connect as connectHttp2 } from "node:http2";
import { connect } from "node:net";
import type { CheckpointManifest } from "../checkpoint/manifest.ts";
import { RemoteFailed, TimedOut } from "../errors/index.ts";
import {
  GetContainerRequest,
  GetContainerResponse,
  GetImageRequest,
  GetImageResponse,
} from "../proto/generated/containerd_store.ts";
import { annotatedImage } from "../runtime/manifest-facts.ts";
import type { OciSpec } from "../runtime/spec.ts";
import type { Task } from "./task.ts";

/** A checkpoint is as good without it. */
const PATIENCE_MS = 2_000;

/**
 * The image of a task's container: as its annotations name it, under Kubernetes; else as containerd knows it.
 * @returns undefined for a container without one, and where containerd doesn't answer, which is logged
 */
export async function imageOf(task: Task, spec: OciSpec): Promise<CheckpointManifest["image"]> {
  const annotated = annotatedImage(spec);
  if (annotated?.digest !== undefined || task.pod.containerdAddress === "") return annotated;
  try {
    using containerd = new Containerd(task.pod.containerdAddress, task.namespace);
    const { container } = GetContainerResponse.decode(
      await containerd.call("containers.v1.Containers", GetContainerRequest.encode({ id: task.id })),
    );
    const name = container?.image || annotated?.name;
    if (!name) return undefined;
    const digest = await containerd.call("images.v1.Images", GetImageRequest.encode({ name })).then(
      (bytes) => GetImageResponse.decode(bytes).image?.target?.digest,
      (error) => {
        if (error instanceof RemoteFailed) return undefined; // NotFound: it has been removed, or goes by another name now
        throw error;
      },
    );
    return { name: annotated?.name ?? name, ...(digest && { digest }) };
  } catch (error) {
    task.log.warn({ err: error }, "ask containerd for a container's image: its checkpoint doesn't name it");
    return annotated;
  }
}

/** A peer may send anything; what isn't encoded as it should be is shown as it came. */
function decodedMessage(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // URIError
  }
}

/** `Get` of containerd's services. Two small calls: gRPC's library would take longer to load than they take. */
class Containerd implements Disposable {
  readonly #session: ClientHttp2Session;
  readonly #namespace: string;

  constructor(address: string, namespace: string) {
    this.#namespace = namespace;
    this.#session = connectHttp2("http://localhost", { createConnection: () => connect(address) });
    this.#session.on("error", () => {}); // each call has it, too
  }

  /** @throws RemoteFailed with the call's status, TimedOut */
  async call(service: string, request: Uint8Array): Promise<Buffer> {
    const stream = this.#session.request({
      ":method": "POST",
      ":path": `/containerd.services.${service}/Get`,
      "content-type": "application/grpc",
      te: "trailers",
      "containerd-namespace": this.#namespace,
    });
    const chunks: Buffer[] = [];
    let status: { code: number; message: string } | undefined;
    const note = (headers: Record<string, unknown>) => {
      if (headers["grpc-status"] === undefined) return;
      status = {
        code: Number(headers["grpc-status"]),
        message: decodedMessage(String(headers["grpc-message"] ?? "")),
      };
    };
    stream.on("response", note); // an error may come without a message before it
    stream.on("trailers", note);
    stream.on("data", (chunk: Buffer) => chunks.push(chunk));
    await new Promise<void>((resolve, reject) => {
      stream.setTimeout(PATIENCE_MS, () => {
        stream.close();
        reject(new TimedOut(`containerd did not answer for ${PATIENCE_MS} ms`));
      });
      stream.on("error", reject);
      stream.on("close", resolve);
      const header = Buffer.alloc(5); // not compressed, and the length
      header.writeUInt32BE(request.length, 1);
      stream.end(Buffer.concat([header, request]));
    });
    if (status?.code !== 0)
      throw new RemoteFailed(`${service}: ${status?.message ?? "the connection was lost"}`, {
        code: status?.code ?? 14,
      });
    return Buffer.concat(chunks).subarray(5);
  }

  [Symbol.dispose](): void {
    this.#session.close();
  }
}
