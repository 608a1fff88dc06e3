/** What Podman, CRI-O and containerd's CRI call a container's changes, and the list of what it deleted. */
export const ROOTFS_DIFF_NAME = "rootfs-diff.tar";
export const DELETED_FILES_NAME = "deleted.files";
