import { InvalidRequest, Unsupported } from "../errors/index.ts";
import { type GpuDevice, parseUuid, uuidText } from "./means.ts";

/**
 * Which GPU here takes the place of which of the checkpoint: the same UUID where it is there; what the map says; the others by index among
 * those of the same model that are left.
 * @param map   `cedana.io/gpu-map`: OLD=NEW,… each a UUID, with or without "GPU-", or an index in the respective list
 * @param used  UUIDs of the checkpoint that must find a place; undefined: it isn't known, so all must that can
 * @returns pairs for every GPU that finds a place; empty when each is where it was
 * @throws InvalidRequest for a map that names what isn't there, Unsupported when a GPU finds no place
 */
export function mapDevices(
  from: readonly GpuDevice[],
  to: readonly GpuDevice[],
  { map, used }: { map?: string | undefined; used?: readonly string[] | undefined } = {},
): [string, string][] {
  const chosen = new Map<string, string>();
  for (const [old, next] of parseMap(map ?? "", from, to)) chosen.set(old, next);
  const free = () => to.filter(({ uuid }) => ![...chosen.values()].includes(uuid));
  for (const { uuid } of from)
    if (!chosen.has(uuid) && free().some((device) => device.uuid === uuid)) chosen.set(uuid, uuid);
  for (const device of from) {
    if (chosen.has(device.uuid)) continue;
    const next = free().find(({ name }) => name === device.name);
    if (next) chosen.set(device.uuid, next.uuid);
    else if (used === undefined || used.includes(device.uuid))
      throw new Unsupported(
        `no GPU here can take the place of ${uuidText(device.uuid)} (${device.name}): ${describeAll(to, chosen)}`,
      );
  }
  const byUuid = new Map(to.map((device) => [device.uuid, device]));
  for (const device of from) {
    const next = byUuid.get(chosen.get(device.uuid) ?? "");
    if (next && next.name !== device.name)
      throw new Unsupported(
        `${uuidText(next.uuid)} (${next.name}) can't take the place of ${uuidText(device.uuid)} (${device.name}): the driver wants the same model`,
      );
  }
  const pairs = [...chosen];
  return pairs.every(([old, next]) => old === next) ? [] : pairs;
}

function parseMap(
  map: string,
  from: readonly GpuDevice[],
  to: readonly GpuDevice[],
): (readonly [string, string])[] {
  const pairs = map
    .split(",")
    .map((part) => part.trim())
    .filter(Boolean)
    .map((part) => {
      const [old, next, ...more] = part.split("=");
      if (old === undefined || next === undefined || more.length > 0)
        throw new InvalidRequest(`cedana.io/gpu-map: ${JSON.stringify(part)} is not OLD=NEW`);
      return [find(old, from, "of the checkpoint"), find(next, to, "here")] as const;
    });
  for (const side of [0, 1] as const) {
    const named = pairs.map((pair) => pair[side]);
    const twice = named.find((uuid, index) => named.indexOf(uuid) !== index);
    if (twice !== undefined) throw new InvalidRequest(`cedana.io/gpu-map names ${uuidText(twice)} twice`);
  }
  return pairs;
}

function find(text: string, devices: readonly GpuDevice[], where: string): string {
  const found = /^\d{1,3}$/.test(text)
    ? devices[Number(text)]
    : devices.find(({ uuid }) => uuid === parseUuid(text));
  if (!found)
    throw new InvalidRequest(
      `cedana.io/gpu-map: no GPU ${where} is ${JSON.stringify(text)}; there are ${devices.map(({ uuid }) => uuidText(uuid)).join(", ") || "none"}`,
    );
  return found.uuid;
}

function describeAll(to: readonly GpuDevice[], chosen: ReadonlyMap<string, string>): string {
  if (to.length === 0) return "there is none";
  const taken = [...chosen.values()];
  return `there are ${to.map(({ uuid, name }) => `${uuidText(uuid)} (${name}${taken.includes(uuid) ? ", taken" : ""})`).join(", ")}`;
}
