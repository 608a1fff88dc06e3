import { closeSync, constants, openSync, writeSync } from "node:fs";
import { join } from "node:path";

/**
 * Writes a line into the bundle's `log` FIFO, from which containerd copies into its own log, in logrus' text form.
 *
 * Opened for each line and without waiting: where nobody reads (ENXIO), or the FIFO is full (EAGAIN), the line is only in
 * cedanad's log. Lines here are rare: what failed.
 */
export function writeTaskLog(bundle: string, level: "info" | "warning" | "error", message: string): void {
  let fd: number;
  try {
    fd = openSync(join(bundle, "log"), constants.O_WRONLY | constants.O_NONBLOCK);
  } catch {
    return; // no reader, or no such FIFO: see above
  }
  try {
    writeSync(
      fd,
      `time=${JSON.stringify(new Date().toISOString())} level=${level} msg=${JSON.stringify(message)}\n`,
    );
  } catch {
    // full: see above
  } finally {
    closeSync(fd);
  }
}
