/*
 * Events for containerd: TTRPC requests, made by cedanad, sent in order, one at a time, kept while containerd is away. A key
 * that was taken once for a container is not taken again: so an event is neither lost nor doubled when cedanad dies.
 *
 * A key comes again only while its request is unanswered or its exit unacknowledged, so the last KEYS_MAX of a container are
 * enough: a container may live for years and have a health check every second. Of a key its hash is kept (64 bits).
 */
#include "keeper.h"
#include "daemon.h"
#include "protobuf.h"
#include <sys/socket.h>
#include <unistd.h>

#define QUEUE_MAX (8 * MIB) /* some ten thousand events */
#define KEYS_MAX 2048
#define RETRY_MIN_MS 100
#define RETRY_MAX_MS 2000
#define IDLE_MS 5000
#define ANSWER_MS 10000
#define HEADER 10

struct event {
  char *id, *key;
  uint8_t *frame;
  size_t length;
  struct event *next;
};

struct container_keys {
  char *id;
  uint64_t *hashes; /* a ring once there are KEYS_MAX */
  unsigned count, capacity, oldest;
  struct container_keys *next;
};

static struct event *queue, **queue_end = &queue;
static struct container_keys *containers;
static size_t queued;
static bool overflowing;
static struct watch connection = {.fd = -1};
static struct buffer in, out;
static uint32_t stream;
static bool waiting;
static uint64_t retry_ms = RETRY_MIN_MS;
static struct timer retry;

static void send_next(void);
static void retry_due(struct timer *timer);

static void disconnect(void) {
  if (connection.fd < 0) return;
  watch_close(&connection);
  buffer_free(&in);
  buffer_free(&out);
  waiting = false;
}

static void again_later(void) {
  disconnect();
  timer_start(&retry, retry_ms, retry_due);
  retry_ms = retry_ms * 2 > RETRY_MAX_MS ? RETRY_MAX_MS : retry_ms * 2;
}

static void retry_due(struct timer *timer) {
  (void)timer;
  if (queue && waiting) again_later(); /* no answer in time */
  else if (queue) send_next();
  else disconnect(); /* idle */
}

static void drop_first(void) {
  struct event *e = queue;
  queue = e->next;
  if (!queue) queue_end = &queue;
  queued -= e->length;
  free(e->id);
  free(e->key);
  free(e->frame);
  free(e);
}

/* An event that containerd will not get is never dropped without a word. */
static void refused(const char *id, const char *key, const char *why) {
  if (!cedanad_ready()) {
    daemon_log_line("event %s of %s is lost: %s", key, id, why);
    return;
  }
  struct buffer *to = to_cedanad();
  size_t begin = frame_begin(to, MESSAGE_EVENT_REFUSED);
  put_string(to, FIELD_ID, id);
  put_string(to, FIELD_EVENT_KEY, key);
  put_string(to, FIELD_MESSAGE, why);
  frame_end(to, begin);
}

static bool flush(void) {
  while (buffer_length(&out)) {
    ssize_t n = send(connection.fd, out.data + out.start, buffer_length(&out), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) {
      watch_events(&connection, EPOLLIN | EPOLLOUT);
      return true;
    }
    if (n < 0) return false;
    buffer_consume(&out, (size_t)n);
  }
  return true;
}

/* An encoded Response (1: Status {1: code, 2: message}) to the first event of the queue. */
static void answered(struct slice response) {
  struct slice status = {0}, text = {0};
  uint64_t code = 0;
  waiting = false;
  retry_ms = RETRY_MIN_MS;
  if (proto_field(response, 1, &status, NULL) && proto_field(status, 1, NULL, &code) && code != 0) {
    proto_field(status, 2, &text, NULL);
    int length = text.length > 500 ? 500 : (int)text.length;
    autofree char *why = format("status %llu: %.*s", (unsigned long long)code, length, text.data ? (const char *)text.data : "");
    refused(queue->id, queue->key, why);
  }
  drop_first();
}

static void ready(struct watch *watch, uint32_t events) {
  if ((events & EPOLLOUT) && !flush()) {
    again_later();
    return;
  }
  if ((events & EPOLLOUT) && !buffer_length(&out)) watch_events(watch, EPOLLIN);
  if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR))) return;
  if (buffer_reserve(&in, 1024) < 0) return;
  ssize_t n = recv(watch->fd, in.data + in.end, in.capacity - in.end, MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n <= 0) {
    if (queue) again_later();
    else disconnect();
    return;
  }
  in.end += (size_t)n;
  while (connection.fd >= 0 && buffer_length(&in) >= HEADER) {
    uint8_t *p = in.data + in.start;
    size_t length = (size_t)p[0] << 24 | (size_t)p[1] << 16 | (size_t)p[2] << 8 | p[3];
    if (length > 4 * MIB) {
      again_later();
      return;
    }
    if (buffer_length(&in) < HEADER + length) return;
    uint32_t of = (uint32_t)p[4] << 24 | (uint32_t)p[5] << 16 | (uint32_t)p[6] << 8 | p[7];
    bool ours = waiting && of == stream && p[8] == 2;
    if (ours) answered((struct slice){p + HEADER, length});
    buffer_consume(&in, HEADER + length);
    if (ours) send_next();
  }
}

static void send_next(void) {
  if (waiting) return;
  if (!queue) {
    timer_start(&retry, IDLE_MS, retry_due);
    return;
  }
  if (connection.fd < 0) {
    const char *path = keeper.ttrpc_address;
    if (starts_with(path, "unix://")) path += 7;
    int fd = connect_unix(path);
    if (fd < 0) {
      again_later();
      return;
    }
    connection = (struct watch){.fd = fd, .ready = ready};
    watch_events(&connection, EPOLLIN);
    stream = (uint32_t)-1;
  }
  stream += 2;
  uint8_t *f = queue->frame;
  f[4] = (uint8_t)(stream >> 24), f[5] = (uint8_t)(stream >> 16), f[6] = (uint8_t)(stream >> 8), f[7] = (uint8_t)stream;
  buffer_append(&out, f, queue->length);
  waiting = true;
  timer_start(&retry, ANSWER_MS, retry_due);
  if (!flush()) again_later();
}

/* Whether the key is new; it is taken then. */
static bool take_key(const char *id, const char *key) {
  struct container_keys *c = containers;
  while (c && strcmp(c->id, id)) c = c->next;
  if (!c) {
    c = allocate(sizeof *c);
    *c = (struct container_keys){.id = copy_string(id), .next = containers};
    containers = c;
  }
  uint64_t hash = fnv1a(key, strlen(key));
  for (unsigned i = 0; i < c->count; i++)
    if (c->hashes[i] == hash) return false;
  if (c->count == KEYS_MAX) {
    c->hashes[c->oldest] = hash;
    c->oldest = (c->oldest + 1) % KEYS_MAX;
    return true;
  }
  if (c->count == c->capacity) {
    c->capacity = c->capacity ? c->capacity * 2 : 8;
    c->hashes = reallocate(c->hashes, c->capacity * sizeof *c->hashes);
  }
  c->hashes[c->count++] = hash;
  return true;
}

void events_queue(const struct message *m) {
  const char *id = message_string(m, FIELD_ID), *key = message_string(m, FIELD_EVENT_KEY);
  const struct field *frame = message_field(m, FIELD_FRAME);
  if (!id || !key || !frame || frame->length < HEADER) {
    refused(id ? id : "", key ? key : "", "an event needs an id, a key and a frame");
    return;
  }
  if (!keeper.ttrpc_address || !*keeper.ttrpc_address) {
    refused(id, key, "containerd has given no address for events (TTRPC_ADDRESS)");
    return;
  }
  bool full = queued + frame->length > QUEUE_MAX;
  if (full != overflowing)
    daemon_log_line("events of %s/%s: %s", keeper.namespace, keeper.id,
                    full ? "containerd has not taken any for too long, further ones are dropped" : "containerd takes them again");
  overflowing = full;
  if (full) {
    refused(id, key, "too many events wait for containerd");
    return;
  }
  if (!take_key(id, key)) return;
  struct event *e = allocate(sizeof *e);
  *e = (struct event){copy_string(id), copy_string(key), memcpy(allocate(frame->length), frame->value, frame->length), frame->length, NULL};
  *queue_end = e;
  queue_end = &e->next;
  queued += e->length;
  if (!waiting && (connection.fd >= 0 || retry_ms == RETRY_MIN_MS)) send_next();
}

void events_forget(const char *id) {
  for (struct container_keys **at = &containers; *at; at = &(*at)->next) {
    struct container_keys *c = *at;
    if (strcmp(c->id, id)) continue;
    *at = c->next;
    free(c->id);
    free(c->hashes);
    free(c);
    return;
  }
}

bool events_idle(void) { return !queue; }
