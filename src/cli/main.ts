import { run } from "@oclif/core";
import { exitCodeOf, messageForPeople } from "./failure.ts";

// Writes to files, pipes and terminals are done when they return, so there is nothing to flush; and whoever reads no more (`| head`)
// would never let a flush end.
try {
  await run(process.argv.slice(2), import.meta.url);
} catch (error) {
  const message = messageForPeople(error);
  if (message !== "") process.stderr.write(`cedana: ${message}\n`);
  process.exit(exitCodeOf(error));
}
