/** How long the steps with a GPU may take, milliseconds. `CEDANA_GPU_DEADLINES=lock=5000,checkpoint=60000` in cedanad's environment changes them. */
export interface Deadlines {
  /** one budget for all processes of a container: their GPU work is finished and no new work is let in */
  readonly lock: number;
  /** of one process: GPU memory to host memory, and back */
  readonly checkpoint: number;
  readonly restore: number;
  readonly unlock: number;
  /** what only asks */
  readonly ask: number;
}

/** Memory moves with some GB/s in bad cases; 80 GB take a minute then. */
const defaults: Deadlines = {
  lock: 10_000,
  checkpoint: 300_000,
  restore: 300_000,
  unlock: 10_000,
  ask: 10_000,
};

export function deadlines(text = process.env.CEDANA_GPU_DEADLINES ?? ""): Deadlines {
  const given: Partial<Record<keyof Deadlines, number>> = {};
  for (const part of text.split(",").filter(Boolean)) {
    const [name, value] = part.split("=");
    const ms = Number(value);
    if (name !== undefined && name in defaults && Number.isInteger(ms) && ms > 0)
      given[name as keyof Deadlines] = ms;
  }
  return { ...defaults, ...given };
}
