/**
 * Fault switch for tests: `CEDANA_FAULT=crash:METHOD` in cedanad's environment ends cedanad, as by SIGKILL, whenever a call of
 * that method has been taken up. It needs the administrator's hand on the daemon's environment, as ending it by signal would.
 */
const [action, method] = (process.env.CEDANA_FAULT ?? "").split(":");

export function crashIfTold(called: string): void {
  if (action === "crash" && method === called) process.kill(process.pid, "SIGKILL");
}
