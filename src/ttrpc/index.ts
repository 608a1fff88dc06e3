export { type CallOptions, Client } from "./client.ts";
export { type Call, Dispatcher, type Handler } from "./dispatcher.ts";
export {
  decodeFrame,
  encodeFrame,
  type Frame,
  type FrameHeader,
  FrameReader,
  frameFlag,
  frameType,
  HEADER_BYTES,
  MAX_MESSAGE_BYTES,
} from "./frame.ts";
export {
  decodeRequest,
  decodeResponse,
  encodeRequest,
  encodeResponse,
  type Request,
  type Status,
} from "./message.ts";
export { Server, type ServerOptions } from "./server.ts";
