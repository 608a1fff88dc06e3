import { RuntimeFailed } from "../errors/index.ts";
import { mountCalls, planMount } from "../linux/mount-options.ts";
import { pathInRoot } from "../linux/root-path.ts";
import type { Mount } from "../proto/generated/types.ts";
import type { Keeper, Tag } from "./keeper.ts";

/**
 * Mounts a snapshot as containerd describes it, one mount after the other, through a keeper: it is in containerd's mount namespace.
 * @param root  where; a mount with a target of its own is below it, and no symbolic link leads it out
 * @param tag   of the operations: "0.0" is the first mount's first
 */
export async function mountAll(
  keeper: Keeper,
  mounts: readonly Mount[],
  root: string,
  tag: (step: string) => Tag,
): Promise<void> {
  for (const [index, mount] of mounts.entries()) {
    const target = await pathInRoot(root, mount.target);
    const plan = planMount(mount, target);
    if (plan.helper) {
      const exit = await keeper.run(tag(`${index}`), { argv: plan.helper.argv });
      if (exit.exitStatus !== 0)
        throw new RuntimeFailed(`mount ${mount.type} at ${target}: ${plan.helper.argv[0]} failed`, {
          exitStatus: exit.exitStatus,
        });
      continue;
    }
    for (const [part, call] of mountCalls(plan).entries()) await keeper.mount(tag(`${index}.${part}`), call);
  }
}
