/*
 * Checkpoints of one container come one after another: each looks whether the container runs, freezes it and lets it go again, and keeps
 * notes of that by the container's name. Two at once would each take the other's standstill for its owner's pause, and leave it at that.
 */

const turns = new Map<string, Promise<unknown>>();

/**
 * Does something when what was begun for the same container before has come to its end.
 * @param marker  of the container
 * @param signal  aborted: it isn't begun any more
 */
export async function inTurn<T>(marker: string, signal: AbortSignal, work: () => Promise<T>): Promise<T> {
  const result = (turns.get(marker) ?? Promise.resolve()).then(() => {
    signal.throwIfAborted();
    return work();
  });
  const ended = result.catch(() => {}); // told to the caller; the next in line goes on
  turns.set(marker, ended);
  try {
    return await result;
  } finally {
    if (turns.get(marker) === ended) turns.delete(marker);
  }
}
