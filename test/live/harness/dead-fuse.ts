// A file system whose server never answers: what is asked of it stays in the kernel until the server's descriptor is closed.

import { execFileSync } from "node:child_process";
import { closeSync, existsSync, openSync } from "node:fs";

export const canFuse = existsSync("/dev/fuse") && process.getuid?.() === 0;

/** @param directory  where it is mounted; an empty directory */
export function deadFuse(directory: string): Disposable {
  const server = openSync("/dev/fuse", "r+");
  const options = "fd=3,rootmode=40000,user_id=0,group_id=0,allow_other";
  // -i: without mount.fuse, which would want a program.
  execFileSync("mount", ["-i", "-t", "fuse", "-o", options, "cedana-test", directory], {
    stdio: ["ignore", "inherit", "inherit", server],
  });
  return {
    [Symbol.dispose]: () => {
      closeSync(server); // who waits gets ENOTCONN
      execFileSync("umount", ["-l", directory]);
    },
  };
}
