// CRIU's images: to JSON, back, and whether they are whole. Everything here streams; none of it needs CRIU.

export { type DecodeOptions, decodeImage } from "./decode.ts";
export { encodeImage } from "./encode.ts";
export type { FaultKind, ImageFinding } from "./findings.ts";
export { formatOfFile, rawKindOf } from "./format.ts";
export { stringify } from "./json.ts";
export { encodeMessage } from "./message.ts";
export { ImageFault, ImageReader, readImage, readOne } from "./read.ts";
export type { Message, Value } from "./value.ts";
export { type ImageReport, verifyImages } from "./verify.ts";
export { verifyImagesInWorker } from "./verify-in-worker.ts";
