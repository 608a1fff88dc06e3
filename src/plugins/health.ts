/** One thing that has to be right on this node; `cedana check` asks all of them. */
export interface HealthCheck {
  /** of the row */
  readonly name: string;
  /** takes seconds, or touches what others use: only with `--full` */
  readonly full?: boolean;
  /** An error is a failed row. */
  run(signal: AbortSignal): Promise<HealthRow | readonly HealthRow[]>;
}

export interface HealthRow {
  /** `absent`: what isn't there and needn't be */
  readonly status: "ok" | "warning" | "failed" | "absent";
  /** what was found */
  readonly summary: string;
  /** what to do about it */
  readonly advice?: string;
  /** instead of the check's name */
  readonly name?: string;
}
