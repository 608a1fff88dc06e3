import { TimedOut } from "../errors/index.ts";
import type { Feature } from "../features/registry.ts";
import type { Step } from "./chain.ts";

/** An adapter of a plugin, in any chain: V is what it knows of it. */
interface Adapter<V> {
  readonly name: string;
  when?(view: V): boolean;
  run(view: V, next: () => Promise<void>): Promise<void>;
}

/**
 * Adapters of all plugins as steps of a chain, named `plugin:adapter`. An adapter gets its time and no more: one that hangs must not
 * leave a container standing still.
 * @param takesPart   told of each plugin whose adapter is run
 * @param patienceMs  for what it does before `next`, and again for what it does after it
 */
export function adapterSteps<C, V>(
  feature: Feature<readonly Adapter<V>[]>,
  patienceMs: number,
  viewOf: (context: C) => Promise<V | undefined>,
  takesPart?: (context: C, plugin: string) => void,
): Step<C>[] {
  return feature.all().flatMap(([plugin, adapters]) =>
    adapters.map((adapter) => {
      const what = `${plugin}:${adapter.name}`;
      const step: Step<C> = async (context, next) => {
        const view = await viewOf(context);
        if (view === undefined || adapter.when?.(view) === false) return await next();
        takesPart?.(context, plugin);
        await bounded(what, patienceMs, (rest) => adapter.run(view, rest), next);
      };
      return Object.defineProperty(step, "name", { value: what });
    }),
  );
}

/** Runs `work`, whose time stands still while it waits for `next`. What it does past its time is nobody's any more. */
async function bounded(
  what: string,
  patienceMs: number,
  work: (next: () => Promise<void>) => Promise<void>,
  next: () => Promise<void>,
): Promise<void> {
  const late = Promise.withResolvers<never>();
  late.promise.catch(() => {}); // looked at in the race
  let timer: NodeJS.Timeout | undefined;
  let rest: Promise<void> | undefined;
  const start = () => {
    timer = setTimeout(
      () =>
        late.reject(new TimedOut(`plugin adapter ${what} has not come to an end within ${patienceMs} ms`)),
      patienceMs,
    );
  };
  start();
  try {
    const ended = work(async () => {
      clearTimeout(timer);
      rest = next();
      try {
        await rest;
      } finally {
        start();
      }
    });
    await Promise.race([ended, late.promise]);
    // An adapter that doesn't wait for the rest, or keeps its error to itself, changes nothing for the chain.
    await rest;
  } finally {
    clearTimeout(timer);
  }
}
