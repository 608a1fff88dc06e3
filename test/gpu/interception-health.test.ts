import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { interceptionHealth } from "../../src/gpu/interception-health.ts";
import { withEnvironment } from "./harness.ts";

const built = resolve(import.meta.dirname, "../../build/gpu");
let place: string;
beforeEach(() => {
  place = mkdtempSync(join(tmpdir(), "cedana-gpu-health-"));
});
afterEach(() => rmSync(place, { recursive: true }));

function driver(functions: string): string {
  const path = join(place, "libcuda.so.1");
  execFileSync("cc", ["-shared", "-fPIC", "-x", "c", "-", "-o", path], { input: functions });
  return path;
}

it("says whether the library knows all that the driver has", async () => {
  using _files = withEnvironment({
    CEDANA_GPU_FILES: built,
    CEDANA_GPU_DRIVER: driver("int cuInit(void){return 0;}"),
  });
  expect(await interceptionHealth()).toMatchObject({
    status: "ok",
    summary: `knows every entry point of ${place}/libcuda.so.1`,
  });
  driver("int cuInit(void){return 0;} int cuNextYear(void){return 0;}");
  expect(await interceptionHealth()).toMatchObject({
    status: "warning",
    summary: expect.stringContaining("entry points that it doesn't know: cuNextYear"),
    advice: expect.stringContaining("cuGetProcAddress"),
  });
  execFileSync("sh", ["-c", `echo nothing > ${place}/libcuda.so.1`]);
  expect(await interceptionHealth()).toMatchObject({
    status: "warning",
    summary: expect.stringContaining("can't be compared"),
  });
});

it("says when the library isn't there", async () => {
  using _files = withEnvironment({ CEDANA_GPU_FILES: join(place, "nowhere") });
  expect(await interceptionHealth()).toMatchObject({ status: "failed" });
});
