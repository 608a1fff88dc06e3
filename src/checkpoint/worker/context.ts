/** What a job in a worker thread is given besides its input. */
export interface JobContext {
  /** Throws Cancelled when the caller has given up. Long loops ask often; what they hold is released by their `finally`. */
  checkCancelled(): void;
}
