import { constants } from "node:fs";
import { lstat, open, readdir, readlink } from "node:fs/promises";
import { dirname, isAbsolute, join, normalize, relative, sep } from "node:path";
import { pathToFileURL } from "node:url";
import { InvalidRequest, NotFound, PermissionDenied, TimedOut, Unsupported } from "../errors/index.ts";
import { type FeatureName, features, openFeatures } from "./features.ts";
import { PLUGIN_API_VERSION, type Plugin } from "./plugin.ts";

/*
 * Plugins from outside of our tree: npm packages that the administrator names in the configuration. They run in cedanad, as root, so
 * whoever could change one file of theirs could become root: every directory on the way, and everything in the package, must be
 * root's (or ours) and writable by nobody else. Checked before a byte of it is executed.
 *
 * package.json says what it is for:  "cedana": { "apiVersion": 1, "entry": "plugin.js" }
 * and the entry exports              export const plugin = { name: "audit", features: { dumpMiddleware: [...] } };
 */

export interface ExternalPlugin extends Plugin {
  readonly origin: string;
  readonly version: string;
}

/** As npm has them, with or without a scope. */
const PACKAGE_NAME = /^(?:@[a-z0-9~-][a-z0-9._~-]*\/)?[a-z0-9~-][a-z0-9._~-]*$/;
const PLUGIN_NAME = /^[a-z][a-z0-9-]{0,31}$/;
/** More is no plugin, but somebody's whole disk. */
const MAX_ENTRIES = 20_000;
const MAX_PACKAGE_JSON_BYTES = 1024 * 1024;
/** A module that waits for ever at its top level would keep every dump waiting. */
const IMPORT_PATIENCE_MS = 10_000;

/**
 * Looks at a package and loads it.
 * @param named      what the configuration says: a package's name, looked up in `directory`/node_modules, or an absolute path
 * @param directory  where packages are installed (`npm install --prefix`)
 * @throws NotFound, InvalidRequest, PermissionDenied, Unsupported, TimedOut, and whatever the module throws
 */
export async function loadExternal(named: string, directory: string): Promise<ExternalPlugin> {
  const place = packageDirectory(named, directory);
  const modules = join(directory, "node_modules");
  await checkWayTo(place);
  // Its dependencies may be its neighbours.
  await checkTree(place.startsWith(modules + sep) ? modules : place);
  const { version, entry } = await readPackage(place);
  const module = await withinPatience(import(pathToFileURL(entry).href), named);
  const plugin = checkPlugin((module as { plugin?: unknown }).plugin, entry);
  return { ...plugin, origin: place, version };
}

function packageDirectory(named: string, directory: string): string {
  if (isAbsolute(named) && !named.includes("\0")) return normalize(named).replace(/(?<=.)\/$/, "");
  if (!PACKAGE_NAME.test(named))
    throw new InvalidRequest(
      `${JSON.stringify(named)} is neither the name of an npm package nor an absolute path`,
    );
  return join(directory, "node_modules", named);
}

async function checkWayTo(place: string): Promise<void> {
  for (let path = place; ; path = dirname(path)) {
    await check(path, "directory");
    if (path === "/") return;
  }
}

async function checkTree(root: string): Promise<void> {
  let count = 0;
  const walk = async (directory: string): Promise<void> => {
    for (const entry of await readdir(directory, { withFileTypes: true })) {
      if (++count > MAX_ENTRIES) throw new InvalidRequest(`${root} has more than ${MAX_ENTRIES} files`);
      const path = join(directory, entry.name);
      if (entry.isSymbolicLink()) await checkLink(path, root);
      else await check(path, entry.isDirectory() ? "directory" : "file");
      if (entry.isDirectory()) await walk(path);
    }
  };
  await walk(root);
}

/** npm makes links in node_modules/.bin; none leads out. */
async function checkLink(path: string, root: string): Promise<void> {
  const target = join(dirname(path), await readlink(path));
  if (isAbsolute(await readlink(path)) || !isBelow(target, root))
    throw new PermissionDenied(
      `${path} is a link that leads out of ${root}: install the package instead of linking it`,
    );
}

function isBelow(path: string, directory: string): boolean {
  const way = relative(directory, path);
  return way !== ".." && !way.startsWith(`..${sep}`) && !isAbsolute(way);
}

async function check(path: string, kind: "file" | "directory"): Promise<void> {
  const info = await lstat(path).catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ENOENT" || error.code === "ENOTDIR")
      throw new NotFound(`${path} is not there: install the package (npm install --prefix DIRECTORY NAME)`, {
        cause: error,
      });
    throw error;
  });
  if (kind === "directory" ? !info.isDirectory() : !info.isFile())
    throw new PermissionDenied(`${path} is not a ${kind}`);
  if (info.uid !== 0 && info.uid !== process.getuid!())
    throw new PermissionDenied(`${path} belongs to user ${info.uid}: what cedanad runs must be root's`);
  // In a sticky directory, such as /tmp, nobody replaces what is root's.
  const isSticky =
    kind === "directory" &&
    (info.mode & constants.S_IFMT) === constants.S_IFDIR &&
    (info.mode & 0o1000) !== 0;
  if (info.mode & 0o022 && !isSticky)
    throw new PermissionDenied(
      `${path} can be written by others (mode ${(info.mode & 0o7777).toString(8)}): chmod go-w`,
    );
}

async function readPackage(place: string): Promise<{ version: string; entry: string }> {
  const path = join(place, "package.json");
  await using file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW);
  if ((await file.stat()).size > MAX_PACKAGE_JSON_BYTES) throw new InvalidRequest(`${path} is too big`);
  const text = await file.readFile("utf8");
  let json: { version?: unknown; cedana?: { apiVersion?: unknown; entry?: unknown } };
  try {
    json = JSON.parse(text);
  } catch (error) {
    throw new InvalidRequest(`${path} is not JSON`, { cause: error });
  }
  const { apiVersion, entry } = json.cedana ?? {};
  if (apiVersion === undefined)
    throw new InvalidRequest(`${path} has no cedana.apiVersion: it is no plugin of cedana's`);
  if (apiVersion !== PLUGIN_API_VERSION)
    throw new Unsupported(
      `it is for version ${JSON.stringify(apiVersion)} of the plugin API; this cedana has version ${PLUGIN_API_VERSION}`,
    );
  if (typeof entry !== "string") throw new InvalidRequest(`${path} has no cedana.entry, the file to load`);
  const whole = join(place, entry);
  if (isAbsolute(entry) || !isBelow(whole, place))
    throw new PermissionDenied(`${path}: its entry ${entry} is outside of the package`);
  return { version: typeof json.version === "string" ? json.version : "", entry: whole };
}

async function withinPatience<T>(loading: Promise<T>, named: string): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(
      () => reject(new TimedOut(`${named} has not loaded within ${IMPORT_PATIENCE_MS} ms`)),
      IMPORT_PATIENCE_MS,
    );
  });
  try {
    return await Promise.race([loading, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** What a module exports may be anything. */
function checkPlugin(value: unknown, entry: string): Plugin {
  const wrong = (what: string): never => {
    throw new InvalidRequest(`${entry}: ${what}`);
  };
  if (typeof value !== "object" || value === null) return wrong("it exports no object `plugin`");
  const { name, features: exported } = value as { name?: unknown; features?: unknown };
  if (typeof name !== "string" || !PLUGIN_NAME.test(name))
    return wrong(
      "plugin.name is not of lower-case letters, digits and dashes, at most 32, the first a letter",
    );
  if (typeof exported !== "object" || exported === null) return wrong("plugin.features is not an object");
  for (const [key, feature] of Object.entries(exported)) {
    if (!openFeatures.includes(key as FeatureName))
      throw new Unsupported(`${entry}: it exports ${key}; a plugin may export ${openFeatures.join(", ")}`);
    const fault = features[key as FeatureName].faultOf(feature);
    if (fault !== undefined) wrong(`plugin.features.${key} ${fault}`);
  }
  return { name, features: exported as Plugin["features"] };
}
