import { Unavailable } from "../errors/index.ts";
import { google, types } from "../proto/index.ts";
import { decodeOptions } from "../runtime/options.ts";
import type { FieldValues } from "./keeper-protocol.ts";

const RUNTIME_NAME = "io.containerd.cedana.v2";
const FEATURES_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
const FEATURES_TIMEOUT_MS = 5_000;

/**
 * containerd's RuntimeInfo for the launcher's `-info`: our name and version, and what the engine says of its features.
 * @param stdin  runtime options as a protobuf Any, may be empty
 * @throws Unavailable when the engine isn't there or doesn't answer
 */
export async function runtimeInfo(stdin: Buffer, build: string): Promise<FieldValues> {
  const given = stdin.length === 0 ? undefined : google.Any.decode(stdin);
  const options = await decodeOptions(given?.typeUrl ? given : undefined);
  const engine = options.binaryName || "runc";
  const { execa } = await import("execa"); // rarely needed, and big
  let features: string;
  try {
    features = (await execa(engine, ["features"], { timeout: FEATURES_TIMEOUT_MS })).stdout;
  } catch (error) {
    throw new Unavailable(`ask engine ${engine} for its features`, { cause: error });
  }
  const answer = types.RuntimeInfo.encode({
    name: RUNTIME_NAME,
    version: { version: build, revision: "" },
    ...(given?.typeUrl && { options: given }),
    features: { typeUrl: FEATURES_TYPE, value: Buffer.from(JSON.stringify(JSON.parse(features))) },
    annotations: {},
  });
  return { answer };
}
