import { parse as parseToml } from "smol-toml";
import { CedanaError, InvalidRequest, NotFound } from "../errors/index.ts";
import { readApart } from "../linux/apart.ts";
import { runcOptions, runtimeOptions } from "../proto/index.ts";

// The options that containerd hands to a runtime. They come in one of two messages, packed as Any:
//
//  containerd.runc.v1.Options   from `ctr --runc-…`, from Docker, and from the CRI plugin for `io.containerd.runc.v2`
//  runtimeoptions.v1.Options    from the CRI plugin for every other runtime type, ours included: the whole `options`
//                               table of containerd's configuration as TOML (config_body), or a file's path (config_path)
//
// Type urls have had a prefix now and then (`types.containerd.io/…`); what counts is the part after the last slash.

/** A packed message. */
export interface AnyMessage {
  readonly typeUrl?: string | null | undefined;
  readonly value?: Uint8Array | null | undefined;
}

/** Strings are empty and numbers 0 when not given. Plain data: this is also what the journal keeps. */
export interface RuntimeOptions {
  readonly noPivotRoot: boolean;
  readonly noNewKeyring: boolean;
  /** Cgroup that the pod's keeper joins. */
  readonly shimCgroup: string;
  /** Owner of the pipes of stdio. */
  readonly ioUid: number;
  readonly ioGid: number;
  /** The engine: a name or a path. */
  readonly binaryName: string;
  /** The engine's state directory, without containerd's namespace. */
  readonly root: string;
  readonly systemdCgroup: boolean;
  /** Path of CRIU, containerd 1.7 and before. Without effect, as in every engine that we support: it is warned of. */
  readonly criuPath: string;
  /** Given at Create: restore from there. */
  readonly criuImagePath: string;
  readonly criuWorkPath: string;
  /** What the configuration says in vain; a typing mistake is found here. */
  readonly warnings: readonly string[];
}

/** Options of a checkpoint, as containerd.runc.v1.CheckpointOptions has them. */
export interface CheckpointRequestOptions {
  /** End the container after the dump. */
  readonly exit: boolean;
  readonly openTcp: boolean;
  readonly externalUnixSockets: boolean;
  readonly terminal: boolean;
  readonly fileLocks: boolean;
  readonly emptyNamespaces: string[];
  readonly cgroupsMode: string;
  readonly imagePath: string;
  readonly workPath: string;
  readonly parentPath: string;
}

const runcType = runcOptions.Options.name;
const genericType = runtimeOptions.Options.name;
const checkpointType = runcOptions.CheckpointOptions.name;

// A table of a dozen lines; a bound only so that a wrong path doesn't fill memory.
const maxConfigBytes = 1024 * 1024;

const noOptions: RuntimeOptions = {
  noPivotRoot: false,
  noNewKeyring: false,
  shimCgroup: "",
  ioUid: 0,
  ioGid: 0,
  binaryName: "",
  root: "",
  systemdCgroup: false,
  criuPath: "",
  criuImagePath: "",
  criuWorkPath: "",
  warnings: [],
};

/**
 * Decodes the options that came with Create or on the launcher's stdin.
 *
 * Reads a file when they name one (`ConfigPath`).
 * @param any  undefined or without a type: the defaults
 * @throws InvalidRequest for a type that we don't know or content that doesn't fit its type; NotFound for a missing file
 */
export async function decodeOptions(any: AnyMessage | null | undefined): Promise<RuntimeOptions> {
  if (!any?.typeUrl) return noOptions;
  const value = any.value ?? new Uint8Array();
  switch (typeName(any.typeUrl)) {
    case runcType:
      return warned(fromRunc(decodeAs(any.typeUrl, () => runcOptions.Options.decode(value))));
    case genericType:
      return warned(await fromGeneric(decodeAs(any.typeUrl, () => runtimeOptions.Options.decode(value))));
    default:
      throw new InvalidRequest(
        `runtime options are of type ${any.typeUrl}; they may be ${runcType} or ${genericType}`,
      );
  }
}

function warned(options: RuntimeOptions): RuntimeOptions {
  if (options.criuPath === "") return options;
  const warning = `CriuPath ${options.criuPath} has no effect: CRIU is looked up in PATH`;
  return { ...options, warnings: [...options.warnings, warning] };
}

/**
 * Decodes the options of a Checkpoint request.
 * @param any  undefined or without a type: the defaults
 * @throws InvalidRequest for another type or broken content
 */
export function decodeCheckpointOptions(any: AnyMessage | null | undefined): CheckpointRequestOptions {
  if (any?.typeUrl && typeName(any.typeUrl) !== checkpointType)
    throw new InvalidRequest(`checkpoint options are of type ${any.typeUrl}; they may be ${checkpointType}`);
  const value = (any?.typeUrl && any.value) || new Uint8Array();
  const options = decodeAs(checkpointType, () => runcOptions.CheckpointOptions.decode(value));
  return {
    exit: options.exit,
    openTcp: options.openTcp,
    externalUnixSockets: options.externalUnixSockets,
    terminal: options.terminal,
    fileLocks: options.fileLocks,
    emptyNamespaces: [...options.emptyNamespaces],
    cgroupsMode: options.cgroupsMode,
    imagePath: options.imagePath,
    workPath: options.workPath,
    parentPath: options.parentPath,
  };
}

/** Whether `decodeOptions` knows the message's type. */
export function isRuntimeOptions(any: AnyMessage): boolean {
  return [runcType, genericType].includes(typeName(any.typeUrl ?? ""));
}

function typeName(typeUrl: string): string {
  return typeUrl.slice(typeUrl.lastIndexOf("/") + 1);
}

function decodeAs<T>(typeUrl: string, decode: () => T): T {
  try {
    return decode();
  } catch (err) {
    throw new InvalidRequest(`content of ${typeUrl} is broken: ${(err as Error).message}`, { cause: err });
  }
}

function fromRunc(options: runcOptions.Options): RuntimeOptions {
  return {
    noPivotRoot: options.noPivotRoot,
    noNewKeyring: options.noNewKeyring,
    shimCgroup: options.shimCgroup,
    ioUid: options.ioUid,
    ioGid: options.ioGid,
    binaryName: options.binaryName,
    root: options.root,
    systemdCgroup: options.systemdCgroup,
    criuPath: options.criuPath,
    criuImagePath: options.criuImagePath,
    criuWorkPath: options.criuWorkPath,
    warnings: [],
  };
}

async function fromGeneric(options: runtimeOptions.Options): Promise<RuntimeOptions> {
  // `TypeUrl` in the table says of what type the rest is; without it, it is what we take it for.
  if (options.typeUrl && typeName(options.typeUrl) !== runcType)
    throw new InvalidRequest(
      `runtime options hold a table of type ${options.typeUrl}; it may be ${runcType}, or say nothing`,
    );
  if (options.configPath) return parseOptionsTable(await readConfig(options.configPath), options.configPath);
  return parseOptionsTable(Buffer.from(options.configBody).toString("utf8"), "the runtime's options");
}

async function readConfig(path: string): Promise<string> {
  try {
    return (await readApart(path, maxConfigBytes)).toString("utf8");
  } catch (err) {
    if (["EISDIR", "EINVAL", "EFBIG"].includes((err as NodeJS.ErrnoException).code ?? ""))
      throw new InvalidRequest(`runtime options are to be read from ${path}, which is no small file`, {
        cause: err,
      });
    if (err instanceof CedanaError) throw err;
    throw new NotFound(`runtime options are to be read from ${path}: ${(err as Error).message}`, {
      cause: err,
    });
  }
}

// Keys are spelled as in containerd's configuration (`BinaryName`), and told apart without case and underscores.
const tableKeys: ReadonlyMap<string, keyof Omit<RuntimeOptions, "warnings">> = new Map(
  (Object.keys(noOptions) as (keyof RuntimeOptions)[])
    .filter((field) => field !== "warnings")
    .map((field) => [field.toLowerCase(), field]),
);

// Known to containerd, and without meaning here.
const ignoredKeys = new Set(["typeurl", "configpath", "configbody", "taskapiaddress", "taskapiversion"]);

/**
 * The `options` table of a runtime in containerd's configuration, or a file with the same keys.
 * @param source  for messages
 * @throws InvalidRequest when it isn't TOML or a value has the wrong type; an unknown key only adds to `warnings`
 */
export function parseOptionsTable(text: string, source: string): RuntimeOptions {
  let table: Record<string, unknown>;
  try {
    table = parseToml(text);
  } catch (err) {
    throw new InvalidRequest(`${source}: ${(err as Error).message}`, { cause: err });
  }
  const options: Record<string, unknown> = { ...noOptions };
  const warnings: string[] = [];
  for (const [key, value] of Object.entries(table)) {
    const name = key.replaceAll("_", "").toLowerCase();
    const field = tableKeys.get(name);
    if (field === undefined) {
      if (!ignoredKeys.has(name)) warnings.push(`${source}: unknown option ${key}`);
      continue;
    }
    const wanted = typeof noOptions[field];
    const fits = wanted === "number" ? isUint32(value) : typeof value === wanted;
    if (!fits)
      throw new InvalidRequest(`${source}: ${key} is ${JSON.stringify(value)}; it must be ${kinds[wanted]}`);
    options[field] = value;
  }
  return { ...(options as unknown as RuntimeOptions), warnings };
}

const kinds: Record<string, string> = {
  boolean: "true or false",
  string: "a string",
  number: "a number from 0 to 4294967295",
};

function isUint32(value: unknown): boolean {
  return Number.isInteger(value) && (value as number) >= 0 && (value as number) <= 0xffff_ffff;
}
