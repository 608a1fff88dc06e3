#include "protobuf.h"

static bool varint(const uint8_t **at, const uint8_t *end, uint64_t *value) {
  *value = 0;
  for (unsigned shift = 0; shift < 64 && *at < end; shift += 7) {
    uint8_t byte = *(*at)++;
    *value |= (uint64_t)(byte & 0x7f) << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

bool proto_field(struct slice message, unsigned number, struct slice *slice, uint64_t *value) {
  const uint8_t *at = message.data, *end = at + message.length;
  bool found = false;
  while (at < end) {
    uint64_t key, n;
    if (!varint(&at, end, &key)) return false;
    switch (key & 7) {
      case 0:
        if (!varint(&at, end, &n)) return false;
        if (key >> 3 == number && value) *value = n, found = true;
        break;
      case 2:
        if (!varint(&at, end, &n) || n > (uint64_t)(end - at)) return false;
        if (key >> 3 == number && slice) *slice = (struct slice){at, n}, found = true;
        at += n;
        break;
      case 1:
      case 5: {
        ptrdiff_t size = (key & 7) == 1 ? 8 : 4;
        if (end - at < size) return false;
        at += size;
        break;
      }
      default: return false;
    }
  }
  return found;
}

bool slice_is(struct slice s, const char *text) { return s.length == strlen(text) && !memcmp(s.data, text, s.length); }

static void put_varint(struct buffer *b, uint64_t value) {
  uint8_t bytes[10];
  unsigned n = 0;
  do bytes[n++] = (uint8_t)((value & 0x7f) | (value > 0x7f ? 0x80 : 0));
  while (value >>= 7);
  buffer_append(b, bytes, n);
}

void put_proto_int(struct buffer *b, unsigned field, uint64_t value) {
  put_varint(b, field << 3);
  put_varint(b, value);
}

void put_proto_bytes(struct buffer *b, unsigned field, const void *data, size_t length) {
  put_varint(b, field << 3 | 2);
  put_varint(b, length);
  buffer_append(b, data, length);
}
