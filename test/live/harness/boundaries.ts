/** With no plugin, nothing is done where their adapters stand: a crash there is one at the next boundary. */
const doesSomething = ({ name }: { name: string }) => !/adaptersOfPlugins$/i.test(name);

/** Where a chain can be cut off: before each step, and after what follows it. */
export function boundariesOf(chain: string, steps: readonly { name: string }[]): string[] {
  return steps
    .filter(doesSomething)
    .flatMap(({ name }, index, all) => [
      `${chain}.${name}.before`,
      ...(index < all.length - 1 ? [`${chain}.${name}.after`] : []),
    ]);
}
