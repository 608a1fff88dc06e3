/*
 * The frames between a keeper or launcher and cedanad: the numbers, encoding and decoding.
 * PROTOCOL.md is the specification; src/shim/keeper-protocol.ts carries the same numbers.
 *
 *   frame:  u32 length of the payload · u16 type · u16 zero · payload        (all little-endian)
 *   field:  u16 key · u16 zero · u32 length · value                          (an integer is 8 bytes)
 *
 * A payload over FRAME_MAX, or a field that runs over its frame, is a fault of the sender and ends the connection.
 * Unknown types and keys are skipped.
 */
#pragma once

#include "util.h"

#define FRAME_HEADER 8
#define OPTIONS_MAX (10 * MIB) /* what a launcher takes on stdin, the longest of all values; a TTRPC message has 4 MiB */
#define FRAME_MAX (OPTIONS_MAX + 64 * KIB)
#define PROTOCOL_MIN 1

enum field_key {
  FIELD_VERSION = 1,
  FIELD_VERSION_MIN = 2,
  FIELD_VERSION_MAX = 3,
  FIELD_PID = 4,
  FIELD_MOUNT_NS = 5,
  FIELD_NAMESPACE = 6,
  FIELD_ID = 7,
  FIELD_BUNDLE = 8,
  FIELD_CONTAINERD_ADDRESS = 9,
  FIELD_TTRPC_ADDRESS = 10,
  FIELD_PUBLISH_BINARY = 11,
  FIELD_SOCKET_PATH = 12,
  FIELD_OPTIONS = 13,
  FIELD_MAX_SHIM_VERSION = 14,
  FIELD_FLAGS = 15,
  FIELD_ANSWER = 16,
  FIELD_SHIM_CGROUP = 17,
  FIELD_REQUEST = 18,
  FIELD_CONNECTION = 19,
  FIELD_DELIVERIES = 20,
  FIELD_AGE_MS = 21,
  FIELD_FRAME = 22,
  FIELD_STEP = 23,
  FIELD_ERRNO = 24,
  FIELD_MESSAGE = 25,
  FIELD_SEQUENCE = 26,
  FIELD_WAIT_STATUS = 27,
  FIELD_AT_NS = 28,
  FIELD_USER_US = 29,
  FIELD_SYSTEM_US = 30,
  FIELD_MAX_RSS_KB = 31,
  FIELD_ARGV = 32,
  FIELD_ENV = 33,
  FIELD_CWD = 34,
  FIELD_IO = 35,
  FIELD_CONSOLE_SOCKET = 36,
  FIELD_OUTPUT_PATH = 37,
  FIELD_SIGNAL = 38,
  FIELD_MOUNT_TYPE = 39,
  FIELD_SOURCE = 40,
  FIELD_TARGET = 41,
  FIELD_MOUNT_FLAGS = 42,
  FIELD_MOUNT_DATA = 43,
  FIELD_LOOP = 44,
  FIELD_TERMINAL = 45,
  FIELD_STDIN = 46,
  FIELD_STDOUT = 47,
  FIELD_STDERR = 48,
  FIELD_STDOUT_KIND = 49,
  FIELD_STDERR_KIND = 50,
  FIELD_UID = 51,
  FIELD_GID = 52,
  FIELD_WIDTH = 53,
  FIELD_HEIGHT = 54,
  FIELD_TIMEOUT_MS = 55,
  FIELD_EXEC_PID = 56,
  FIELD_EVENT_KEY = 57,
  FIELD_PATH = 58,
  FIELD_NONCE = 60,
  FIELD_CLOSED = 61,
  FIELD_BUILD = 62,
  FIELD_DRIVER_ARGV = 63,
  FIELD_DRIVER_ENV = 64,
  FIELD_SCHED_CORE = 65,
  FIELD_STATUS = 67,
  FIELD_SEALED_FD = 68,
  FIELD_SEALED_OF = 69,
  FIELD_TAKEN = 70,
  FIELD_GLOBAL_ARGV = 100,
  FIELD_ROOT = 101,
  FIELD_MARKER = 102,
};

enum message_type {
  MESSAGE_HELLO = 1,
  MESSAGE_WELCOME = 2,
  MESSAGE_TASK = 3,
  MESSAGE_TASK_GONE = 4,
  MESSAGE_REQUEST = 5,
  MESSAGE_RESPONSE = 6,
  MESSAGE_PARKED = 7,
  MESSAGE_CONNECTION_CLOSED = 8,
  MESSAGE_END = 9,
  MESSAGE_PING = 10,
  MESSAGE_PONG = 11,
  MESSAGE_EXIT = 12,
  MESSAGE_ACK = 13,
  MESSAGE_RESULT = 14,
  MESSAGE_SPAWNED = 15,
  MESSAGE_SPAWN = 16,
  MESSAGE_SIGNAL = 17,
  MESSAGE_MOUNT = 18,
  MESSAGE_UNMOUNT = 19,
  MESSAGE_IO_OPEN = 20,
  MESSAGE_IO_RESIZE = 21,
  MESSAGE_IO_CLOSE_STDIN = 22,
  MESSAGE_IO_DRAIN = 23,
  MESSAGE_IO_FREE = 24,
  MESSAGE_EVENT = 25,
  MESSAGE_EVENT_REFUSED = 26,
  MESSAGE_LEAVE = 27,
  MESSAGE_WATCH_OOM = 28, /* version 2 */
  MESSAGE_OOM = 29,       /* version 2 */
  MESSAGE_TAKEN = 30,
  MESSAGE_START = 40,
  MESSAGE_START_ANSWER = 41,
  MESSAGE_DELETE = 42,
  MESSAGE_DELETE_ANSWER = 43,
  MESSAGE_INFO = 44,
  MESSAGE_INFO_ANSWER = 45,
  MESSAGE_STATUS = 46,
  MESSAGE_STATUS_ANSWER = 47,
  MESSAGE_RUNTIME = 60,
  MESSAGE_RUNTIME_WORKING = 61,
  MESSAGE_RUNTIME_RUN = 62,
  MESSAGE_RUNTIME_ENDED = 63,
  MESSAGE_RUNTIME_ANSWER = 64,
};

/* Encoding: frame_begin, fields, frame_end with what frame_begin returned. */
size_t frame_begin(struct buffer *out, enum message_type type);
void put_bytes(struct buffer *out, enum field_key key, const void *data, size_t length);
void put_string(struct buffer *out, enum field_key key, const char *text); /* NULL: nothing */
void put_int(struct buffer *out, enum field_key key, int64_t number);
void frame_end(struct buffer *out, size_t begin);

struct field {
  uint16_t key;
  uint32_t length;
  uint8_t *value;
};

/* A decoded frame. Its values lie in the buffer that it was decoded from, each with a NUL behind it. */
struct message {
  uint16_t type;
  unsigned count;
  struct field *fields;
  struct field few[24];
  uint8_t *end, behind; /* the byte that the last NUL hides */
};

/* Length of the first frame in `in`, header included, or 0 when it has not all come, or -EMSGSIZE. */
ssize_t frame_complete(const struct buffer *in);
/* Decodes the first frame, which must be complete. message_free puts the buffer back and consumes the frame. */
int message_decode(struct buffer *in, struct message *m);
void message_free(struct buffer *in, struct message *m);

const struct field *message_field(const struct message *m, enum field_key key);
int64_t field_int(const struct field *field); /* 0 when it is no integer */
int64_t message_int(const struct message *m, enum field_key key); /* 0 when absent */
/* NULL when absent, empty, or not a string. */
const char *message_string(const struct message *m, enum field_key key);
/* The values of a repeated key as a NULL-terminated list, which the caller frees (not the strings); NULL for none. */
char **message_list(const struct message *m, enum field_key key);
