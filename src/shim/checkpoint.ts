import { access, copyFile, mkdir, readdir, rm, stat } from "node:fs/promises";
import { join } from "node:path";
import { type CheckpointManifest, readManifest, writeManifest } from "../checkpoint/manifest.ts";
import { explainCriuLog } from "../criu/log.ts";
import { BrokenImage, CriuFailed, InvalidRequest, NotFound } from "../errors/index.ts";
import { type CheckpointOptions, engineFailure, engineVersion, type RestoreOptions } from "../runtime/engine.ts";
import { cedanaAnnotations, type OciSpec } from "../runtime/spec.ts";
import type { Task, Work } from "./task.ts";

/**
 * Dump and restore as containerd's Task API asks for them, by way of the engine's own `checkpoint` and `restore`.
 *
 * Options come from three places: containerd's CheckpointOptions, the container's `cedana.io/…` annotations for what those
 * can't carry, and, at a restore, the manifest beside the images, because an image must be restored with the options that it
 * was taken with. The later one wins.
 */

export interface CheckpointRequest {
  imagePath: string;
  options: {
    exit: boolean;
    openTcp: boolean;
    externalUnixSockets: boolean;
    terminal: boolean;
    fileLocks: boolean;
    emptyNamespaces: string[];
    cgroupsMode: string;
    workPath: string;
    parentPath: string;
  };
}
