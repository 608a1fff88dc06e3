import os from "node:os";
import { describe, expect, it } from "vitest";
import { localAddresses } from "../../src/linux/addresses.ts";

describe("addresses of a network namespace", () => {
  it("are those that Node sees, too", async () => {
    const here = await localAddresses("/proc/self/ns/net");
    for (const { address } of Object.values(os.networkInterfaces()).flatMap((list) => list ?? []))
      expect(here).toContain(address);
  });

  it("are unknown where there is none", async () => {
    expect(await localAddresses("/nowhere")).toBeUndefined();
  });
});
