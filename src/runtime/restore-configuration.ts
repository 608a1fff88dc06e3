import { lstat, realpath } from "node:fs/promises";
import { resolve } from "node:path";
import { expectAnswer } from "../linux/apart.ts";
import type { EngineName } from "./engine.ts";
import { editSpec, isBind, type OciSpec, ownsNetworkNamespace } from "./spec.ts";

/**
 * The text of a config.json as an engine's restore is to read it; everything else means what it meant.
 *
 * - runc restores into an empty network namespace, where lo is down: sockets connected over loopback don't restore, and nothing in the
 *   container can use 127.0.0.1 afterwards. A hook, which runc runs between CRIU's making of the namespaces and of the sockets, sets it up.
 * - A bind mount's source that is a symbolic link is what it leads to: the kernel follows it when the container is made, but CRIU mounts
 *   the link itself, and the engine's word for the source goes before ours.
 *
 * @param path     the file, which lies in the bundle, for messages
 * @param program  the hook's
 * @returns undefined where it is right as it is
 * @throws InvalidRequest when the text isn't a spec
 */
export async function configForRestore(
  spec: OciSpec,
  text: string,
  { bundle, path, engine, program }: { bundle: string; path: string; engine: EngineName; program: string },
): Promise<string | undefined> {
  const wantsLoopback = engine === "runc" && ownsNetworkNamespace(spec);
  const links = await linkedSources(spec, bundle);
  if (!wantsLoopback && links.size === 0) return undefined;
  return editSpec(text, path, (edited) => {
    if (wantsLoopback) {
      const hook = { path: program, args: ["cedana-loopback"], timeout: 10 };
      edited.hooks = { ...edited.hooks, createRuntime: [hook, ...(edited.hooks?.createRuntime ?? [])] };
    }
    if (edited.mounts)
      edited.mounts = edited.mounts.map((mount) => {
        const source = isBind(mount) ? links.get(mount.source ?? "") : undefined;
        return source === undefined ? mount : { ...mount, source };
      });
  });
}

/** Sources of bind mounts that are links, and what they lead to. One that leads nowhere is for others to refuse. */
async function linkedSources(spec: OciSpec, bundle: string): Promise<ReadonlyMap<string, string>> {
  const sources = (spec.mounts ?? []).filter(isBind).flatMap(({ source }) => source ?? []);
  const found = await Promise.all(
    sources.map(async (source): Promise<[string, string][]> => {
      const path = resolve(bundle, source);
      await expectAnswer(path); // a volume's server may be gone
      const isLink = await lstat(path).then(
        (entry) => entry.isSymbolicLink(),
        () => false,
      );
      const target = isLink ? await realpath(path).catch(() => undefined) : undefined;
      return target === undefined ? [] : [[source, target]];
    }),
  );
  return new Map(found.flat());
}
