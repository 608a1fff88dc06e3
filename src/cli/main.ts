import { flush, run } from "@oclif/core";
import { exitCodeOf, messageForPeople } from "./failure.ts";

try {
  await run(process.argv.slice(2), import.meta.url);
  await flush();
} catch (error) {
  const message = messageForPeople(error);
  if (message !== "") process.stderr.write(`cedana: ${message}\n`);
  process.exit(exitCodeOf(error));
}
