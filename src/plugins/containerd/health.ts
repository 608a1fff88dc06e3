import { readFile } from "node:fs/promises";
import { connect } from "node:net";
import type { HealthCheck, HealthRow } from "../health.ts";

const SOCKET = "/run/containerd/containerd.sock";
const CONFIGURATION = "/etc/containerd/config.toml";
const ANSWER_TIMEOUT_MS = 3_000;

export const containerdChecks: readonly HealthCheck[] = [
  { name: "containerd", run: checkContainerd },
  { name: "containerd's registration", run: checkRegistration },
];

/** Where the node's containerd listens, as its clients find out. */
function containerdSocket(): string {
  return process.env.CEDANA_CONTAINERD_ADDRESS || SOCKET;
}

async function checkContainerd(): Promise<HealthRow> {
  const path = containerdSocket();
  const failure = await new Promise<NodeJS.ErrnoException | undefined>((resolve) => {
    const socket = connect(path, () => {
      socket.destroy();
      resolve(undefined);
    });
    socket.setTimeout(ANSWER_TIMEOUT_MS, () => {
      socket.destroy();
      resolve(new Error(`it does not answer within ${ANSWER_TIMEOUT_MS} ms`));
    });
    socket.on("error", resolve);
  });
  if (!failure) return { status: "ok", summary: `listens on ${path}` };
  if (failure.code === "ENOENT") return { status: "absent", summary: `nothing at ${path}` };
  return {
    status: "failed",
    summary: `${path}: ${failure.message}`,
    advice: "start containerd; CEDANA_CONTAINERD_ADDRESS in cedanad's environment names another socket",
  };
}

/** Clients such as ctr and nerdctl need none: they name the runtime, and containerd finds the shim in its PATH. */
async function checkRegistration(): Promise<HealthRow> {
  const text = await readFile(CONFIGURATION, "utf8").catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ENOENT") return undefined;
    throw error;
  });
  if (text !== undefined && /io\.containerd\.cedana\.v2|containerd-shim-cedana-v2/.test(text))
    return { status: "ok", summary: `${CONFIGURATION} has a runtime of cedana's for Kubernetes` };
  if (text === undefined) return { status: "absent", summary: `${CONFIGURATION} is not there` };
  return {
    status: "warning",
    summary: `${CONFIGURATION} has no runtime of cedana's: Kubernetes can't ask for it (ctr and nerdctl can)`,
    advice: "cedana setup --target containerd",
  };
}
