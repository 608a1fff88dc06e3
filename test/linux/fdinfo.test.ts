import { statSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { parseFdInfo, splitDevice } from "../../src/linux/fdinfo.ts";

describe("fdinfo", () => {
  it("tells flags and mount of a plain file", () => {
    expect(parseFdInfo("pos:\t0\nflags:\t02100002\nmnt_id:\t27\nino:\t2146684\n")).toEqual({
      flags: 0o2100002,
      mountId: 27,
      inode: 2146684,
      locks: [],
      watches: [],
    });
  });

  it("tells locks and leases", () => {
    const text = [
      "pos:\t0",
      "flags:\t0100002",
      "mnt_id:\t27",
      "ino:\t2146684",
      "lock:\t1: FLOCK  ADVISORY  WRITE 13942 fe:00:2146684 0 EOF",
      "lock:\t2: POSIX  ADVISORY  READ  13942 fe:00:2146684 100 199",
      "lock:\t3: OFDLCK ADVISORY  WRITE -1 fe:00:2146684 0 EOF",
      "lock:\t4: LEASE  ACTIVE    WRITE 13988 fe:00:2146686 0 EOF",
      "",
    ].join("\n");
    expect(parseFdInfo(text).locks).toEqual([
      { kind: "FLOCK", mode: "WRITE" },
      { kind: "POSIX", mode: "READ" },
      { kind: "OFDLCK", mode: "WRITE" },
      { kind: "LEASE", mode: "WRITE" },
    ]);
  });

  it("tells what inotify and fanotify watch", () => {
    const inotify =
      "pos:\t0\nflags:\t00\nmnt_id:\t17\nino:\t1038\n" +
      "inotify wd:2 ino:85970 sdev:15 mask:20 ignored_mask:0 fhandle-bytes:c fhandle-type:81 f_handle:705908000000000000000000\n" +
      "inotify wd:1 ino:20c17c sdev:fe00003 mask:2 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7cc120003ff836f4\n" +
      "inotify wd:3 ino:1 sdev:2a mask:2 ignored_mask:0 \n";
    expect(parseFdInfo(inotify).watches).toEqual([
      { inode: 0x85970, device: "0:21", handle: { type: 0x81, bytes: "705908000000000000000000" } },
      { inode: 0x20c17c, device: "254:3", handle: { type: 1, bytes: "7cc120003ff836f4" } },
      { inode: 1, device: "0:42" },
    ]);
    const fanotify =
      "pos:\t0\nflags:\t02\nmnt_id:\t17\nino:\t1038\nfanotify flags:0 event-flags:8000\n" +
      "fanotify mnt_id:4e mflags:0 mask:20 ignored_mask:0\n" +
      "fanotify sdev:11 mflags:0 mask:20 ignored_mask:0\n";
    expect(parseFdInfo(fanotify).watches).toEqual([
      { inode: 0, mountId: 0x4e },
      { inode: 0, device: "0:17" },
    ]);
  });

  it("tells whose a pidfd is, and a pty master's slave", () => {
    expect(parseFdInfo("flags:\t02000002\nmnt_id:\t4\nPid:\t-1\nNSpid:\t-1\n").pidfdPid).toBe(-1);
    expect(parseFdInfo("flags:\t02000202\nmnt_id:\t4\nPid:\t13919\nNSpid:\t13919\t7\n").pidfdPid).toBe(13919);
    expect(parseFdInfo("flags:\t02\nmnt_id:\t20\ntty-index:\t3\n").ttyIndex).toBe(3);
  });

  it("splits device numbers as glibc does, large ones too", () => {
    expect(splitDevice(statSync("/dev/null").rdev)).toEqual({ major: 1, minor: 3 });
    expect(splitDevice(0x8801)).toEqual({ major: 136, minor: 1 });
    expect(splitDevice(0x123abc45)).toEqual({ major: 0xabc, minor: 0x12345 - 0x0 });
  });
});
