// `npm test`: vitest with the arguments given; its status is ours.
//
// In continuous integration (CI=true) a few files that failed are run once more, by themselves, on a machine that has become quiet:
// what fails again is broken. What then passes is said at the end, by name, with what it failed by standing above: a race in a test, or
// in what it tests, that somebody has to look at. By hand nothing is repeated.

import { spawnSync } from "node:child_process";
import { mkdirSync, readFileSync, rmSync } from "node:fs";
import { join, relative } from "node:path";

const repository = join(import.meta.dirname, "..");
const vitest = join(repository, "node_modules/.bin/vitest");
const report = join(repository, "build/test-report.json");
/** More files than this don't fail by chance. */
const MOST_REPEATED = 6;

/** @returns vitest's status */
function run(args) {
  mkdirSync(join(repository, "build"), { recursive: true });
  rmSync(report, { force: true });
  const reporters = ["--reporter=default", "--reporter=json", `--outputFile.json=${report}`];
  const { status, signal, error } = spawnSync(vitest, ["run", ...reporters, ...args], {
    cwd: repository,
    stdio: "inherit",
  });
  if (error) throw error;
  return status ?? (signal ? 1 : 0);
}

function failures() {
  const { testResults } = JSON.parse(readFileSync(report, "utf8"));
  return testResults
    .filter(({ status }) => status === "failed")
    .map(({ name, assertionResults }) => ({
      file: relative(repository, name),
      tests: assertionResults.filter(({ status }) => status === "failed").map(({ fullName }) => fullName),
    }));
}

let status = run(process.argv.slice(2));
if (status !== 0 && process.env.CI === "true") {
  const failed = failures();
  if (failed.length > 0 && failed.length <= MOST_REPEATED) {
    console.log(`test: once more, by themselves: ${failed.map(({ file }) => file).join(", ")}`);
    status = run(failed.map(({ file }) => file));
    const again = new Set(failures().map(({ file }) => file));
    for (const { file, tests } of failed)
      if (!again.has(file))
        console.log(`test: FAILED ONCE, then passed: ${[file, ...tests].join("\n        ")}`);
  }
}
process.exit(status);
