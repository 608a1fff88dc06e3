import { Args, Command, Flags } from "@oclif/core";
import { interceptionReport } from "../gpu/interception.ts";
import { readTraces, summaryOf } from "../gpu/trace.ts";

export class GpuTrace extends Command {
  static override description =
    "Print the traces of the GPU interception as one document for Perfetto or chrome://tracing; what a kill has cut off is mended";
  static override args = {
    path: Args.string({ description: "a trace, or the directory of a container's", required: true }),
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

export class GpuReport extends Command {
  static override description =
    "Show what a process with the interception library has on its GPUs, and what of it can't be checkpointed";
  static override args = { pid: Args.integer({ description: "as seen on the host", required: true }) };

  async run(): Promise<void> {
    const { args } = await this.parse(GpuReport);
    const report = await interceptionReport(args.pid);
    if (!report)
      this.error(
        `process ${args.pid} has no interception library (cedana.io/gpu: intercept), or has not called the driver yet`,
        { exit: 3 },
      );
    this.log(JSON.stringify(report, undefined, 2));
  }
}
