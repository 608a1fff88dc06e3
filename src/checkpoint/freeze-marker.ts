import { join } from "node:path";

/** On disk while a dump holds its container frozen: whoever comes after a crash thaws it. @param directory  the owner's, the bundle */
export function freezeMarker(directory: string): string {
  return join(directory, "cedana-frozen");
}
