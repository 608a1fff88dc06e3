import { closeSync, constants } from "node:fs";
import { NotFound, SyscallFailed } from "../errors/index.ts";
import { flockApart, openApart } from "../linux/apart.ts";

/*
 * Who uses a checkpoint: a container that is yet to be restored from it, a page daemon that still reads it. Both hold a shared lock on its
 * directory (flock(2)), which ends with the process, and whoever removes checkpoints asks for the whole lock first.
 */

/** A lock on a checkpoint's directory, until it is disposed of. */
export class CheckpointUse implements Disposable {
  #fd: number | undefined;

  private constructor(fd: number) {
    this.#fd = fd;
  }

  /**
   * Says that the checkpoint is in use; others may say so, too.
   * @throws NotFound when it isn't there, or is being removed
   */
  static async use(directory: string): Promise<CheckpointUse> {
    const use = await CheckpointUse.#take(directory, "shared");
    if (!use) throw new NotFound(`checkpoint ${directory} is being removed`);
    return use;
  }

  /** Takes the checkpoint away from everybody. @returns undefined when it is in use. @throws NotFound */
  static async remove(directory: string): Promise<CheckpointUse | undefined> {
    return await CheckpointUse.#take(directory, "exclusive");
  }

  static async #take(
    directory: string,
    operation: "shared" | "exclusive",
  ): Promise<CheckpointUse | undefined> {
    let fd: number;
    try {
      fd = await openApart(directory, constants.O_RDONLY);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "ENOENT")
        throw new NotFound(`checkpoint ${directory} does not exist`, { cause: error });
      throw SyscallFailed.from(error);
    }
    let taken = false;
    try {
      taken = await flockApart(fd, directory, operation);
      return taken ? new CheckpointUse(fd) : undefined;
    } finally {
      if (!taken) closeSync(fd);
    }
  }

  [Symbol.dispose](): void {
    if (this.#fd !== undefined) closeSync(this.#fd);
    this.#fd = undefined;
  }
}
