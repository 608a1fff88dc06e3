// How crit shows bytes: base64 in lines of 76 characters, and names of unix sockets as quoted-printable. Both as Python's
// library writes them, so that what people have written for crit's output finds the same text in ours.

/** Bytes in one line of base64. Text of chunks of a multiple of it can be joined. */
export const BASE64_LINE_BYTES = 57;

/** Base64 with a line feed after each 76 characters and at the end; nothing for no bytes. */
export function base64Lines(bytes: Uint8Array): string {
  const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("base64");
  return text.replace(/.{1,76}/g, "$&\n");
}

/** @throws TypeError for text that isn't base64; Buffer would skip what it doesn't know */
export function fromBase64(text: string): Buffer {
  if (!/^[A-Za-z0-9+/\s]*=?=?\s*$/.test(text)) throw new TypeError("is not base64");
  return Buffer.from(text, "base64");
}

const MAX_QUOTED_LINE = 76;

/**
 * Quoted-printable. Line feeds are quoted too, where Python leaves them: so the text always says exactly which bytes it was.
 * Source: RFC 2045 section 6.7, and what Python's quopri does of it.
 */
export function quotedPrintable(bytes: Uint8Array): string {
  let text = "";
  let lineLength = 0;
  for (const [at, byte] of bytes.entries()) {
    const isLast = at + 1 === bytes.length;
    const quoted =
      byte > 0x7e ||
      byte === 0x3d ||
      (byte < 0x21 && byte !== 0x20 && byte !== 0x09) ||
      ((byte === 0x20 || byte === 0x09) && isLast) ||
      // A dot alone in a line would end a mail.
      (byte === 0x2e && lineLength === 0 && (isLast || bytes[at + 1] === 0));
    const piece = quoted ? `=${byte.toString(16).toUpperCase().padStart(2, "0")}` : String.fromCharCode(byte);
    if (quoted ? lineLength + 3 >= MAX_QUOTED_LINE : !isLast && lineLength + 1 >= MAX_QUOTED_LINE) {
      text += "=\n";
      lineLength = 0;
    }
    text += piece;
    lineLength += piece.length;
  }
  return text;
}

/** @throws TypeError for `=` that is followed by neither two hexadecimal digits nor the end of a line */
export function fromQuotedPrintable(text: string): Buffer {
  const joined = text.replace(/=[ \t]*\r?\n/g, "");
  if (/=(?![0-9A-Fa-f]{2})/.test(joined)) throw new TypeError("is not quoted-printable");
  const latin1 = joined.replace(/=([0-9A-Fa-f]{2})/g, (_, hex: string) =>
    String.fromCharCode(Number.parseInt(hex, 16)),
  );
  for (const char of latin1)
    if (char.codePointAt(0)! > 0xff)
      throw new TypeError("is not quoted-printable: it has letters beyond a byte");
  return Buffer.from(latin1, "latin1");
}
