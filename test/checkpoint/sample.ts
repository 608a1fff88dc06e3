import type { CheckpointManifest } from "../../src/checkpoint/manifest.ts";

/** A manifest of some container, for checkpoints that tests make up. */
export const sampleManifest: Omit<CheckpointManifest, "version" | "files"> = {
  createdAt: "2026-01-02T03:04:05Z",
  containerId: "0123456789abcdef",
  namespace: "default",
  terminal: false,
  kernel: "6.12.0",
  image: { name: "docker.io/library/busybox:latest" },
  engine: { name: "runc", version: "1.3.6", path: "/usr/sbin/runc" },
  options: { fileLocks: true, extUnix: false, shellJob: false, emptyNamespaces: [], leaveRunning: true },
  specDigest: "ab".repeat(32),
  timings: { totalMs: 154 },
};
