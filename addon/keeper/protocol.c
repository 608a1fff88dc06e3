#include "protocol.h"

static void put_le(uint8_t *at, uint64_t number, unsigned size) {
  for (unsigned i = 0; i < size; i++) at[i] = (uint8_t)(number >> (8 * i));
}

static uint64_t get_le(const uint8_t *at, unsigned size) {
  uint64_t number = 0;
  for (unsigned i = 0; i < size; i++) number |= (uint64_t)at[i] << (8 * i);
  return number;
}

size_t frame_begin(struct buffer *out, enum message_type type) {
  uint8_t header[FRAME_HEADER] = {0};
  put_le(header + 4, (uint64_t)type, 2);
  buffer_append(out, header, sizeof header);
  /* Counted from the start of the waiting bytes: appending may move them to the front of the buffer. */
  return buffer_length(out) - FRAME_HEADER;
}

void frame_end(struct buffer *out, size_t begin) {
  put_le(out->data + out->start + begin, buffer_length(out) - begin - FRAME_HEADER, 4);
}

void put_bytes(struct buffer *out, enum field_key key, const void *data, size_t length) {
  uint8_t header[8] = {0};
  put_le(header, (uint64_t)key, 2);
  put_le(header + 4, length, 4);
  buffer_append(out, header, sizeof header);
  buffer_append(out, data, length);
}

void put_string(struct buffer *out, enum field_key key, const char *text) {
  if (text) put_bytes(out, key, text, strlen(text));
}

void put_int(struct buffer *out, enum field_key key, int64_t number) {
  uint8_t value[8];
  put_le(value, (uint64_t)number, 8);
  put_bytes(out, key, value, sizeof value);
}

ssize_t frame_complete(const struct buffer *in) {
  if (buffer_length(in) < FRAME_HEADER) return 0;
  uint64_t length = get_le(in->data + in->start, 4);
  if (length > FRAME_MAX) return -EMSGSIZE;
  return buffer_length(in) >= FRAME_HEADER + length ? (ssize_t)(FRAME_HEADER + length) : 0;
}

int message_decode(struct buffer *in, struct message *m) {
  *m = (struct message){0};
  size_t size = (size_t)frame_complete(in);
  if (buffer_reserve(in, 1) < 0) return -ENOMEM; /* for the NUL behind the last value */
  uint8_t *at = in->data + in->start, *end = at + size;
  m->type = (uint16_t)get_le(at + 4, 2);
  at += FRAME_HEADER;

  unsigned count = 0;
  for (uint8_t *p = at; p < end; count++) {
    if (end - p < 8) return -EBADMSG;
    uint64_t length = get_le(p + 4, 4);
    if ((uint64_t)(end - p - 8) < length) return -EBADMSG;
    p += 8 + length;
  }
  m->fields = count <= countof(m->few) ? m->few : allocate(count * sizeof *m->fields);
  m->count = count;
  for (unsigned i = 0; i < count; i++) {
    m->fields[i] = (struct field){(uint16_t)get_le(at, 2), (uint32_t)get_le(at + 4, 4), at + 8};
    at += 8 + m->fields[i].length;
  }
  /* Only now: each NUL overwrites the header of a field that has been read. */
  m->end = end;
  m->behind = *end;
  for (unsigned i = 0; i < count; i++) m->fields[i].value[m->fields[i].length] = 0;
  return 0;
}

void message_free(struct buffer *in, struct message *m) {
  if (m->end) {
    *m->end = m->behind;
    buffer_consume(in, (size_t)(m->end - (in->data + in->start)));
  }
  if (m->fields != m->few) free(m->fields);
}

const struct field *message_field(const struct message *m, enum field_key key) {
  for (unsigned i = 0; i < m->count; i++)
    if (m->fields[i].key == key) return &m->fields[i];
  return NULL;
}

int64_t field_int(const struct field *field) { return field->length == 8 ? (int64_t)get_le(field->value, 8) : 0; }

int64_t message_int(const struct message *m, enum field_key key) {
  const struct field *field = message_field(m, key);
  return field ? field_int(field) : 0;
}

static bool is_string(const struct field *field) { return strlen((char *)field->value) == field->length; }

const char *message_string(const struct message *m, enum field_key key) {
  const struct field *field = message_field(m, key);
  return field && field->length > 0 && is_string(field) ? (char *)field->value : NULL;
}

char **message_list(const struct message *m, enum field_key key) {
  unsigned count = 0;
  for (unsigned i = 0; i < m->count; i++) count += m->fields[i].key == key && is_string(&m->fields[i]);
  if (count == 0) return NULL;
  char **list = allocate((count + 1) * sizeof *list);
  count = 0;
  for (unsigned i = 0; i < m->count; i++)
    if (m->fields[i].key == key && is_string(&m->fields[i])) list[count++] = (char *)m->fields[i].value;
  return list;
}
