import { Args, Flags } from "@oclif/core";

// What several commands take: the same letters and the same words everywhere.

export const jsonFlag = { json: Flags.boolean({ description: "print JSON" }) };

export const containerArg = {
  container: Args.string({ required: true, ignoreStdin: true, description: "id of the container" }),
};

export const namespaceFlag = {
  namespace: Flags.string({
    char: "n",
    helpValue: "NAMESPACE",
    description: "containerd namespace, when the id is in several",
  }),
};

export const secretFlags = {
  "key-file": Flags.string({
    helpValue: "FILE",
    description: "key of an encrypted archive: the bytes of this file",
    exclusive: ["passphrase-file"],
  }),
  "passphrase-file": Flags.string({
    helpValue: "FILE",
    description: 'passphrase of an encrypted archive: the first line of this file; "-" is stdin',
  }),
};
