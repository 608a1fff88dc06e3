import { describe, expect, it } from "vitest";
import { InvalidRequest } from "../../src/errors/index.ts";
import { execKillPolicy, killPolicy, planKill, signalNumber } from "../../src/runtime/kill-policy.ts";
import type { OciSpec } from "../../src/runtime/spec.ts";

const annotated = (annotations: Record<string, string>): OciSpec => ({ annotations });
const policy = (settings: Record<string, string>) =>
  killPolicy(
    annotated(
      Object.fromEntries(Object.entries(settings).map(([key, value]) => [`cedana.io/kill-${key}`, value])),
    ),
  );

describe("a signal", () => {
  it.each([
    ["TERM", 15],
    ["SIGTERM", 15],
    ["sigHup", 1],
    ["9", 9],
    ["64", 64],
    ["RTMIN", 34],
    ["SIGRTMIN+3", 37],
    ["RTMAX-1", 63],
    ["WINCH", 28],
  ])("%s is %d", (text, number) => expect(signalNumber(text)).toBe(number));

  it.each([
    "",
    "0",
    "65",
    "-9",
    "999",
    "SIG",
    "FOO",
    "SIGSIGTERM",
    "RTMIN+31",
    "RTMAX+1",
    "RTMIN-1",
    "TERM ",
    "1.5",
    "toString",
  ])("is not %j", (text) => expect(signalNumber(text)).toBeUndefined());
});

describe("a container's kill policy", () => {
  it("is nothing where nothing is said, and for a pod's sandbox", () => {
    expect(killPolicy({})).toBeUndefined();
    expect(killPolicy(annotated({ "cedana.io/tcp": "keep" }))).toBeUndefined();
    const sandbox = { "io.kubernetes.cri.container-type": "sandbox", "cedana.io/kill-signal": "nonsense" };
    expect(killPolicy(annotated(sandbox))).toBeUndefined();
  });

  it("says what TERM becomes, and what follows", () => {
    expect(policy({ signal: "SIGINT" })).toEqual({ signal: 2, escalation: [] });
    expect(policy({ grace: "5s" })).toEqual({ signal: 15, escalation: [{ signal: 9, afterMs: 5_000 }] });
    expect(policy({ signal: "QUIT", grace: "1s", escalation: "TERM, KILL" })).toEqual({
      signal: 3,
      escalation: [
        { signal: 15, afterMs: 1_000 },
        { signal: 9, afterMs: 1_000 },
      ],
    });
  });

  it("is a container's own before the pod's", () => {
    const annotations = {
      "io.kubernetes.cri.container-name": "web",
      "cedana.io/kill-signal": "INT",
      "cedana.io/kill-signal.web": "HUP",
      "cedana.io/kill-signal.db": "nonsense",
    };
    expect(killPolicy(annotated(annotations))).toEqual({ signal: 1, escalation: [] });
  });

  it.each([
    [{ signal: "BLAH" }, /annotation cedana.io\/kill-signal names "BLAH", which is no signal/],
    [{ signal: "" }, /no signal/],
    [{ grace: "soon" }, /annotation cedana.io\/kill-grace is "soon"; it must be a time/],
    [{ grace: "25h" }, /up to 24h/],
    [{ escalation: "KILL" }, /nothing says when: set kill-grace/],
    [{ grace: "1s", escalation: "INT,,KILL" }, /kill-escalation names ""/],
    [{ grace: "1s", escalation: Array(9).fill("INT").join() }, /has 9 signals/],
  ])("%j is refused by name", (settings, words) => {
    expect(() => policy(settings as Record<string, string>)).toThrow(InvalidRequest);
    expect(() => policy(settings as Record<string, string>)).toThrow(words);
  });

  it("leaves every other signal alone", () => {
    const said = policy({ signal: "INT", grace: "1s" });
    expect(planKill(said, 15)).toMatchObject({ signal: 2, escalation: [{ signal: 9, afterMs: 1000 }] });
    for (const signal of [1, 2, 9, 34])
      expect(planKill(said, signal)).toEqual({ signal, escalation: [], checkpoint: false });
    expect(planKill(undefined, 15)).toEqual({ signal: 15, escalation: [], checkpoint: false });
  });

  it("checkpoints upon the signals of checkpoint-on, and says what is sent when that fails", () => {
    const on = (value: string, more = {}) =>
      killPolicy(annotated({ "cedana.io/checkpoint-on": value, ...more }));
    expect(planKill(on("SIGTERM"), 15)).toEqual({ signal: 15, escalation: [], checkpoint: true });
    expect(planKill(on("TERM, usr1"), 10).checkpoint).toBe(true);
    expect(planKill(on("TERM"), 9).checkpoint).toBe(false);
    expect(planKill(on("TERM", { "cedana.io/kill-signal": "INT" }), 15)).toMatchObject({
      signal: 2,
      checkpoint: true,
    });
    for (const wrong of ["KILL", "TERM,STOP", "CONT", "TREM", "TERM,"])
      expect(() => on(wrong), wrong).toThrow(InvalidRequest);
  });
});

describe("an exec'd process's kill policy", () => {
  const spec = annotated({ "cedana.io/kill-signal": "INT", "cedana.io/exec-kill-signal": "HUP" });
  it("is the container's for execs, never that of init", () => {
    expect(execKillPolicy(spec, {})).toEqual({ signal: 1, escalation: [] });
    expect(execKillPolicy(annotated({ "cedana.io/kill-signal": "INT" }), { env: ["A=b"] })).toBeUndefined();
  });
  it("is its own where its environment says so, the last entry counts", () => {
    const env = ["CEDANA_KILL_SIGNAL=USR1", "CEDANA_KILL_SIGNAL=USR2", "CEDANA_KILL_GRACE=100ms"];
    expect(execKillPolicy(spec, { env })).toEqual({ signal: 12, escalation: [{ signal: 9, afterMs: 100 }] });
    expect(() => execKillPolicy(spec, { env: ["CEDANA_KILL_SIGNAL=X"] })).toThrow(
      /environment variable CEDANA_KILL_SIGNAL names "X"/,
    );
  });
});
