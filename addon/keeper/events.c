/*
 * Events for containerd: TTRPC requests, made by cedanad, sent in order, one at a time, kept while containerd is away. A key
 * that was taken once for a container is not taken again: so an event is neither lost nor doubled when cedanad dies.
 */
#include "keeper.h"
#include <sys/socket.h>
#include <unistd.h>

#define QUEUE_MAX (1 * MIB)
#define RETRY_MIN_MS 100
#define RETRY_MAX_MS 2000
#define IDLE_MS 5000
#define ANSWER_MS 10000

struct event {
  char *id, *key;
  uint8_t *frame;
  size_t length;
  struct event *next;
};
struct key {
  char *id, *key;
  struct key *next;
};

static struct event *queue;
static struct key *keys;
static size_t queued;
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
  queued -= e->length;
  free(e->id);
  free(e->key);
  free(e->frame);
  free(e);
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

/* Status code of an encoded Response: field 1 (Status), field 1 in it. */
static unsigned status_code(const uint8_t *p, size_t length) {
  if (length < 3 || p[0] != 0x0a || p[1] < 2 || p[2] != 0x08) return 0;
  return p[3];
}

static void ready(struct watch *watch, uint32_t events) {
  if ((events & EPOLLOUT) && !flush()) {
    again_later();
    return;
  }
  if (events & EPOLLOUT) watch_events(watch, EPOLLIN);
  if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR))) return;
  buffer_reserve(&in, 1024);
  ssize_t n = recv(watch->fd, in.data + in.end, in.capacity - in.end, MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n <= 0) {
    if (queue) again_later();
    else disconnect();
    return;
  }
  in.end += (size_t)n;
  while (buffer_length(&in) >= 10) {
    uint8_t *p = in.data + in.start;
    size_t length = (size_t)p[0] << 24 | (size_t)p[1] << 16 | (size_t)p[2] << 8 | p[3];
    if (length > 4 * MIB) {
      again_later();
      return;
    }
    if (buffer_length(&in) < 10 + length) return;
    uint32_t of = (uint32_t)p[4] << 24 | (uint32_t)p[5] << 16 | (uint32_t)p[6] << 8 | p[7];
    unsigned code = status_code(p + 10, length);
    bool ours = of == stream && p[8] == 2;
    buffer_consume(&in, 10 + length);
    if (!ours || !waiting) continue;
    waiting = false;
    retry_ms = RETRY_MIN_MS;
    if (code && cedanad_ready()) {
      struct buffer *to = to_cedanad();
      size_t begin = frame_begin(to, MESSAGE_EVENT_REFUSED);
      put_string(to, FIELD_ID, queue->id);
      put_string(to, FIELD_EVENT_KEY, queue->key);
      autofree char *text = format("status %u", code);
      put_string(to, FIELD_MESSAGE, text);
      frame_end(to, begin);
    }
    drop_first();
    send_next();
    return;
  }
}

static void send_next(void) {
  if (waiting) return;
  if (!queue) {
    timer_start(&retry, IDLE_MS, retry_due);
    return;
  }
  if (connection.fd < 0) {
    const char *path = keeper.ttrpc_address ? keeper.ttrpc_address : "";
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

void events_queue(const struct message *m) {
  const char *id = message_string(m, FIELD_ID), *key = message_string(m, FIELD_EVENT_KEY);
  const struct field *frame = message_field(m, FIELD_FRAME);
  if (!id || !key || !frame || frame->length < 10 || !keeper.ttrpc_address) return;
  for (struct key *k = keys; k; k = k->next)
    if (!strcmp(k->key, key) && !strcmp(k->id, id)) return;
  if (queued + frame->length > QUEUE_MAX) return; /* containerd has been away for thousands of events */
  struct key *k = allocate(sizeof *k);
  *k = (struct key){copy_string(id), copy_string(key), keys};
  keys = k;
  struct event *e = allocate(sizeof *e), **at = &queue;
  *e = (struct event){copy_string(id), copy_string(key), memcpy(allocate(frame->length), frame->value, frame->length), frame->length, NULL};
  while (*at) at = &(*at)->next;
  *at = e;
  queued += e->length;
  if (!waiting && (connection.fd >= 0 || retry_ms == RETRY_MIN_MS)) send_next();
}

void events_forget(const char *id) {
  for (struct key **at = &keys; *at;) {
    struct key *k = *at;
    if (strcmp(k->id, id)) {
      at = &k->next;
      continue;
    }
    *at = k->next;
    free(k->id);
    free(k->key);
    free(k);
  }
}

bool events_idle(void) { return !queue; }
