/**
 * Where a chain can be cut off: before each step, and after what follows it. Without those where the adapters of plugins stand: with no
 * plugin they do nothing, and a crash there is one at the next boundary.
 */
export function boundariesOf(chain: string, steps: readonly { name: string }[]): string[] {
  return steps
    .filter(({ name }) => !/adaptersOfPlugins$/i.test(name))
    .flatMap(({ name }, index, all) => [
      `${chain}.${name}.before`,
      ...(index < all.length - 1 ? [`${chain}.${name}.after`] : []),
    ]);
}
