// Entry of a worker thread: verifies a directory of images, and ends. Its other side is verify-in-worker.ts.

import { parentPort, workerData } from "node:worker_threads";
import { messageOf, NotFound } from "../../errors/index.ts";
import { verifyImages } from "./verify.ts";

verifyImages(workerData.directory, { memoryOnly: workerData.memoryOnly }).then(
  (report) => parentPort!.postMessage({ report }),
  (error) => parentPort!.postMessage({ isMissing: error instanceof NotFound, message: messageOf(error) }),
);
