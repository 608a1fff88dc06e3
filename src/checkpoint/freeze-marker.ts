import { join } from "node:path";

/** On disk while a dump holds its container frozen: whoever comes after a crash thaws it. @param directory  the owner's, the bundle */
export function freezeMarker(directory: string): string {
  return join(directory, "cedana-frozen");
}

/**
 * On disk from before a container's hook until the end of the dump: whoever comes after a crash pauses a container again that its owner
 * had paused, and that ran for its hook.
 */
export function hookNote(directory: string): string {
  return join(directory, "cedana-hook-ran");
}
