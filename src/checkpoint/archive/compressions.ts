/** How an archive may be compressed. */
export const compressions = ["none", "gzip", "lz4", "zstd"] as const;
export type Compression = (typeof compressions)[number];
