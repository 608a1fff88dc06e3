import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, it } from "vitest";
import {
  catalogue,
  type Finding,
  type FindingId,
  type Requirement,
} from "../../../src/checkpoint/preflight/catalogue.ts";
import schema from "../../../src/checkpoint/preflight/preflight.schema.json" with { type: "json" };
import type { PreflightReport } from "../../../src/checkpoint/preflight/preflight.ts";
import { toDocument, toText } from "../../../src/checkpoint/preflight/report.ts";
import { findFault, type Schema } from "../../../src/checkpoint/schema.ts";

const facts = {
  rootPid: 4711,
  processes: 2,
  threads: 3,
  leftOut: 0,
  openFiles: 1,
  memoryBytes: 1_500_000,
  freeBytes: 8 << 20,
  listening: ["0.0.0.0:80"],
  established: [{ local: "10.0.0.1:80", remote: "10.0.0.2:5000", state: "ESTABLISHED" }],
  inFlight: [],
  outsideUnixPeers: [{ pid: 4711, fd: 3, type: "dgram" }],
  externalMounts: [{ mountPoint: "/data", type: "ext4" }],
  outsideTerminals: [],
  inventoryMs: 1.2,
  totalMs: 3,
};

function finding(id: FindingId, what: string, more: Partial<Requirement> = {}): Finding {
  const { severity, why, advice } = catalogue[id];
  const process = { pid: 4711, pidInContainer: 12, comm: "nginx" };
  return { id, severity, why, advice, process, what, ...more };
}

const requirement = (id: FindingId, what: string, met: boolean, more: Partial<Requirement> = {}) =>
  finding(id, what, { option: "tcp", met, ...more }) as Requirement;

const report: PreflightReport = {
  ok: false,
  blockers: [finding("io-uring", "fd 5: anon_inode:[io_uring]", { alsoIn: 3 })],
  requirements: [
    ...Array.from({ length: 7 }, (_, i) => requirement("tcp-established", `fd ${i}`, false)),
    requirement("ghost-file", "fd 9: /tmp/x (deleted)", false, { option: "ghost-limit", value: 2 << 20 }),
    requirement("file-locks", "fd 10", true, { option: "file-locks" }),
  ],
  notes: [finding("kernel-tls", "fd 1")],
  facts,
};

it("tells people what, why and what to do, each kind once", () => {
  expect(toText("container web", report).split("\n")).toEqual([
    "container web: can't be checkpointed as it is: 1 blocker, 8 options to be set (2 processes, 1 open file, about 2 MiB to be dumped, 8 MiB free at the destination)",
    "blocker  io-uring  process 4711 (12 in the container), nginx: fd 5: anon_inode:[io_uring], and 3 more",
    `         ${catalogue["io-uring"].why}`,
    `         ${catalogue["io-uring"].advice}`,
    ...Array.from(
      { length: 5 },
      (_, i) => `option   tcp-established  process 4711 (12 in the container), nginx: fd ${i}`,
    ),
    "option   tcp-established  and 2 more",
    `         ${catalogue["tcp-established"].why}`,
    `         ${catalogue["tcp-established"].advice}`,
    "option   ghost-file  process 4711 (12 in the container), nginx: fd 9: /tmp/x (deleted)",
    `         ${catalogue["ghost-file"].why}`,
    `         ${catalogue["ghost-file"].advice} (at least 2097152)`,
    "is set   file-locks  1 time",
    "note     kernel-tls  process 4711 (12 in the container), nginx: fd 1",
    `         ${catalogue["kernel-tls"].why}`,
    `         ${catalogue["kernel-tls"].advice}`,
  ]);
  const clean = { ...report, ok: true, blockers: [], requirements: [], notes: [] };
  expect(toText("process 1", clean)).toBe(
    "process 1: can be checkpointed (2 processes, 1 open file, about 2 MiB to be dumped, 8 MiB free at the destination)",
  );
});

it("writes JSON as its schema says", () => {
  const document = JSON.parse(JSON.stringify(toDocument(report)));
  expect(findFault(document, schema as Schema)).toBeUndefined();
  expect(findFault({ ...document, ok: 1 }, schema as Schema)).toMatch(/^ok is 1/);
  const wrong = { ...document, requirements: [{ ...document.requirements[0], option: "guess" }] };
  expect(findFault(wrong, schema as Schema)).toMatch(/requirements\[0\]\.option/);
  const options = Object.values(catalogue).flatMap((entry) => ("option" in entry ? [entry.option] : []));
  expect([...schema.properties.requirements.items.properties.option.enum].sort()).toEqual(
    [...new Set(options)].sort(),
  );
});

it("has every finding in the documentation's table, with its severity", () => {
  const text = readFileSync(join(import.meta.dirname, "../../../docs/preflight.md"), "utf8");
  const rows = [...text.matchAll(/^\| `([a-z0-9-]+)` \| (blocker|option|note) \|/gm)].map(([, id, kind]) => [
    id,
    kind,
  ]);
  const kinds = { blocker: "blocker", "needs-option": "option", note: "note" };
  expect(Object.fromEntries(rows)).toEqual(
    Object.fromEntries(Object.entries(catalogue).map(([id, { severity }]) => [id, kinds[severity]])),
  );
});
