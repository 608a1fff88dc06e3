import { describe, expect, it } from "vitest";
import { Feature, isListOf, pluginsLoaded, setPluginLoader } from "../../src/features/registry.ts";

const isNumber = (value: unknown) => (typeof value === "number" ? undefined : "is not a number");

describe("a feature", () => {
  it("is there for those who ask by the plugin's name, and for nobody else", () => {
    const feature = new Feature<number>("Number", isNumber);
    feature.provide("one", 1);
    feature.provide("two", 2);
    expect(feature.ifAvailable("one", (value) => value + 10)).toBe(11);
    expect(feature.ifAvailable("three", () => "called")).toBeUndefined();
    expect(feature.all()).toEqual([
      ["one", 1],
      ["two", 2],
    ]);
    feature.withdraw("one");
    expect(feature.isAvailable("one")).toBe(false);
  });

  it("takes no value of another type, and none twice", () => {
    const feature = new Feature<number>("Number", isNumber);
    expect(() => feature.provide("one", "1" as never)).toThrow("one: Number: is not a number");
    feature.provide("one", 1);
    expect(() => feature.provide("one", 2)).toThrow("exports Number twice");
  });

  it("says what is wrong with a list", () => {
    const faultOf = isListOf({ name: "string", run: "function" });
    expect(faultOf([{ name: "a", run() {} }])).toBeUndefined();
    expect(faultOf({})).toBe("is not a list");
    expect(faultOf([null])).toBe("entry 0 is not an object");
    expect(faultOf([{ name: "a", run() {} }, { name: "b" }])).toBe("entry 1 has no function run");
  });
});

it("plugins are loaded once, when they are first wanted", async () => {
  let loads = 0;
  setPluginLoader(async () => {
    loads++;
  });
  expect(loads).toBe(0);
  await Promise.all([pluginsLoaded(), pluginsLoaded()]);
  await pluginsLoaded();
  expect(loads).toBe(1);
});
