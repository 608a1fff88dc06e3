import { expect, it } from "vitest";
import { NotFound } from "../../src/errors/index.ts";
import { formatTaskLog } from "../../src/shim/task-log.ts";

it("a task's line has logrus' text form, and an error its causes", () => {
  const err = new NotFound("find it", { cause: new Error('not "here"') });
  const at = new Date("2026-01-02T03:04:05.678Z");
  expect(formatTaskLog("warning", "look\nfor it", { task: "c1", err, process: "init", count: 3 }, at)).toBe(
    'time="2026-01-02T03:04:05.678Z" level=warning msg="look\\nfor it" task="c1" ' +
      'error="find it: not \\"here\\"" process="init" count="3"\n',
  );
});
