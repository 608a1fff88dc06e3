import { messageOf, toExitCode, Unsupported } from "../../errors/index.ts";
import { expectAnswer } from "../../linux/apart.ts";
import type { Conversation, OciAnswer, OciCall } from "./call.ts";
import { checkpoint, checkpointAgain } from "./checkpoint.ts";
import type { Endings } from "./endings.ts";
import type { Escalator } from "./escalator.ts";
import type { Leftovers } from "./frozen.ts";
import { create, kill, remove } from "./life.ts";
import { restore } from "./restore.ts";
import { start, state } from "./restored.ts";

/**
 * What becomes of a command that the wrapper leaves to us.
 * @returns undefined when the wrapper becomes another program; failures are answers, too
 */
export async function runCommand(
  call: OciCall,
  wrapper: Conversation,
  escalator: Escalator,
  endings: Endings,
  leftovers: Leftovers,
): Promise<OciAnswer | undefined> {
  try {
    await expectAnswer(call.root); // what is in it is read at once, here and by many of these
    switch (call.command) {
      case "checkpoint": {
        const left = await leftovers(call.marker); // an engine of before may be at work on it
        return call.repeated ? await checkpointAgain(call, wrapper, left) : await checkpoint(call, wrapper);
      }
      case "restore":
        return await restore(call, wrapper);
      case "create":
      case "run":
        return await create(call, wrapper);
      case "kill":
        return await kill(call, wrapper, escalator, endings);
      case "delete":
        return await remove(call, wrapper, escalator, endings);
      case "start":
        return await start(call, wrapper);
      case "state":
        return await state(call, wrapper);
      default:
        throw new Unsupported(`command ${call.command} of a newer cedana-runtime than this cedanad`);
    }
  } catch (error) {
    wrapper.log.warn(
      { err: error, id: call.id, command: call.command },
      "a command of cedana-runtime failed",
    );
    return { status: toExitCode(error), message: messageOf(error) };
  }
}
