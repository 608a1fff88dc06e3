// Runs beside a test process and waits for the end of its stdin, which is the end of the test process, however that
// came. Then it ends what the instance named on the command line has left.
//
//   node reaper.ts DIR NAMESPACE

import { cleanUp } from "./cleanup.ts";

const [dir, namespace] = process.argv.slice(2);
if (!dir || !namespace) throw new Error("usage: reaper.ts DIR NAMESPACE");
process.stdin.resume();
process.stdin.on("close", async () => {
  await cleanUp({ dir, namespace });
  process.exit(0);
});
