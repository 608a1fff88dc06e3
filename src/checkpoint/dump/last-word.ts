import { join } from "node:path";
import { explainCriuLog } from "../../criu/log.ts";

/** CRIU's last word, in its log alone where nobody was left to hear it; undefined: it was killed, or not even started. */
export async function lastWord(workPath: string): Promise<"finished" | "failed" | undefined> {
  const log = await explainCriuLog(join(workPath, "dump.log")).catch(() => undefined); // it was not even started
  return log?.outcome;
}
