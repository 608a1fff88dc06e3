import { callerFeatures } from "../oci-caller.ts";
import type { Plugin } from "../plugin.ts";

export const plugin: Plugin = {
  name: "crio",
  features: callerFeatures({
    title: "CRI-O",
    programs: ["crio"],
    configuration: ["/etc/crio/crio.conf", "/etc/crio/crio.conf.d/50-cedana.conf"],
    target: "crio",
  }),
};
