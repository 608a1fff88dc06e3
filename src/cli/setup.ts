import { join } from "node:path";
import { Flags } from "@oclif/core";
import { InvalidRequest } from "../errors/index.ts";
import { CedanaCommand } from "./command.ts";
import { type Target, targets } from "./targets.ts";

/** `cedana setup`: see registration.ts. */
export class Setup extends CedanaCommand {
  static override summary = "Make containerd, CRI-O, Podman or Docker know cedana's runtime";
  static override description =
    "Prints what it changes in the target's configuration, and which service to restart: it restarts nothing itself.";
  static override examples = [
    "cedana setup --target podman --dry-run",
    "cedana setup --target containerd",
    "cedana setup --target docker --undo",
  ];
  static override flags = {
    target: Flags.string({ description: "whose configuration", options: [...targets], required: true }),
    "dry-run": Flags.boolean({ description: "print the difference, write nothing" }),
    undo: Flags.boolean({ description: "put back what was there before" }),
    root: Flags.string({
      helpValue: "DIRECTORY",
      description: "directory in front of every path, for an image or a chroot",
      default: "",
    }),
    programs: Flags.string({
      helpValue: "DIRECTORY",
      description: "where the services find cedana-runtime and the shim; default: bin/ of this tree",
    }),
  };

  async run(): Promise<void> {
    const { flags } = await this.parse(Setup);
    const { apply, planRegistration, planUndo, restartAdvice, unifiedDiff } = await import(
      "./registration.ts"
    );
    const target = flags.target as Target;
    const repository = join(import.meta.dirname, "..");
    const place = {
      root: flags.root,
      programs: flags.programs ?? join(repository, "bin"),
      packaging: join(repository, "packaging"),
      stateDirectory: process.env.CEDANA_STATE_DIR || "/var/lib/cedana",
    };
    if (!place.programs.startsWith("/"))
      throw new InvalidRequest(`--programs ${place.programs} is not an absolute path`);
    const change = flags.undo ? planUndo(target, place) : planRegistration(target, place);
    const difference = unifiedDiff(change);
    if (difference === "") {
      this.log(`${change.path}: nothing to do`);
      return;
    }
    this.log(difference.trimEnd());
    if (flags["dry-run"]) return;
    apply(target, place, change, flags.undo);
    this.log(
      `${change.path}: ${change.after === undefined ? "removed" : "written"}. ${restartAdvice[target]}`,
    );
  }
}
