import { expect, it } from "vitest";
import { inTurn } from "../../../src/runtime/oci/turns.ts";

const { signal } = new AbortController();
const turn = () => new Promise((resolve) => setImmediate(resolve));

it("what is done for a container comes one after another, others' beside it", async () => {
  const said: string[] = [];
  const gate = Promise.withResolvers<void>();
  const slow = inTurn("a", signal, async () => {
    said.push("+a1");
    await gate.promise;
    said.push("-a1");
    throw new Error("a1 failed");
  });
  const next = inTurn("a", signal, async () => said.push("a2"));
  await inTurn("b", signal, async () => said.push("b"));
  expect(said).toEqual(["+a1", "b"]);
  gate.resolve();
  await expect(slow).rejects.toThrow("a1 failed");
  await next;
  await inTurn("a", signal, async () => said.push("a3"));
  expect(said).toEqual(["+a1", "b", "-a1", "a2", "a3"]);
});

it("what nobody waits for any more isn't begun", async () => {
  const gate = Promise.withResolvers<void>();
  const first = inTurn("a", signal, () => gate.promise);
  const gone = new AbortController();
  let begun = false;
  const second = inTurn("a", gone.signal, async () => {
    begun = true;
  });
  await turn();
  gone.abort();
  gate.resolve();
  await first;
  await expect(second).rejects.toThrow(/aborted/);
  expect(begun).toBe(false);
});
