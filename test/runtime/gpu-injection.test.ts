import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { InvalidRequest, PermissionDenied, Unavailable } from "../../src/errors/index.ts";
import {
  gpuRequests,
  hasInterception,
  injectedConfig,
  injectGpu,
  withInterception,
} from "../../src/runtime/gpu-injection.ts";
import { type OciSpec, readSpec } from "../../src/runtime/spec.ts";

let place: string;
let bundle: string;
const environment = { ...process.env };
beforeEach(() => {
  place = mkdtempSync(join(tmpdir(), "cedana-gpu-injection-"));
  bundle = join(place, "bundle");
  for (const name of ["bundle", "files", "state"]) mkdirSync(join(place, name));
  writeFileSync(join(place, "files/libcuda.so.1"), "the library");
  process.env.CEDANA_GPU_FILES = join(place, "files");
  process.env.CEDANA_STATE_DIR = join(place, "state");
  process.env.CEDANA_CONFIG = join(place, "config.json");
});
afterEach(() => {
  for (const name of ["CEDANA_GPU_FILES", "CEDANA_STATE_DIR", "CEDANA_CONFIG"]) delete process.env[name];
  Object.assign(process.env, environment);
  rmSync(place, { recursive: true });
});

const owner = { namespace: "default", id: "c1" };
const annotated = (more: Record<string, string> = {}) => ({ "cedana.io/gpu": "intercept", ...more });

/** A configuration with a number that JavaScript can't count, and odd spaces: what isn't ours to change must stay. */
function write(parts: Partial<OciSpec> = {}): string {
  const spec = { ociVersion: "1.1.0", process: { args: ["sh"], env: ["PATH=/bin"] }, ...parts };
  const text = JSON.stringify(spec, undefined, 3).replace(/}$/, ',\n   "limit": 18446744073709551615 }\n');
  writeFileSync(join(bundle, "config.json"), text, { mode: 0o640 });
  return text;
}

const configure = (configuration: object) =>
  writeFileSync(join(place, "config.json"), JSON.stringify(configuration), { mode: 0o600 });
const inject = async () => await injectGpu(bundle, await readSpec(bundle), owner);
const textNow = () => readFileSync(join(bundle, "config.json"), "utf8");

describe("a container that asks for GPUs", () => {
  it.each<[string, Partial<OciSpec>]>([
    ["CDI devices", { annotations: { "cdi.k8s.io/x": "nvidia.com/gpu=0,nvidia.com/gpu=GPU-1" } }],
    ["NVIDIA_VISIBLE_DEVICES=all", { process: { env: ["NVIDIA_VISIBLE_DEVICES=all"] } }],
    ["device nodes /dev/nvidia0", { linux: { devices: [{ path: "/dev/nvidia0", type: "c" }] } }],
    ["mounts at /dev/nvidiactl", { mounts: [{ destination: "/dev/nvidiactl", source: "/dev/nvidiactl" }] }],
    [
      "mounts at /usr/lib/libcuda.so.570.1",
      { mounts: [{ destination: "/usr/lib/libcuda.so.570.1", source: "/x" }] },
    ],
  ])("does so by %s", (words, spec) => {
    expect(gpuRequests(spec).join()).toContain(words);
  });

  it.each<[string, Partial<OciSpec>]>([
    ["nothing", {}],
    ["an empty variable", { process: { env: ["NVIDIA_VISIBLE_DEVICES="] } }],
    ["void", { process: { env: ["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_VISIBLE_DEVICES=void"] } }],
    ["other devices", { linux: { devices: [{ path: "/dev/fuse", type: "c" }] } }],
    ["other CDI devices", { annotations: { "cdi.k8s.io/x": "vendor.com/nic=eth0" } }],
  ])("doesn't by %s", (_words, spec) => {
    expect(gpuRequests(spec)).toEqual([]);
  });
});

describe("injection", () => {
  it("gives the library by its digest, read-only, and preloads it", async () => {
    write({ annotations: annotated() });
    const spec = (await inject())!;
    const [mount] = spec.mounts!;
    expect(mount).toEqual({
      destination: "/dev/cedana-gpu",
      type: "bind",
      source: expect.stringMatching(new RegExp(`^${place}/state/gpu-library/[0-9a-f]{64}$`)),
      options: ["bind", "rprivate", "ro", "nosuid", "nodev"],
    });
    expect(readdirSync(mount!.source!)).toEqual(["libcuda.so.1"]);
    expect(statSync(join(mount!.source!, "libcuda.so.1")).mode & 0o777).toBe(0o555);
    expect(spec.process!.env).toEqual(["PATH=/bin", "LD_PRELOAD=/dev/cedana-gpu/libcuda.so.1"]);
    expect(textNow()).toContain('"limit":18446744073709551615');
    expect(statSync(join(bundle, "config.json")).mode & 0o777).toBe(0o640);
    expect(readdirSync(bundle)).toEqual(["config.json"]);
  });

  it("of several containers at once, on a node that has no copy of the library yet, gives all the same", async () => {
    write({ annotations: annotated() });
    const bundles = Array.from({ length: 8 }, (_, at) => join(place, `bundle-${at}`));
    for (const one of bundles) cpSync(bundle, one, { recursive: true });
    const specs = await Promise.all(
      bundles.map(async (one) => await injectGpu(one, await readSpec(one), { ...owner, id: one })),
    );
    expect(new Set(specs.map((spec) => spec!.mounts![0]!.source)).size).toBe(1);
    expect(readdirSync(join(place, "state/gpu-library"))).toHaveLength(1);
  });

  it("finds its own work done when it is run again, and keeps an older library for who has it", async () => {
    write({ annotations: annotated() });
    await inject();
    const text = textNow();
    expect(await inject()).toBeUndefined();
    expect(textNow()).toBe(text);
    writeFileSync(join(place, "files/libcuda.so.1"), "a newer one");
    write({ annotations: annotated() });
    await inject();
    expect(readdirSync(join(place, "state/gpu-library"))).toHaveLength(2);
  });

  it("puts the library before what the program preloads", async () => {
    write({
      annotations: annotated(),
      process: { env: ["LD_PRELOAD=/a.so", "LD_PRELOAD=/b.so /c.so:/dev/cedana-gpu/libcuda.so.1"] },
    });
    expect((await inject())!.process!.env).toEqual(["LD_PRELOAD=/dev/cedana-gpu/libcuda.so.1:/b.so:/c.so"]);
  });

  it.each<[string, Partial<OciSpec>]>([
    ["nothing of us", {}],
    ["GPUs alone", { process: { env: ["NVIDIA_VISIBLE_DEVICES=all"] } }],
    ["the driver alone", { annotations: { "cedana.io/gpu": "driver" } }],
    ["other things of us", { annotations: { "cedana.io/tcp": "close" } }],
    ["tracing without the library", { annotations: { "cedana.io/gpu-tracing": "true" } }],
    [
      "it by its pod, and is no container with a GPU",
      { annotations: annotated({ "io.kubernetes.cri.container-name": "sidecar" }) },
    ],
    [
      "it by its pod, and is the sandbox",
      { annotations: annotated({ "io.kubernetes.cri.container-type": "sandbox" }) },
    ],
  ])("leaves a container byte for byte that asks for %s", async (_what, spec) => {
    const text = write(spec);
    const { ino, mtimeNs } = statSync(join(bundle, "config.json"), { bigint: true });
    expect(await inject()).toBeUndefined();
    expect(textNow()).toBe(text);
    expect(statSync(join(bundle, "config.json"), { bigint: true })).toMatchObject({ ino, mtimeNs });
    expect(existsSync(join(place, "state/gpu-library"))).toBe(false);
  });

  it("counts in a pod for containers with GPUs, and for those that it names", async () => {
    const name = { "io.kubernetes.cri.container-name": "train" };
    write({
      annotations: annotated(name),
      process: { env: ["NVIDIA_VISIBLE_DEVICES=all"] },
    });
    expect(hasInterception((await inject())!)).toBe(true);
    write({ annotations: { "cedana.io/gpu.train": "intercept", ...name } });
    expect(hasInterception((await inject())!)).toBe(true);
    write({ annotations: annotated({ "cedana.io/gpu.train": "driver", ...name }) });
    expect(await inject()).toBeUndefined();
  });

  it("makes a directory for traces where the administrator allows it, and nowhere else", async () => {
    write({ annotations: annotated({ "cedana.io/gpu-tracing": "true" }) });
    await expect(inject()).rejects.toThrow(PermissionDenied);
    configure({ gpu: { tracing: true, traceMaxBytes: "2Mi" } });
    const spec = (await inject())!;
    const directory = join(place, "state/gpu-traces/default.c1");
    expect(spec.mounts![1]).toEqual({
      destination: "/dev/cedana-gpu-trace",
      type: "bind",
      source: directory,
      options: ["bind", "rprivate", "rw", "nosuid", "nodev", "noexec"],
    });
    expect(spec.process!.env).toEqual([
      "PATH=/bin",
      "LD_PRELOAD=/dev/cedana-gpu/libcuda.so.1",
      "CEDANA_GPU_TRACE=/dev/cedana-gpu-trace",
      "CEDANA_GPU_TRACE_BYTES=2097152",
    ]);
    expect(statSync(directory).mode & 0o7777).toBe(0o1777);
    expect(statSync(join(place, "state/gpu-traces")).mode & 0o777).toBe(0o700);
  });

  it("refuses what is forbidden, means nothing, or can't be had", async () => {
    const text = write({ annotations: annotated() });
    configure({ annotations: { deny: ["gpu"] } });
    await expect(inject()).rejects.toThrow(PermissionDenied);
    configure({});
    write({ annotations: { "cedana.io/gpu": "always" } });
    await expect(inject()).rejects.toThrow(InvalidRequest);
    writeFileSync(join(bundle, "config.json"), text);
    delete process.env.CEDANA_GPU_FILES;
    process.env.CEDANA_GPU_FILES = join(place, "missing");
    await expect(inject()).rejects.toThrow();
    expect(textNow()).toBe(text);
  });

  it("of a caller's bundle is taken back, also after a crash", async () => {
    const text = write({ annotations: annotated() });
    {
      await using _config = await injectedConfig(bundle, await readSpec(bundle), owner);
      expect(hasInterception(await readSpec(bundle))).toBe(true);
    }
    expect(textNow()).toBe(text);
    expect(readdirSync(bundle)).toEqual(["config.json"]);
    await injectedConfig(bundle, await readSpec(bundle), owner); // a cedanad that ends here
    {
      await using _config = await injectedConfig(bundle, await readSpec(bundle), owner);
      expect((await readSpec(bundle)).mounts).toHaveLength(1);
    }
    expect(textNow()).toBe(text);
    chmodSync(join(bundle, "config.json"), 0o600);
  });
});

describe("a process that is started later", () => {
  const spec: OciSpec = {
    mounts: [{ destination: "/dev/cedana-gpu" }],
    process: { env: ["CEDANA_GPU_TRACE=/dev/cedana-gpu-trace", "CEDANA_GPU_TRACE_BYTES=7", "OTHER=1"] },
  };

  it("gets the library and the traces, where its container has them", () => {
    expect(JSON.parse(withInterception('{"args":["x"],"env":["A=1"]}', spec))).toEqual({
      args: ["x"],
      env: [
        "A=1",
        "LD_PRELOAD=/dev/cedana-gpu/libcuda.so.1",
        "CEDANA_GPU_TRACE=/dev/cedana-gpu-trace",
        "CEDANA_GPU_TRACE_BYTES=7",
      ],
    });
    expect(withInterception('{ "args":["x"] }', {})).toBe('{ "args":["x"] }');
  });

  it.each(["{", "null", "5", '{"env":{}}', '{"env":[1]}'])("that is %s is the engine's to refuse", (text) => {
    expect(withInterception(text, spec)).toBe(text);
  });
});

it("says what to do where the library isn't built", async () => {
  const { findGpuFile } = await import("../../src/runtime/gpu-injection.ts");
  delete process.env.CEDANA_GPU_FILES;
  try {
    expect(findGpuFile("libcuda.so.1")).toMatch(/gpu\/libcuda\.so\.1$/);
  } catch (error) {
    expect(error).toBeInstanceOf(Unavailable); // not built
  }
});
