// `npm test`: vitest with the arguments given; its status is ours. Without arguments all tests, and those in which systemd makes a
// difference once more on a host where it makes the cgroups (with-systemd.sh), unless that is what this machine is.
//
// In continuous integration (CI=true) a few files that failed are run once more, by themselves, on a machine that has become quiet:
// what fails again is broken. What then passes is said at the end, by name, with what it failed by standing above: a race in a test, or
// in what it tests, that somebody has to look at. By hand nothing is repeated.

import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";

const repository = join(import.meta.dirname, "..");
const vitest = join(repository, "node_modules/.bin/vitest");
const report = join(repository, "build/test-failures.json");
/** More files than this don't fail by chance. */
const MOST_REPEATED = 6;

const withSystemd = [
  "systemd",
  "oci-callers",
  "oci-checkpoint",
  "oci-docker",
  "oci-early-engine",
  "oci-faults",
  "oci-flags",
  "oci-hooks",
  "oci-kill",
  "oci-podman",
  "oci-restore-from",
].map((name) => `test/live/${name}.test.ts`);
const systemdRuns = existsSync("/run/systemd/system") && existsSync("/sys/fs/cgroup/cgroup.controllers");

/** with-systemd.sh's status where such a host can't be made. */
const LACKING = 69;

/** @returns vitest's status, and what failed; nothing is known of that where vitest itself did */
function run(before, args) {
  mkdirSync(join(repository, "build"), { recursive: true });
  rmSync(report, { force: true });
  const reporters = [
    "--reporter=default",
    `--reporter=${join(import.meta.dirname, "failures-reporter.mjs")}`,
  ];
  const [program, ...argv] = [...before, vitest, "run", ...reporters, ...args];
  const { status, error } = spawnSync(program, argv, {
    cwd: repository,
    stdio: "inherit",
    env: { ...process.env, CEDANA_TEST_REPORT: report },
  });
  if (error) throw error;
  if (status === null) return { status: 1, failed: [], errors: 1 }; // by a signal
  if (status === LACKING && !existsSync(report)) return { status, failed: [], errors: 0 };
  return { status, ...JSON.parse(readFileSync(report, "utf8")) };
}

/** @returns the status */
function runAndRepeat(before, args) {
  const { status, failed, errors } = run(before, args);
  const mayBeChance = errors === 0 && failed.length > 0 && failed.length <= MOST_REPEATED;
  if (status === 0 || process.env.CI !== "true" || !mayBeChance) return status;
  const files = failed.map(({ file }) => file);
  console.log(`test: once more, by themselves: ${files.join(", ")}`);
  const again = run(before, files);
  const failedAgain = new Set(again.failed.map(({ file }) => file));
  for (const { file, tests } of failed)
    if (!failedAgain.has(file))
      console.log(`test: FAILED ONCE, then passed: ${[file, ...tests].join("\n        ")}`);
  return again.status;
}

const args = process.argv.slice(2);
const statuses = [runAndRepeat([], args)];
if (args.length === 0 && !systemdRuns) {
  console.log("test: where systemd makes the cgroups");
  const status = runAndRepeat(["sh", join(import.meta.dirname, "with-systemd.sh")], withSystemd);
  if (status === LACKING) console.log("test: skipped, for the reason above");
  else statuses.push(status);
}
process.exit(statuses.find((status) => status !== 0) ?? 0);
