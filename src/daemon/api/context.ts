import type { Logger } from "pino";
import type { ShimServer } from "../../shim/shim-server.ts";

/** What the methods of the API work on. */
export interface ApiContext {
  readonly log: Logger;
  readonly shim: ShimServer;
  readonly runDirectory: string;
  /** how many calls are under way */
  readonly calls: { active: number };
}

/** One call of a client's. */
export interface ApiCall extends ApiContext {
  /** aborted when the client cancels, goes away, or its deadline passes */
  readonly signal: AbortSignal;
}
