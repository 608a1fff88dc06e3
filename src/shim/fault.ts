/**
 * Fault switch for tests: `CEDANA_FAULT=crash:NAME` in cedanad's environment ends cedanad, as by SIGKILL, whenever a call of the method
 * NAME has been taken up, or a chain comes to the boundary NAME (`dump.freeze.before`, `dump.freeze.after`). It needs the
 * administrator's hand on the daemon's environment, as ending it by signal would. `uncaught:NAME` throws there, where nobody catches it.
 */
const [action, name] = (process.env.CEDANA_FAULT ?? "").split(":");

export function crashIfTold(called: string): void {
  if (name !== called) return;
  if (action === "crash") process.kill(process.pid, "SIGKILL");
  if (action === "uncaught")
    queueMicrotask(() => {
      throw new Error(`the fault that CEDANA_FAULT asks for at ${called}`);
    });
}

/** The same at a chain's boundary. */
export const reachBoundary = action === "crash" && name?.includes(".") ? crashIfTold : undefined;
