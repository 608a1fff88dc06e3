import { constants } from "node:fs";
import { open } from "node:fs/promises";
import { join } from "node:path";
import { BrokenImage, Unsupported } from "../../errors/index.ts";
import type { CheckpointManifest } from "../manifest.ts";
import { MANIFEST_NAME } from "../manifest.ts";
import { DELETED_FILES_NAME, ROOTFS_DIFF_NAME } from "../rootfs-diff/names.ts";

/**
 * Whose checkpoint it is, by what lies in it. All keep CRIU's images in `checkpoint/`:
 *
 *   cedana          cedana.json · checkpoint/ · config.dump · spec.dump · rootfs-diff.tar · deleted.files
 *   podman          checkpoint/ · config.dump · spec.dump · network.status · rootfs-diff.tar · deleted.files · artifacts/ · ctr.log ·
 *                   devshm-checkpoint.tar · volumes/NAME.tar · pre-checkpoint/ · stats-dump · dump.log
 *   crio            checkpoint/ · config.dump · spec.dump · bind.mounts · io.kubernetes.cri-o.LogPath · rootfs-diff.tar ·
 *                   deleted.files · stats-dump · dump.log
 *   containerd-cri  checkpoint/ · config.dump · spec.dump · status · status.dump · container.log · rootfs-diff.tar · stats-dump ·
 *                   dump.log
 *   criu            CRIU's images and nothing around them: `runc checkpoint`, `ctr task checkpoint --image-path`
 *   oci             an OCI image layout with a checkpoint of containerd's content store in it, see content-store.ts
 */
export const layouts = ["cedana", "podman", "crio", "containerd-cri", "criu", "oci"] as const;
export type Layout = (typeof layouts)[number];

/** The layouts that archives are written in. */
export const writtenLayouts = ["cedana", "podman", "crio", "containerd-cri"] as const;
export type WrittenLayout = (typeof writtenLayouts)[number];

export const IMAGES_DIRECTORY = "checkpoint";
const CONFIG_DUMP = "config.dump";
const SPEC_DUMP = "spec.dump";

/**
 * @param names    paths of the files in it
 * @param manager  annotation `io.container.manager` of spec.dump, where it is known
 * @throws BrokenImage when it is no checkpoint; Unsupported for one of a whole pod
 */
function detectLayout(names: Iterable<string>, manager?: string): Layout {
  const files = new Set(names);
  if (files.has(MANIFEST_NAME)) return files.has("inventory.img") ? "criu" : "cedana";
  if (files.has("pod.dump") || files.has("checkpointed.pods"))
    throw new Unsupported("it is a checkpoint of a whole pod: restore it with what made it");
  if (files.has("oci-layout") && files.has("index.json")) return "oci";
  if (files.has("inventory.img")) return "criu";
  const described = files.has(CONFIG_DUMP) && files.has(SPEC_DUMP);
  if (!described && files.has(join(IMAGES_DIRECTORY, "inventory.img"))) return "cedana"; // nobody else leaves these out
  if (!described)
    throw new BrokenImage(
      `it is not a checkpoint that we know: it has no ${[MANIFEST_NAME, CONFIG_DUMP, SPEC_DUMP].filter((name) => !files.has(name)).join(", ")} and no inventory.img`,
    );
  if (files.has(join(IMAGES_DIRECTORY, MANIFEST_NAME)) && !manager && !files.has("status.dump"))
    return "cedana";
  if (manager === "libpod") return "podman";
  if (manager === "cri-o") return "crio";
  if (files.has("status.dump") || files.has("container.log")) return "containerd-cri";
  if (files.has("bind.mounts") || files.has("io.kubernetes.cri-o.LogPath")) return "crio";
  return "podman";
}

/** What a checkpoint's own files say of it. */
export interface CheckpointDescription {
  layout: Layout;
  /** directory of CRIU's images, relative; empty: the directory itself */
  images: string;
  rootfsDiff: boolean;
  deletedFiles: boolean;
  container: {
    id: string;
    name: string;
    image: string;
    runtime: string;
    createdAt: string;
    pod: string;
    namespace: string;
  };
  manifest: CheckpointManifest | undefined;
}

interface Spec {
  annotations?: Record<string, string>;
}

/**
 * @param files     paths of the files in it
 * @param readJson  the parsed content of one of them; undefined when it is not there
 */
export async function describe(
  files: readonly string[],
  readJson: (name: string) => Promise<unknown>,
  manifest: CheckpointManifest | undefined,
): Promise<CheckpointDescription> {
  const spec = ((await readJson(SPEC_DUMP)) ?? {}) as Spec;
  const config = ((await readJson(CONFIG_DUMP)) ?? {}) as Record<string, unknown>;
  const notes = (typeof spec.annotations === "object" && spec.annotations) || {};
  const layout = detectLayout(files, notes["io.container.manager"]);
  const text = (...values: unknown[]) =>
    values.find((value): value is string => typeof value === "string" && value !== "") ?? "";
  const images = files.includes("inventory.img") ? "" : IMAGES_DIRECTORY;
  if (layout !== "oci" && !files.includes(join(images, "inventory.img")))
    throw new BrokenImage(`it holds no ${join(images, "inventory.img")}: CRIU can't restore it`);
  return {
    layout,
    images,
    rootfsDiff: files.includes(ROOTFS_DIFF_NAME),
    deletedFiles: files.includes(DELETED_FILES_NAME),
    container: {
      id: text(manifest?.containerId, config.id),
      name: text(
        notes["io.kubernetes.cri.container-name"],
        notes["io.kubernetes.container.name"],
        config.name,
      ),
      image: text(manifest?.image?.name, config.rootfsImageName, config.rootfsImage),
      runtime: text(manifest?.engine.name, config.runtime),
      createdAt: text(manifest?.createdAt, config.checkpointedTime, config.createdTime),
      pod: text(notes["io.kubernetes.cri.sandbox-name"], notes["io.kubernetes.pod.name"]),
      namespace: text(
        notes["io.kubernetes.cri.sandbox-namespace"],
        notes["io.kubernetes.pod.namespace"],
        manifest?.namespace,
      ),
    },
    manifest,
  };
}

/** JSON of a checkpoint's directory, from anybody: no link is followed, and no more than 16 MiB are read. */
export async function readJsonFile(path: string): Promise<unknown> {
  let file: Awaited<ReturnType<typeof open>>;
  try {
    file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw new BrokenImage(`${path} can't be read`, { cause: error });
  }
  await using _closed = file;
  const info = await file.stat();
  if (!info.isFile() || info.size > 16 * 1024 * 1024)
    throw new BrokenImage(`${path} is not a file of reasonable size`);
  return parseJson(await file.readFile("utf8"), path);
}

export function parseJson(text: string, name: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    throw new BrokenImage(`${name} is not JSON`); // without the parser's words: they quote the file
  }
}

/** What the other layouts say of a container beside the images. */
export interface ExportedContainer {
  id: string;
  name: string;
  /** as a user names it, `docker.io/library/busybox:latest` */
  image: string;
  imageDigest?: string | undefined;
  /** runc, crun */
  runtime: string;
  /** ISO 8601 */
  createdAt: string;
  checkpointedAt: string;
  /** the OCI runtime spec */
  spec: object;
  pod?: { name: string; namespace: string; uid?: string; logPath?: string } | undefined;
}

/**
 * The files that a layout has beside CRIU's images, the rootfs diff and the logs.
 * Sources: containerd internal/cri/server/container_checkpoint_linux.go; CRI-O internal/lib/checkpoint.go; Podman
 * libpod/container_internal_common.go; checkpointctl lib/metadata.go.
 */
export function layoutFiles(layout: WrittenLayout, container: ExportedContainer): Record<string, string> {
  const { pod } = container;
  const spec = container.spec as Spec & {
    mounts?: { type?: string; source?: string; destination: string }[];
  };
  const json = (value: unknown) => JSON.stringify(value);
  const withNotes = (notes: Record<string, string | undefined>) =>
    json({
      ...spec,
      annotations: {
        ...spec.annotations,
        ...Object.fromEntries(
          Object.entries(notes).filter(([, value]) => value !== undefined && value !== ""),
        ),
      },
    });
  const config = {
    id: container.id,
    name: container.name,
    rootfsImage: container.imageDigest ?? container.image,
    rootfsImageRef: container.imageDigest ?? container.image,
    rootfsImageName: container.image,
    runtime: container.runtime,
    createdTime: container.createdAt,
    checkpointedTime: container.checkpointedAt,
    restoredTime: "0001-01-01T00:00:00Z",
    restored: false,
  };
  const bindMounts = (spec.mounts ?? [])
    .filter((mount) => mount.type === "bind" && mount.source)
    .map(({ source, destination }) => ({ source, destination }));
  if (layout === "podman")
    return {
      [CONFIG_DUMP]: json({ ...config, rootfsImageID: container.imageDigest?.replace(/^sha256:/, "") ?? "" }),
      [SPEC_DUMP]: withNotes({ "io.container.manager": "libpod" }),
      "network.status": "{}",
    };
  if (layout === "crio")
    return {
      [CONFIG_DUMP]: json(config),
      [SPEC_DUMP]: withNotes({
        "io.container.manager": "cri-o",
        "io.kubernetes.cri-o.Metadata": json({ name: container.name }),
        "io.kubernetes.cri-o.Created": container.createdAt,
        "io.kubernetes.pod.name": pod?.name,
        "io.kubernetes.pod.namespace": pod?.namespace,
        "io.kubernetes.pod.uid": pod?.uid,
        "io.kubernetes.container.name": container.name,
      }),
      "bind.mounts": json(bindMounts),
      ...(pod?.logPath && { "io.kubernetes.cri-o.LogPath": "" }),
    };
  const criNotes = {
    "io.kubernetes.cri.container-name": container.name,
    "io.kubernetes.cri.sandbox-name": pod?.name,
    "io.kubernetes.cri.sandbox-namespace": pod?.namespace,
    "io.kubernetes.cri.sandbox-uid": pod?.uid,
  };
  const files = { [CONFIG_DUMP]: json(config), [SPEC_DUMP]: withNotes(criNotes) };
  if (layout === "cedana") return files;
  const createdAt = Number.isNaN(Date.parse(container.createdAt)) ? 0 : Date.parse(container.createdAt) * 1e6;
  return {
    ...files,
    // CRI's ContainerStatus and containerd's own record of it. State 1 is CONTAINER_RUNNING.
    "status.dump": json({
      id: container.id,
      metadata: { name: container.name },
      state: 1,
      created_at: createdAt,
      started_at: createdAt,
      image: { image: container.image },
      image_ref: container.imageDigest ?? "",
      labels: {},
      annotations: {},
      mounts: bindMounts.map(({ source, destination }) => ({
        container_path: destination,
        host_path: source,
      })),
      log_path: pod?.logPath ?? "",
    }),
    status: json({
      Version: "v1",
      Pid: 0,
      CreatedAt: createdAt,
      StartedAt: createdAt,
      FinishedAt: 0,
      ExitCode: 0,
    }),
  };
}

/** Of what the manifest knows, for a checkpoint that holds no spec. */
export function containerOf(manifest: CheckpointManifest): ExportedContainer {
  return {
    id: manifest.containerId,
    name: manifest.containerId,
    image: manifest.image?.name ?? "",
    imageDigest: manifest.image?.digest,
    runtime: manifest.engine.name,
    createdAt: manifest.createdAt,
    checkpointedAt: manifest.createdAt,
    spec: { ociVersion: "1.0.2" },
  };
}
