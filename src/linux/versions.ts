/** Versions by their numbers: "4.2.1" is above "4.2", which "4.2.0" is equal to; what follows the numbers doesn't count ("6.18.44-fc"). @returns -1, 0, 1 */
export function compareVersions(one: string, other: string): number {
  const numbers = (text: string) => (/^v?(\d+(?:\.\d+)*)/.exec(text)?.[1] ?? "0").split(".").map(Number);
  const [a, b] = [numbers(one), numbers(other)];
  for (let i = 0; i < Math.max(a.length, b.length); i++) {
    const difference = (a[i] ?? 0) - (b[i] ?? 0);
    if (difference !== 0) return Math.sign(difference);
  }
  return 0;
}

export function isOlder(version: string, than: string): boolean {
  return compareVersions(version, than) < 0;
}
