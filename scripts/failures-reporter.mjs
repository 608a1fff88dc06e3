// Vitest's reporter for test.mjs: what failed, and whether anything did that belongs to no test (a worker that crashed).

import { writeFileSync } from "node:fs";
import { relative } from "node:path";

export default class {
  onTestRunEnd(modules, unhandledErrors) {
    const failed = modules
      .filter((module) => !module.ok())
      .map((module) => ({
        file: relative(process.cwd(), module.moduleId),
        tests: [...module.children.allTests("failed")].map(({ fullName }) => fullName),
      }));
    writeFileSync(process.env.CEDANA_TEST_REPORT, JSON.stringify({ failed, errors: unhandledErrors.length }));
  }
}
