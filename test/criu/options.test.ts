import { describe, expect, it } from "vitest";
import { encodeOptions } from "../../src/criu/options.ts";
import { Request, RequestType, Response } from "../../src/proto/generated/criu_rpc.ts";
import { allOptions } from "./all-options.ts";
import { askCrit, critPath } from "./harness.ts";

const directories = { images: 10, work: 11 };
const child = (fd: number) => fd + 100;

describe("options", () => {
  it("that are not given are not sent: CRIU has its own defaults", () => {
    const sent = encodeOptions({}, { images: 3, work: undefined }, child);
    expect(Object.entries(sent).filter(([, value]) => value !== undefined)).toEqual([["imagesDirFd", 3]]);
    // "false" is sent: it overrides a configuration file.
    expect(encodeOptions({ shellJob: false }, directories, child).shellJob).toBe(false);
  });

  it("name descriptors as CRIU has them", () => {
    const sent = encodeOptions(
      { inheritFds: [{ key: "a", fd: 5 }], pageServer: { fd: 6 } },
      directories,
      child,
    );
    expect(sent.inheritFd).toEqual([{ key: "a", fd: 105 }]);
    expect(sent.ps).toMatchObject({ fd: 106 });
  });

  it.skipIf(!critPath())("are what CRIU's own definitions say (needs crit: scripts/setup.sh)", () => {
    const opts = encodeOptions(allOptions, directories, child);
    const request = Request.encode({ type: RequestType.DUMP, opts, keepOpen: true, notifySuccess: true });
    const response = Response.encode({
      type: RequestType.RESTORE,
      success: false,
      dump: { restored: true },
      restore: { pid: 5 },
      notify: { script: "post-restore", pid: 6 },
      ps: { address: "::1", port: 7, pid: 8, fd: 9 },
      crErrno: 3,
      features: { memTrack: true, lazyPages: false, pidfdStore: true },
      crErrmsg: "why",
      version: { majorNumber: 4, minorNumber: 2, gitid: "g", sublevel: 1, extra: 2, name: "n" },
      status: 256,
    });
    const [asked, answered] = askCrit([
      { rpc: "criu_req", bytes: Buffer.from(request).toString("base64") },
      { rpc: "criu_resp", bytes: Buffer.from(response).toString("base64") },
    ]);
    expect(asked!.unknown).toBe(0);
    expect(asked!.json).toEqual({
      type: "DUMP",
      keep_open: true,
      notify_success: true,
      opts: {
        images_dir_fd: 10,
        work_dir_fd: 11,
        pid: 1,
        log_file: "x.log",
        log_level: 4,
        config_file: "/etc/x",
        external: ["a"],
        auto_ext_mnt: true,
        ext_sharing: true,
        ext_masters: true,
        skip_mnt: ["a"],
        enable_fs: ["a"],
        mntns_compat_mode: true,
        tcp_established: true,
        tcp_close: true,
        tcp_skip_in_flight: true,
        network_lock: "NFTABLES",
        empty_ns: 0x4000_0000,
        ext_unix_sk: true,
        shell_job: true,
        file_locks: true,
        link_remap: true,
        evasive_devices: true,
        force_irmap: true,
        irmap_scan_paths: ["a"],
        unprivileged: true,
        manage_cgroups_mode: "SOFT",
        cg_root: [{ ctrl: "cpu", path: "/a" }],
        cgroup_props: "a",
        cgroup_props_file: "a",
        cgroup_dump_controller: ["a"],
        cgroup_yard: "a",
        ps: { address: "::1", port: 1, fd: 104 },
        tls: true,
        tls_cacert: "a",
        tls_cacrl: "b",
        tls_cert: "c",
        tls_key: "d",
        tls_no_cn_verify: true,
        lazy_pages: true,
        auto_dedup: true,
        cpu_cap: 9,
        lsm_profile: "a",
        lsm_mount_context: "a",
        display_stats: true,
        leave_running: false,
        leave_stopped: true,
        parent_img: "../a",
        track_mem: true,
        pre_dump_mode: "VM_READ",
        ghost_limit: 5,
        freeze_cgroup: "/a",
        timeout: 5,
        pidfd_store_sk: 5,
        root: "/a",
        rst_sibling: true,
        inherit_fd: [{ key: "a", fd: 105 }],
        join_ns: [{ ns: "net", ns_file: "/a", extra_opt: "b" }],
        orphan_pts_master: true,
        weak_sysctls: true,
        skip_file_rwx_check: true,
      },
    });
    expect(answered).toMatchObject({ unknown: 0 });
    expect(answered!.json).toEqual({
      type: "RESTORE",
      success: false,
      dump: { restored: true },
      restore: { pid: 5 },
      notify: { script: "post-restore", pid: 6 },
      ps: { address: "::1", port: 7, pid: 8, fd: 9 },
      cr_errno: 3,
      features: { mem_track: true, lazy_pages: false, pidfd_store: true },
      cr_errmsg: "why",
      version: { major_number: 4, minor_number: 2, gitid: "g", sublevel: 1, extra: 2, name: "n" },
      status: 256,
    });
  });
});
