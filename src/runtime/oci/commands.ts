import { messageOf, toExitCode, Unsupported } from "../../errors/index.ts";
import { asGiven, type Conversation, type OciAnswer, type OciCall } from "./call.ts";
import { checkpoint } from "./checkpoint.ts";
import { create, type Escalator, kill, remove } from "./life.ts";
import { restore } from "./restore.ts";

/**
 * What becomes of a command that the wrapper leaves to us.
 * @returns undefined when the wrapper becomes another program; failures are answers, too
 */
export async function runCommand(
  call: OciCall,
  wrapper: Conversation,
  escalator: Escalator,
): Promise<OciAnswer | undefined> {
  try {
    switch (call.command) {
      case "checkpoint":
        return await checkpoint(call, wrapper);
      case "restore":
        return await restore(call, wrapper);
      case "create":
      case "run":
        return await create(call, wrapper);
      case "kill":
        return await kill(call, wrapper, escalator);
      case "delete":
        return await remove(call, wrapper, escalator);
      case "start":
      case "state":
        wrapper.become(asGiven(call));
        return undefined;
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
