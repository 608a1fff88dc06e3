import { Flags } from "@oclif/core";
import { ArchiveCreate, ArchiveExtract, ArchiveShow, ArchiveVerify } from "./archive.ts";
import { Check } from "./check.ts";
import { CheckpointInspect, CheckpointList, CheckpointVerify } from "./checkpoint.ts";
import { CedanaCommand } from "./command.ts";
import { FreezeContainerd, KillContainerd, QueryContainerd, UnfreezeContainerd } from "./container.ts";
import { daemonStatus, runDirectory, stopDaemon } from "./daemon.ts";
import { DumpContainerd } from "./dump.ts";
import { jsonFlag } from "./flags.ts";
import { GpuReport, GpuTrace } from "./gpu.ts";
import { ImageDecode, ImageEncode, ImageVerify } from "./image.ts";
import { Features, PluginList } from "./plugin.ts";
import { Preflight } from "./preflight.ts";
import { RestoreContainerd } from "./restore.ts";
import { Setup } from "./setup.ts";

class Status extends CedanaCommand {
  static override summary = "Show cedanad, its keepers and their tasks";
  static override description =
    "Starts no cedanad: exit code 1 where none runs, which is in order as long as no container needs one.";
  static override examples = ["cedana status", "cedana status --json"];
  static override flags = jsonFlag;

  async run(): Promise<void> {
    const { flags } = await this.parse(Status);
    const status = await daemonStatus();
    if (flags.json) {
      this.log(JSON.stringify(status, undefined, 2));
      return;
    }
    const mib = (status.rssBytes / 2 ** 20).toFixed(0);
    this.log(
      `cedanad ${status.build}, pid ${status.pid}, up ${Math.round(status.uptimeMs / 1000)} s, ${mib} MiB, ${runDirectory()}`,
    );
    for (const pod of status.pods) {
      this.log(`keeper ${pod.keeper}  namespace ${pod.namespace}  protocol ${pod.protocol}`);
      for (const task of pod.tasks) {
        this.log(`  ${task.id}  ${task.state}  pid ${task.pid}  ${task.engine}`);
        if (task.lazy)
          this.log(`    memory ${task.lazy.state}${task.lazy.reason ? `: ${task.lazy.reason}` : ""}`);
        for (const exec of task.execs) this.log(`    exec ${exec.execId}  ${exec.state}  pid ${exec.pid}`);
      }
    }
  }
}

class DaemonStop extends CedanaCommand {
  static override summary = "End cedanad; containers run on";
  static override description =
    "A keeper that has tasks starts another one at once, which reads the configuration anew: this is how to upgrade, too.";
  static override examples = ["cedana daemon stop"];
  static override flags = {
    timeout: Flags.integer({
      helpValue: "SECONDS",
      description: "how long to wait for its end",
      default: 10,
      min: 0,
    }),
  };

  async run(): Promise<void> {
    const { flags } = await this.parse(DaemonStop);
    const pid = await stopDaemon(flags.timeout * 1000);
    this.log(pid === undefined ? "cedanad is not running" : `cedanad (pid ${pid}) has ended`);
  }
}

/** By name, as oclif's explicit strategy wants them. */
export const commands = {
  status: Status,
  "daemon:stop": DaemonStop,
  "image:decode": ImageDecode,
  "image:encode": ImageEncode,
  "image:verify": ImageVerify,
  "archive:create": ArchiveCreate,
  "archive:extract": ArchiveExtract,
  "archive:show": ArchiveShow,
  "archive:verify": ArchiveVerify,
  "gpu:report": GpuReport,
  "gpu:trace": GpuTrace,
  check: Check,
  "checkpoint:list": CheckpointList,
  "checkpoint:inspect": CheckpointInspect,
  "checkpoint:verify": CheckpointVerify,
  "checkpoint:decode": ImageDecode,
  "checkpoint:encode": ImageEncode,
  "freeze:containerd": FreezeContainerd,
  "unfreeze:containerd": UnfreezeContainerd,
  "kill:containerd": KillContainerd,
  "query:containerd": QueryContainerd,
  "plugin:features": Features,
  features: Features,
  "plugin:list": PluginList,
  "dump:containerd": DumpContainerd,
  "restore:containerd": RestoreContainerd,
  preflight: Preflight,
  setup: Setup,
};
