import { Cancelled, inStep } from "../errors/index.ts";

/**
 * A step of a chain: checks, prepares, calls `next` for all that follows, and undoes its own work when that fails. What must happen
 * on the way back, in every case, stands in its `finally`. Its name is the function's.
 */
export type Step<C> = (context: C, next: () => Promise<void>) => Promise<void>;

export interface StepTime {
  step: string;
  /** its own time, way there and way back, without that of the steps that it wraps */
  ms: number;
}

/** What every chain's context has. */
export interface ChainContext {
  /** aborting makes the chain turn back at the next step; a step that waits listens to it, too */
  readonly signal: AbortSignal;
  /** each step's own time, in the order of the list; filled in as the chain goes, final when a step has returned */
  readonly times: StepTime[];
  /** told of each step before it begins and after what follows it has succeeded; for faults in tests */
  readonly onBoundary?: ((boundary: string) => void) | undefined;
}

/**
 * Goes through the steps, each wrapping the rest. When one fails, those around it undo their work, and the error says in which step
 * it happened.
 * @param name  what the chain does, for boundaries: "dump"
 */
export async function runChain<C extends ChainContext>(
  name: string,
  steps: readonly Step<C>[],
  context: C,
): Promise<void> {
  const enter = async (index: number): Promise<void> => {
    const step = steps[index];
    if (!step) return;
    if (context.signal.aborted)
      throw inStep(new Cancelled(`${name} was cancelled`, { cause: context.signal.reason }), step.name);
    const time: StepTime = { step: step.name, ms: 0 };
    context.times.push(time);
    context.onBoundary?.(`${name}.${step.name}.before`);
    let since = performance.now();
    let called = false;
    try {
      await step(context, async () => {
        if (called) throw new TypeError(`step ${step.name} of ${name} called the rest of the chain twice`);
        called = true;
        time.ms += performance.now() - since;
        try {
          await enter(index + 1);
          context.onBoundary?.(`${name}.${step.name}.after`);
        } finally {
          since = performance.now();
        }
      });
      if (!called) throw new TypeError(`step ${step.name} of ${name} left out the rest of the chain`);
    } catch (error) {
      throw inStep(error, step.name);
    } finally {
      time.ms += performance.now() - since;
    }
  };
  await enter(0);
}

/** Times as a manifest and a log line carry them: milliseconds by step, to the hundredth. */
export function timesByStep(times: readonly StepTime[]): Record<string, number> {
  return Object.fromEntries(times.map(({ step, ms }) => [step, Math.round(ms * 100) / 100]));
}
