import { writeFile } from "node:fs/promises";
import type { CheckpointManifest } from "../../checkpoint/manifest.ts";
import { cgroupsModes, type TcpPolicy } from "../../checkpoint/policy.ts";
import { InvalidRequest, Unsupported } from "../../errors/index.ts";
import type { EngineFeatures } from "../engine.ts";
import { cedanaAnnotations, type OciSpec } from "../spec.ts";
import type { Options } from "./call.ts";

/*
 * From the options that a caller gives, which are those of runc and of crun together, to those that the engine at hand has. What it
 * has no option for and CRIU has goes to CRIU by a configuration file (CRIU_CONFIG_FILE, which engines hand on); what neither has
 * is refused by name.
 */

/** How CRIU is to deal with what it can't decide alone. */
export interface Policy {
  readonly tcp: TcpPolicy | undefined;
  readonly fileLocks: boolean;
  readonly extUnix: boolean;
  readonly shellJob: boolean;
  readonly emptyNamespaces: readonly string[];
  readonly cgroupsMode: string | undefined;
  readonly linkRemap?: boolean | undefined;
}

/** At a dump: what the container's annotations say, else what the caller does. */
export function dumpPolicy(options: Options, spec: OciSpec): Policy {
  const annotations = cedanaAnnotations(spec);
  return {
    tcp: annotations.tcp ?? tcpOf(options),
    fileLocks: annotations.fileLocks ?? options.has("file-locks"),
    extUnix: annotations.extUnix ?? options.has("ext-unix-sk"),
    shellJob: annotations.shellJob ?? options.has("shell-job"),
    emptyNamespaces: options.values("empty-ns"),
    cgroupsMode: cgroupsModeOf(options),
    linkRemap: options.has("link-remap"),
  };
}

/**
 * At a restore: annotations of the new container, else what the caller says, else what the images were taken with. CRI-O passes no
 * option for TCP at all, and images restore only with the options of their dump.
 */
export function restorePolicy(
  options: Options,
  spec: OciSpec,
  manifest: CheckpointManifest | undefined,
): Policy {
  const annotations = cedanaAnnotations(spec);
  const used = manifest?.options;
  return {
    // Connections that were dumped closed can't come back open.
    tcp: used?.tcp === "close" ? "close" : (annotations.tcp ?? tcpOf(options) ?? used?.tcp),
    fileLocks: annotations.fileLocks ?? (options.has("file-locks") || (used?.fileLocks ?? false)),
    extUnix: annotations.extUnix ?? (options.has("ext-unix-sk") || (used?.extUnix ?? false)),
    shellJob: annotations.shellJob ?? (options.has("shell-job") || (used?.shellJob ?? false)),
    emptyNamespaces: options.has("empty-ns") ? options.values("empty-ns") : (used?.emptyNamespaces ?? []),
    cgroupsMode: cgroupsModeOf(options) ?? used?.cgroupsMode,
  };
}

function cgroupsModeOf(options: Options): string | undefined {
  const mode = options.value("manage-cgroups-mode");
  if (mode !== undefined && !cgroupsModes.includes(mode))
    throw new InvalidRequest(
      `--manage-cgroups-mode is ${JSON.stringify(mode)}; it may be ${cgroupsModes.join(", ")}`,
    );
  return mode;
}

function tcpOf(options: Options): TcpPolicy | undefined {
  if (options.has("tcp-close")) return "close";
  if (options.has("tcp-skip-in-flight")) return "skip-in-flight";
  return options.has("tcp-established") ? "keep" : undefined;
}

/** Handled by the policy, or by whoever calls. */
const policyNames = new Set([
  ..."tcp-established tcp-close tcp-skip-in-flight file-locks ext-unix-sk shell-job empty-ns manage-cgroups-mode".split(
    " ",
  ),
]);
/** Of no effect on an engine that lacks them: it never does what they forbid. */
const needless = new Set(["no-subreaper", "no-new-keyring"]);
/** Where the engine has no such option (or, as crun's network-lock, one that can't be given its value). */
const criuLines: Readonly<Record<string, (value: string | undefined) => string>> = {
  "tcp-close": () => "tcp-close",
  "tcp-skip-in-flight": () => "skip-in-flight",
  "link-remap": () => "link-remap",
  "auto-dedup": () => "auto-dedup",
  "network-lock": (value) => {
    if (!["iptables", "nftables", "skip"].includes(value ?? ""))
      throw new InvalidRequest(
        `--network-lock is ${JSON.stringify(value)}; it may be iptables, nftables or skip`,
      );
    return `network-lock ${value}`;
  },
};

export interface EngineArguments {
  /** options for the engine's command line */
  readonly argv: string[];
  /** lines for CRIU's configuration file; none: no file is needed */
  readonly criuConfig: string[];
}

/**
 * @param options  what the caller gave; names in `except` are the business of whoever calls
 * @throws Unsupported naming the option
 */
export function engineArguments(
  command: "checkpoint" | "restore",
  features: EngineFeatures,
  options: Options,
  policy: Policy,
  except: readonly string[],
): EngineArguments {
  const argv: string[] = [];
  const criuConfig: string[] = [];
  const add = (name: string, value: string | undefined) => {
    if (features[command].has(name) && name !== "network-lock")
      argv.push(value === undefined ? `--${name}` : `--${name}=${value}`);
    else if (criuLines[name]) criuConfig.push(criuLines[name](value));
    else if (!needless.has(name))
      throw new Unsupported(`${features.name} ${features.version} ${command} --${name}`);
  };
  // CRIU refuses established connections even if only half-open ones are left out.
  if (policy.tcp === "keep" || policy.tcp === "skip-in-flight") add("tcp-established", undefined);
  if (policy.tcp === "close") add("tcp-close", undefined);
  if (policy.tcp === "skip-in-flight" && command === "checkpoint") add("tcp-skip-in-flight", undefined);
  if (policy.fileLocks) add("file-locks", undefined);
  if (policy.extUnix) add("ext-unix-sk", undefined);
  if (policy.shellJob) add("shell-job", undefined);
  for (const namespace of policy.emptyNamespaces) add("empty-ns", namespace);
  // runc 1.1 refuses "ignore", and crun's restore doesn't heed it: it is what a restore of ours does without a mode.
  if (policy.cgroupsMode && policy.cgroupsMode !== "ignore") add("manage-cgroups-mode", policy.cgroupsMode);
  for (const name of options.names()) {
    if (policyNames.has(name) || except.includes(name)) continue;
    const value = options.value(name);
    // An empty value, as callers give it for an option that they don't use.
    if (value === undefined && options.values(name).length > 0) continue;
    add(name, value);
  }
  return { argv, criuConfig };
}

/** @returns the environment that makes CRIU read the lines; nothing where there are none */
export async function criuConfigFile(
  path: string,
  lines: readonly string[],
): Promise<Record<string, string>> {
  if (lines.length === 0) return {};
  await writeFile(path, lines.map((line) => `${line}\n`).join(""), { mode: 0o600 });
  return { CRIU_CONFIG_FILE: path };
}
