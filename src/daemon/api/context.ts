import type { Logger } from "pino";
import type { Management } from "../../proto/generated/cedana_api.ts";
import type { Decoded, Encodable } from "../../proto/grpc.ts";
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

type Methods = typeof Management.methods;

/** What implements a method: a promise of the response, or sends any number of them. An error becomes the call's status. */
export type ApiMethods = {
  readonly [Name in keyof Methods]: Methods[Name]["responseStream"] extends true
    ? (
        request: Decoded<Methods[Name]["request"]>,
        call: ApiCall,
        send: (message: Encodable<Methods[Name]["response"]>) => Promise<void>,
      ) => Promise<void>
    : (
        request: Decoded<Methods[Name]["request"]>,
        call: ApiCall,
      ) => Promise<Encodable<Methods[Name]["response"]>>;
};
