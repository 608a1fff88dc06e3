import { Args, Flags } from "@oclif/core";
import { NotFound } from "../errors/index.ts";
import type { QueriedContainer, QueriedProcess } from "../proto/generated/cedana_api.ts";
import { CedanaCommand } from "./command.ts";

// `cedana freeze|unfreeze|query containerd`: containers under our shim.

const containerArg = { container: Args.string({ description: "id of the container", required: true }) };
const namespaceFlag = {
  namespace: Flags.string({ char: "n", description: "containerd namespace, when the id is in several" }),
};
const jsonFlag = { json: Flags.boolean({ description: "print JSON" }) };

export class FreezeContainerd extends CedanaCommand {
  static override description = "Freeze a container: it stands still, and containerd shows it as paused";
  static override args = containerArg;
  static override flags = { ...namespaceFlag, ...jsonFlag };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(FreezeContainerd);
    const { Api } = await import("./api.ts");
    using api = await Api.open();
    const answer = await api.call("FreezeContainer", { id: args.container, namespace: flags.namespace });
    if (flags.json) this.printJson(answer);
    else this.log(`${args.container} is ${answer.state}`);
  }
}

export class UnfreezeContainerd extends CedanaCommand {
  static override description = "Let a frozen container run again";
  static override args = containerArg;
  static override flags = { ...namespaceFlag, ...jsonFlag };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(UnfreezeContainerd);
    const { Api } = await import("./api.ts");
    using api = await Api.open();
    const answer = await api.call("UnfreezeContainer", { id: args.container, namespace: flags.namespace });
    if (flags.json) this.printJson(answer);
    else this.log(`${args.container} is ${answer.state}`);
  }
}

export class QueryContainerd extends CedanaCommand {
  static override description =
    "Show containers under cedana's shim: state, processes, checkpoints. Without an id all of them";
  static override examples = ["cedana query containerd --tree", "cedana query containerd web db --json"];
  static override strict = false; // any number of ids
  static override args = { container: Args.string({ description: "ids", ignoreStdin: true }) };
  static override flags = {
    namespace: Flags.string({ char: "n", description: "only of this containerd namespace" }),
    tree: Flags.boolean({ char: "t", description: "also their processes" }),
    ...jsonFlag,
  };

  async run(): Promise<void> {
    const { argv, flags } = await this.parse(QueryContainerd);
    const { Api } = await import("./api.ts");
    using api = await Api.open();
    const ids = argv.map(String);
    const answer = await api.call("QueryContainers", { ids, namespace: flags.namespace });
    if (flags.json) this.printJson(answer);
    else for (const container of answer.containers) this.print(container, flags.tree);
    if (answer.missing.length > 0)
      throw new NotFound(`cedanad has no container ${answer.missing.join(", ")}`);
  }

  private print(container: QueriedContainer, tree: boolean): void {
    const { namespace, id, state, pid, engine, checkpoints, processes } = container;
    const newest = checkpoints.at(-1);
    this.log(
      `${namespace}/${id}  ${state}  pid ${pid}  ${engine}  ${processes.length} processes  ${
        newest ? `${checkpoints.length} checkpoints, the last of ${newest.createdAt}` : "no checkpoint"
      }`,
    );
    if (tree) for (const line of processLines(processes)) this.log(`  ${line}`);
  }
}

/** They come parents first: a child's line is further in than its parent's. */
function processLines(processes: readonly QueriedProcess[]): string[] {
  const depths = new Map<number, number>();
  return processes.map(({ pid, parentPid, pidInContainer, command, state }) => {
    const depth = (depths.get(parentPid) ?? -1) + 1;
    depths.set(pid, depth);
    return `${"  ".repeat(depth)}${pid} (${pidInContainer})  ${state}  ${command}`;
  });
}
