import { Args, Flags } from "@oclif/core";
import { NotFound } from "../errors/index.ts";
import type { QueriedContainer, QueriedProcess } from "../proto/generated/cedana_api.ts";
import { CedanaCommand } from "./command.ts";
import { containerArg, jsonFlag, namespaceFlag } from "./flags.ts";

// `cedana freeze|unfreeze|kill|query containerd`: containers under our shim.

export class FreezeContainerd extends CedanaCommand {
  static override summary = "Freeze a container: it stands still until `cedana unfreeze`";
  static override description = "The same as `ctr task pause`: containerd shows it as paused.";
  static override examples = ["cedana freeze containerd web", "cedana freeze containerd -n k8s.io web"];
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
  static override summary = "Let a frozen container run again";
  static override examples = ["cedana unfreeze containerd web"];
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

export class KillContainerd extends CedanaCommand {
  static override summary = "Send a signal to a container, as it wants it";
  static override description =
    "The same as `ctr task kill`: its annotations cedana.io/kill-… say what TERM becomes and what follows, and cedana.io/checkpoint-on that it is checkpointed instead.";
  static override examples = ["cedana kill containerd web", "cedana kill containerd web HUP --exec worker"];
  static override args = {
    ...containerArg,
    signal: Args.string({ ignoreStdin: true, description: "by name or number", default: "TERM" }),
  };
  static override flags = {
    ...namespaceFlag,
    exec: Flags.string({
      helpValue: "ID",
      description: "a process of exec instead of the container's first one",
    }),
    all: Flags.boolean({ char: "a", description: "every process of the container", exclusive: ["exec"] }),
    ...jsonFlag,
  };

  async run(): Promise<void> {
    const { args, flags } = await this.parse(KillContainerd);
    const { Api } = await import("./api.ts");
    using api = await Api.open();
    const { namespace, exec: execId, all } = flags;
    const answer = await api.call("KillContainer", {
      id: args.container,
      namespace,
      execId,
      signal: args.signal,
      all,
    });
    if (flags.json) this.printJson(answer);
    else this.log(`${args.container} has been sent ${args.signal}`);
  }
}

export class QueryContainerd extends CedanaCommand {
  static override summary = "Show containers under cedana's shim: state, processes, checkpoints";
  static override description = "Without an id all of them.";
  static override examples = ["cedana query containerd --tree", "cedana query containerd web db --json"];
  static override strict = false; // any number of ids
  static override args = {
    container: Args.string({ description: "ids of containers", ignoreStdin: true }),
  };
  static override flags = {
    namespace: Flags.string({
      char: "n",
      helpValue: "NAMESPACE",
      description: "only containers of this containerd namespace",
    }),
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
      throw new NotFound(
        `cedanad has no container ${answer.missing.join(", ")}: \`cedana query containerd\` shows those it has`,
      );
  }

  private print(container: QueriedContainer, tree: boolean): void {
    const { namespace, id, state, pid, engine, checkpoints, processes } = container;
    this.log(
      `${namespace}/${id}  ${state}  pid ${pid}  ${engine}  ${processes.length} processes  ${checkpointsText(checkpoints)}`,
    );
    if (tree) for (const line of processLines(processes)) this.log(`  ${line}`);
  }
}

function checkpointsText(checkpoints: QueriedContainer["checkpoints"]): string {
  const newest = checkpoints.at(-1);
  if (!newest) return "no checkpoint";
  if (newest.path === "") return `✖ ${newest.fault}`;
  const last = newest.fault === "" ? `the last of ${newest.createdAt}` : `of the last: ✖ ${newest.fault}`;
  return `${checkpoints.length} checkpoints, ${last}`;
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
