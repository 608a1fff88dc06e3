import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { CheckpointManifest } from "../checkpoint/manifest.ts";
import { type CriuPolicy, cgroupsModes } from "../checkpoint/policy.ts";
import { criuConfig } from "../criu/option-file.ts";
import { InvalidRequest } from "../errors/index.ts";
import { type CheckpointRequestOptions, decodeCheckpointOptions } from "../runtime/options.ts";
import { cedanaAnnotations, type OciSpec } from "../runtime/spec.ts";

/**
 * @param options  of the call; default: none
 * @throws InvalidRequest for a value that means nothing
 */
export function dumpPolicy(
  options: CheckpointRequestOptions = decodeCheckpointOptions(undefined),
  spec: OciSpec,
): CriuPolicy {
  if (options.cgroupsMode !== "" && !cgroupsModes.includes(options.cgroupsMode))
    throw new InvalidRequest(
      `cgroups mode is ${JSON.stringify(options.cgroupsMode)}; it may be ${cgroupsModes.join(", ")}, or nothing`,
    );
  const annotations = cedanaAnnotations(spec);
  return {
    tcp: annotations.tcp ?? (options.openTcp ? "keep" : undefined),
    fileLocks: annotations.fileLocks ?? options.fileLocks,
    extUnix: annotations.extUnix ?? options.externalUnixSockets,
    shellJob: annotations.shellJob ?? options.terminal,
    emptyNamespaces: options.emptyNamespaces,
    cgroupsMode: options.cgroupsMode,
  };
}

export function restorePolicy(manifest: CheckpointManifest | undefined, spec: OciSpec): CriuPolicy {
  const annotations = cedanaAnnotations(spec);
  const used = manifest?.options;
  return {
    // Connections that were dumped closed can't come back open.
    tcp: used?.tcp === "close" ? "close" : (annotations.tcp ?? used?.tcp),
    fileLocks: annotations.fileLocks ?? used?.fileLocks ?? false,
    extUnix: annotations.extUnix ?? used?.extUnix ?? false,
    shellJob: annotations.shellJob ?? used?.shellJob ?? false,
    emptyNamespaces: [...(used?.emptyNamespaces ?? [])],
    cgroupsMode: used?.cgroupsMode ?? "",
  };
}

/** The policy in the engine's options, as both commands have them. */
export function policyOptions(policy: CriuPolicy) {
  return {
    tcpEstablished: policy.tcp === "keep" || policy.tcp === "skip-in-flight", // which alone still refuses established ones
    extUnixSockets: policy.extUnix,
    shellJob: policy.shellJob,
    fileLocks: policy.fileLocks,
    emptyNamespaces: policy.emptyNamespaces,
    // runc 1.1 refuses it, and crun's restore doesn't heed it: it is what a restore of ours does without a mode.
    cgroupsMode: policy.cgroupsMode === "ignore" ? undefined : policy.cgroupsMode || undefined,
  };
}

/** What the engine's `restore` has no flag for goes to CRIU by a configuration file of its own. The caller removes it. */
export async function criuConfigFile(
  bundle: string,
  wanted: Parameters<typeof criuConfig>[0],
): Promise<{ criuConfigFile?: string }> {
  const text = criuConfig(wanted);
  if (text === "") return {};
  const path = join(bundle, "criu-restore.conf");
  await writeFile(path, text, { mode: 0o600 });
  return { criuConfigFile: path };
}
