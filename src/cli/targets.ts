/** Whose configuration `cedana setup` can change. */
export const targets = ["containerd", "crio", "podman", "docker"] as const;
export type Target = (typeof targets)[number];
