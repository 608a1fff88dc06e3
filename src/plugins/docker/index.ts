import { callerFeatures } from "../oci-caller.ts";
import type { Plugin } from "../plugin.ts";

export const plugin: Plugin = {
  name: "docker",
  features: callerFeatures({
    title: "Docker",
    programs: ["dockerd"],
    configuration: ["/etc/docker/daemon.json"],
    target: "docker",
  }),
};
