// Waiting for a condition that nothing announces: /proc, cgroups, directories.

/** Returns the first value of `probe` that is not undefined, null or false. */
export async function until<T>(
  probe: () => T | Promise<T>,
  { timeoutMs = 10_000, everyMs = 10, what = () => "condition" as string } = {},
): Promise<NonNullable<Exclude<T, false>>> {
  const deadline = Date.now() + timeoutMs;
  for (;;) {
    const value = await probe();
    if (value !== undefined && value !== null && value !== false)
      return value as NonNullable<Exclude<T, false>>;
    if (Date.now() > deadline) throw new Error(`waited ${timeoutMs} ms in vain for ${what()}`);
    await new Promise((resolve) => setTimeout(resolve, everyMs));
  }
}
