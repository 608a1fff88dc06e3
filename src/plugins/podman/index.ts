import { callerFeatures } from "../oci-caller.ts";
import type { Plugin } from "../plugin.ts";

export const plugin: Plugin = {
  name: "podman",
  features: callerFeatures({
    title: "Podman",
    programs: ["podman"],
    configuration: ["/etc/containers/containers.conf", "/etc/containers/containers.conf.d/50-cedana.conf"],
    target: "podman",
  }),
};
