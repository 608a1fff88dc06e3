import { lstat, readdir } from "node:fs/promises";
import { join } from "node:path";
import { ImageReader } from "../../criu/image/index.ts";
import { hasCriuFeature } from "../../criu/probe.ts";
import { messageOf } from "../../errors/index.ts";

/** Of a pagemap entry. Source: CRIU, pagemap.h. */
const PE_LAZY = 2;

/**
 * Why a container can't be restored lazily, for people; undefined when it can.
 * @param imagePath      directory of CRIU's images
 * @param userNamespace  whether the container has a user namespace of its own
 */
export async function whyNotLazy(imagePath: string, userNamespace: boolean): Promise<string | undefined> {
  // The kernel refuses its processes a userfaultfd that sees the kernel's own accesses (userfaultfd(2), vm.unprivileged_userfaultfd).
  if (userNamespace)
    return "it has a user namespace of its own, whose processes the kernel gives no userfaultfd";
  if (await lstat(join(imagePath, "parent")).catch(() => undefined))
    return "the images build on those of a pre-dump";
  try {
    if (!(await hasCriuFeature("uffd-noncoop")))
      return "kernel or CRIU can't do it here (`criu check --feature uffd-noncoop`): no userfaultfd, or no permission for it";
    return (await hasLazyPages(imagePath))
      ? undefined
      : "none of its memory can be filled later (no lazy pages in the images)";
  } catch (error) {
    return messageOf(error);
  }
}

/** CRIU marks at the dump what it could restore lazily: private anonymous memory, but no stacks. Read until the first of them. */
async function hasLazyPages(imagePath: string): Promise<boolean> {
  for (const name of await readdir(imagePath)) {
    if (!/^pagemap-\d+\.img$/.test(name)) continue;
    await using image = await ImageReader.open(join(imagePath, name), { exact: false });
    for await (const { value } of image.entries()) if (Number(value.flags ?? 0) & PE_LAZY) return true;
  }
  return false;
}
