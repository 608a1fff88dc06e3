/* Protobuf's wire format, as much as the keeper and the launcher need: a field read, a field written. */
#pragma once

#include "util.h"

struct slice {
  const uint8_t *data;
  size_t length;
};

/* The last field `number` of a message: a length-delimited one into *slice, or a varint into *value. False: none, or no protobuf. */
bool proto_field(struct slice message, unsigned number, struct slice *slice, uint64_t *value);
bool slice_is(struct slice s, const char *text);

void put_proto_int(struct buffer *b, unsigned field, uint64_t value);
void put_proto_bytes(struct buffer *b, unsigned field, const void *data, size_t length);
