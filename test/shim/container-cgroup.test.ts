import { expect, it, vi } from "vitest";
import type { Container } from "../../src/shim/container.ts";
import { ContainerCgroup } from "../../src/shim/container-cgroup.ts";

it("looks again for a kill that is noticed while one before it is found: its counter may rise later", async () => {
  const cgroup = new ContainerCgroup({} as Container);
  const first = Promise.withResolvers<boolean>();
  const looks = vi.spyOn(cgroup, "outOfMemory").mockReturnValueOnce(first.promise).mockResolvedValue(true);
  const noticed = cgroup.noticeOutOfMemory();
  await cgroup.noticeOutOfMemory();
  expect(looks).toHaveBeenCalledTimes(1); // one looks for both
  first.resolve(true);
  await noticed;
  expect(looks).toHaveBeenCalledTimes(2);
});

it("looks no more once the counter has risen", async () => {
  const cgroup = new ContainerCgroup({} as Container);
  const looks = vi.spyOn(cgroup, "outOfMemory").mockResolvedValueOnce(false).mockResolvedValue(true);
  await cgroup.noticeOutOfMemory();
  expect(looks).toHaveBeenCalledTimes(2);
});
