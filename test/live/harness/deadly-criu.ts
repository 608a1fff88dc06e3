// A criu in PATH that kills itself, the engine that has started it, or what has started that, at a moment of its work that the test names.

import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

/** Moments at which CRIU runs action scripts, in their order. Source: criu(8), "--action-script". */
export const dumpMoments = ["pre-dump", "network-lock", "post-dump"] as const;
export const restoreMoments = [
  "pre-restore",
  "setup-namespaces",
  "post-setup-namespaces",
  "post-restore",
  "pre-resume",
  "post-resume",
] as const;
export type Moment = (typeof dumpMoments)[number] | (typeof restoreMoments)[number];
/** … or any process, by its pid. */
export type Victim = "criu" | "engine" | "wrapper" | number;

export class DeadlyCriu {
  /** to go before the others in PATH */
  readonly directory = mkdtempSync(join(tmpdir(), "deadly-"));
  readonly #plan = join(this.directory, "plan");
  readonly #done = join(this.directory, "done");

  constructor() {
    const { directory } = this;
    const real = ["/usr/sbin/criu", "/usr/local/sbin/criu", "/usr/bin/criu"].find((path) => existsSync(path));
    if (!real) throw new Error("no criu on this machine: run `npm run setup`");
    // What the engine's caller has for CRIU stays, and the script comes to it.
    const criu = [
      "#!/bin/sh",
      // A helper of its own, which has its descriptors, outlives it, as one does that CRIU starts to ask the kernel something.
      `if [ "$(cat ${this.#plan} 2>/dev/null)" = "start criu" ]; then`,
      `  work=$(tr '\\0' '\\n' </proc/$PPID/cmdline | sed -n '/^--work-path$/{n;p}')`,
      `  mkfifo ${directory}/never`,
      `  (cd "$work" && read -r _ <${directory}/never) &`,
      `  rm ${this.#plan}`,
      `  echo criu >${this.#done}`,
      "  kill -9 $$",
      "fi",
      `if [ -e ${this.#plan} ]; then`,
      `  conf=$(mktemp ${directory}/conf-XXXXXX)`,
      `  [ -z "$CRIU_CONFIG_FILE" ] || cat "$CRIU_CONFIG_FILE" >"$conf"`,
      `  echo "action-script ${directory}/act" >>"$conf"`,
      `  export CRIU_CONFIG_FILE="$conf"`,
      "fi",
      `exec ${real} "$@"`,
    ];
    // A script is CRIU's child, and CRIU the engine's.
    const act = [
      "#!/bin/sh",
      `read -r moment victim <${this.#plan} || exit 0`,
      `[ "$CRTOOLS_SCRIPT_ACTION" = "$moment" ] || exit 0`,
      `rm ${this.#plan}`,
      "above() { sed -n 's/^PPid:[^0-9]*//p' /proc/$1/status; }",
      "case $victim in",
      "criu) pid=$PPID ;;",
      "engine) pid=$(above $PPID) ;;",
      "wrapper) pid=$(above $(above $PPID)) ;;",
      "*) pid=$victim ;;",
      "esac",
      // By its arguments: an engine that runs from a sealed copy is called after that in comm. CRIU's go on behind a colon.
      `basename "$(tr '\\0' '\\n' </proc/$pid/cmdline | sed '1{s/:.*//;q}')" >${this.#done}`,
      "kill -9 $pid",
    ];
    writeFileSync(join(directory, "criu"), `${criu.join("\n")}\n`, { mode: 0o755 });
    writeFileSync(join(directory, "act"), `${act.join("\n")}\n`, { mode: 0o755 });
  }

  /** CRIU alone can be killed at its `start`; then a helper of it lives on. */
  killNextAt(moment: Moment | "start", victim: Victim): void {
    rmSync(this.#done, { force: true });
    writeFileSync(this.#plan, `${moment} ${victim}\n`);
  }

  /** What has been killed since; undefined: CRIU didn't come to the moment. */
  killed(): string | undefined {
    rmSync(this.#plan, { force: true });
    return existsSync(this.#done) ? readFileSync(this.#done, "utf8").trim() : undefined;
  }

  [Symbol.dispose](): void {
    rmSync(this.directory, { recursive: true, force: true });
  }
}
