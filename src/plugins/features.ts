import { dumpFeatures, restoreFeatures } from "../checkpoint/features.ts";
import { Feature, isFunction, isListOf } from "../features/registry.ts";
import type { HealthCheck } from "./health.ts";

/**
 * Every feature there is, in the order in which the matrix shows them. Some are values that the chains and commands use as they are
 * (adapters, health checks); a handler is a reference to the code that does it, loaded when it is called for; a command is the id of
 * a command of `cedana`.
 */

/** Loads the code of a handler. */
export type Handler = () => Promise<(...args: never[]) => unknown>;

const handler = (title: string) => new Feature<Handler>(title, isFunction);
const command = (title: string) =>
  new Feature<string>(title, (value) => (typeof value === "string" ? undefined : "is not a command's id"));

export const features = {
  dumpCommand: command("Dump command"),
  restoreCommand: command("Restore command"),
  runCommand: command("Run command"),
  manageCommand: command("Manage command"),
  queryCommand: command("Query command"),
  freezeCommand: command("Freeze command"),
  unfreezeCommand: command("Unfreeze command"),
  dumpVmCommand: command("Dump VM command"),
  helperCommand: command("Helper command"),
  ...dumpFeatures,
  dumpHandler: handler("Dump handler"),
  ...restoreFeatures,
  restoreHandler: handler("Restore handler"),
  dumpVmMiddleware: handler("Dump VM middleware"),
  dumpVmHandler: handler("Dump VM handler"),
  restoreVmMiddleware: handler("Restore VM middleware"),
  restoreVmHandler: handler("Restore VM handler"),
  runMiddleware: handler("Run middleware"),
  runMiddlewareLate: handler("Run middleware (late)"),
  runHandler: handler("Run handler"),
  runHandlerServerless: handler("Run handler (serverless)"),
  manageHandler: handler("Manage handler"),
  freezeHandler: handler("Freeze handler"),
  unfreezeHandler: handler("Unfreeze handler"),
  queryHandler: handler("Query handler"),
  killSignal: handler("Custom kill signal"),
  cleanup: handler("Custom cleanup"),
  reaper: handler("Custom reaper"),
  gpuInterception: handler("GPU interception"),
  gpuInterceptionRestore: handler("GPU interception restore"),
  gpuTracing: handler("GPU tracing"),
  gpuTracingRestore: handler("GPU tracing restore"),
  checkpointInspect: handler("Checkpoint inspect"),
  checkpointDecode: handler("Checkpoint decode"),
  checkpointEncode: handler("Checkpoint encode"),
  checkpointStorage: handler("Checkpoint storage"),
  slurmJobs: handler("Slurm"),
  asyncCheckpoint: handler("Asynchronous checkpoint"),
  healthChecks: new Feature<readonly HealthCheck[]>(
    "Health checks",
    isListOf({ name: "string", run: "function" }),
  ),
} as const;

export type FeatureName = keyof typeof features;

type ValueOf<F> = F extends Feature<infer T> ? T : never;
export type FeatureValues = { readonly [Name in FeatureName]?: ValueOf<(typeof features)[Name]> };

/** What a plugin from outside may export: what is called by contract, and not by what our own code happens to be. */
export const openFeatures: readonly FeatureName[] = [
  "dumpMiddleware",
  "dumpMiddlewareLate",
  "restoreMiddleware",
  "restoreMiddlewareLate",
  "healthChecks",
];

/** Columns that the matrix always has, whether there is such a plugin or not. */
export const knownPlugins = [
  "cloud-hypervisor",
  "runc",
  "crun",
  "containerd",
  "crio",
  "kata",
  "k8s",
] as const;
