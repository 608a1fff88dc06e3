import { createHash } from "node:crypto";
import { join } from "node:path";
import { InvalidRequest } from "../errors/index.ts";
import { bootstrap, google } from "../proto/index.ts";
import { decodeOptions, isRuntimeOptions, type RuntimeOptions } from "../runtime/options.ts";
import { groupOf, readSpec } from "../runtime/spec.ts";
import type { FieldValues, Message } from "./keeper-protocol.ts";

/**
 * The answer to a launcher's `start`: where the task's keeper listens, or is to listen.
 *
 * The path is a function of containerd's address, the namespace and the pod (else the container), so that a second container
 * of a pod finds the keeper of the first, and a launcher that is run twice finds its own, without asking what we remember.
 *
 * containerd 1.6 and 1.7 take a bare address (1.7 refuses a `version` above 2 in a JSON answer); who announces
 * MAX_SHIM_VERSION 3 or more gets JSON with version 3. From 2.3 on, stdin may hold BootstrapParams instead of options; an old
 * option message can parse as such by accident, so it counts only when id and namespace agree with the flags.
 */
export async function answerStart(message: Message, runDirectory: string): Promise<FieldValues> {
  const [namespace, id, bundle] = [
    message.string("namespace"),
    message.string("id"),
    message.string("bundle"),
  ];
  const spec = await readSpec(bundle);
  const group = groupOf(spec) ?? id;
  const name = createHash("sha256")
    .update([message.string("containerdAddress"), namespace, group].join("\0"))
    .digest("hex")
    .slice(0, 32);
  const socketPath = join(runDirectory, "s", name);
  if (Buffer.byteLength(socketPath) > 107)
    throw new InvalidRequest(`run directory ${runDirectory} is too long for unix sockets below it`);
  const address = `unix://${socketPath}`;
  return {
    socketPath,
    shimCgroup: await shimCgroupOf(message.bytes("options"), namespace, id),
    answer: Buffer.from(
      message.int("maxShimVersion") >= 3
        ? JSON.stringify({ version: 3, address, protocol: "ttrpc" })
        : address,
    ),
  };
}

async function shimCgroupOf(stdin: Buffer, namespace: string, id: string): Promise<string> {
  if (stdin.length === 0) return "";
  const params = bootstrapParams(stdin, namespace, id);
  if (!params) return (await optionsIn([decodeAny(stdin)]))?.shimCgroup ?? "";
  // Extensions may be anything; the runtime's options are those of a type that we know.
  const known = params.extensions.flatMap(({ value }) => (value && isRuntimeOptions(value) ? [value] : []));
  return (await optionsIn(known))?.shimCgroup ?? "";
}

async function optionsIn(messages: readonly google.Any[]): Promise<RuntimeOptions | undefined> {
  const any = messages.find(({ typeUrl }) => typeUrl !== "");
  return any && (await decodeOptions(any));
}

function decodeAny(stdin: Buffer): google.Any {
  try {
    return google.Any.decode(stdin);
  } catch (error) {
    throw new InvalidRequest("the runtime options on stdin are no protobuf Any", { cause: error });
  }
}

/** undefined when it is another message, or somebody else's */
function bootstrapParams(
  stdin: Buffer,
  namespace: string,
  id: string,
): bootstrap.BootstrapParams | undefined {
  try {
    const params = bootstrap.BootstrapParams.decode(stdin);
    return params.instanceId === id && params.namespace === namespace ? params : undefined;
  } catch {
    return undefined; // not this message: then they are options
  }
}
