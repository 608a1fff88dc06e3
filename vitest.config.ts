import { defineConfig } from "vitest/config";

// Two projects: `unit` needs nothing but Node; `live` starts real containerds, engines and CRIU on private
// sockets, so its files run one after another: two cores and one kernel are shared by all of them.
export default defineConfig({
  test: {
    projects: [
      {
        test: {
          name: "unit",
          include: ["test/**/*.test.ts"],
          exclude: ["test/live/**"],
          testTimeout: 30_000, // the live tests keep both cores busy meanwhile
        },
      },
      {
        test: {
          name: "live",
          include: ["test/live/**/*.test.ts"],
          fileParallelism: false,
          testTimeout: 60_000,
          hookTimeout: 60_000,
        },
      },
    ],
  },
});
