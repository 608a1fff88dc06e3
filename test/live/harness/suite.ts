import { afterAll, afterEach, beforeAll } from "vitest";
import { Live } from "./live.ts";

/**
 * A containerd for all tests of a `describe`: started before the first one, looked through for what each has left, stopped after the last.
 * @param begin  gets it; what is to be there before the first test is made here
 */
export function liveFor(
  options: Parameters<typeof Live.start>[0],
  begin: (live: Live) => void | Promise<void>,
): void {
  let live: Live | undefined;
  beforeAll(async () => {
    live = await Live.start(options);
    await begin(live);
  });
  afterEach(() => live!.expectNoLeftovers());
  afterAll(() => live?.stop());
}
