import { Args, Flags } from "@oclif/core";
import { NotFound } from "../errors/index.ts";
import { interceptionReport } from "../gpu/interception.ts";
import { readTraces, summaryOf } from "../gpu/trace.ts";
import { CedanaCommand } from "./command.ts";

export class GpuTrace extends CedanaCommand {
  static override summary = "Print a container's GPU traces as one document for Perfetto";
  static override description = "Also for chrome://tracing. What a kill has cut off is mended.";
  static override examples = [
    "cedana gpu trace /var/lib/cedana/gpu-traces/default.train > trace.json",
    "cedana gpu trace --summary /var/lib/cedana/gpu-traces/default.train",
  ];
  static override args = {
    path: Args.string({ description: "a trace, or the directory of a container's traces", required: true }),
  };
  static override flags = {
    summary: Flags.boolean({ description: "print calls, bytes and times by entry point instead" }),
  };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(GpuTrace);
    const trace = await readTraces(args.path);
    this.log(flags.summary ? summaryOf(trace) : JSON.stringify(trace));
  }
}

export class GpuReport extends CedanaCommand {
  static override summary = "Show what a process has on its GPUs, and what of it can't be checkpointed";
  static override description = "Of a container with the annotation cedana.io/gpu: intercept. Prints JSON.";
  static override examples = ["cedana gpu report 4711"];
  static override args = { pid: Args.integer({ description: "pid on the host", required: true }) };

  async run(): Promise<void> {
    const { args } = await this.parse(GpuReport);
    const report = await interceptionReport(args.pid);
    if (!report)
      throw new NotFound(
        `process ${args.pid} has no interception library (cedana.io/gpu: intercept), or has not called the driver yet`,
      );
    this.log(JSON.stringify(report, undefined, 2));
  }
}
