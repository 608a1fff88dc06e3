import type { Finding } from "./finding.ts";
import type { OpenCheckpoint } from "./open.ts";

/** What a container is to be, as its configuration says, as far as a checkpoint has to fit it. */
export interface RestoredContainer {
  readonly terminal: boolean;
}

/** What differs between the container that was dumped and the one that is to become it. */
export async function compareToContainer(
  { manifest }: OpenCheckpoint,
  container: RestoredContainer,
): Promise<Finding[]> {
  const findings: Finding[] = [];
  const error = (message: string) => findings.push({ kind: "container", severity: "error", message });
  if (manifest && manifest.terminal !== container.terminal)
    error(
      manifest.terminal
        ? "it is of a container with a terminal: create the new one with a terminal"
        : "it is of a container without a terminal: create the new one without",
    );
  return findings;
}

/** What this node lacks that the checkpoint needs. */
export async function compareToNode(_checkpoint: OpenCheckpoint): Promise<Finding[]> {
  return [];
}
