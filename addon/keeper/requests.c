/*
 * The pod's TTRPC socket: connections of containerd, their frames, and what is remembered of each request until its
 * response has gone out. Nothing is decoded here but frame lengths, and what is needed to answer alone.
 */
#include "keeper.h"
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#define HEADER 10
#define MESSAGE_MAX (4 * MIB)
#define CONNECTIONS_MAX 1024
#define UNANSWERED_MAX (8 * MIB)      /* per connection; then it isn't read any more */
#define UNANSWERED_ALL_MAX (32 * MIB) /* all together */
#define OUT_MAX (16 * MIB)            /* a client that doesn't read its responses is cut off */

struct memory { /* what is known of one operation of a request */
  char *step;
  int type;
  uint8_t *frame; /* RESULT; NULL: under way */
  size_t length;
  struct memory *next;
};

struct request {
  int64_t id;
  struct connection *connection; /* NULL: closed */
  unsigned connection_id;
  uint32_t stream;
  unsigned deliveries;
  bool parked; /* accepted, and only waiting since */
  uint64_t at_ms;
  int64_t timeout_ms; /* 0: none */
  uint8_t *frame;
  size_t length;
  struct memory *memories;
  struct request *next;
};

struct connection {
  struct watch watch;
  unsigned id;
  struct buffer in, out;
  size_t unanswered, skip;
  bool stopped;
  struct connection *next;
};

static struct watch listener;
static struct connection *connections;
static unsigned connection_count, last_connection;
static struct request *requests;
static int64_t last_request;
static size_t unanswered_all;
static uint64_t last_ms, alone_since_ms;
static struct timer give_up;

static void answer_alone(struct request *r);
static void give_up_due(struct timer *timer);
static uint64_t patience_end(const struct request *r);

unsigned requests_open(void) {
  unsigned count = 0;
  for (struct request *r = requests; r; r = r->next) count++;
  return count;
}

uint64_t requests_last_ms(void) { return last_ms; }

static struct request *find(int64_t id) {
  for (struct request *r = requests; r; r = r->next)
    if (r->id == id) return r;
  return NULL;
}

static void update_interest(struct connection *c) {
  c->stopped = c->unanswered > UNANSWERED_MAX || unanswered_all > UNANSWERED_ALL_MAX;
  watch_events(&c->watch, (c->stopped ? 0 : EPOLLIN) | (buffer_length(&c->out) ? EPOLLOUT : 0));
}

static void connection_close(struct connection *c) {
  for (struct connection **at = &connections; *at; at = &(*at)->next)
    if (*at == c) {
      *at = c->next;
      break;
    }
  for (struct request *r = requests; r; r = r->next)
    if (r->connection == c) r->connection = NULL; /* finished all the same: half a Create helps nobody */
  connection_count--;
  watch_close(&c->watch);
  if (cedanad_ready()) {
    struct buffer *out = to_cedanad();
    size_t begin = frame_begin(out, MESSAGE_CONNECTION_CLOSED);
    put_int(out, FIELD_CONNECTION, c->id);
    frame_end(out, begin);
  }
  buffer_free(&c->in);
  buffer_free(&c->out);
  loop_free_later(c);
}

static bool connection_flush(struct connection *c) {
  while (buffer_length(&c->out)) {
    ssize_t n = send(c->watch.fd, c->out.data + c->out.start, buffer_length(&c->out), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) break;
    if (n < 0) return false;
    buffer_consume(&c->out, (size_t)n);
  }
  return buffer_length(&c->out) <= OUT_MAX;
}

static void deliver(struct request *r) {
  if (!cedanad_ready()) {
    answer_alone(r);
    return;
  }
  r->deliveries++;
  struct buffer *out = to_cedanad();
  size_t begin = frame_begin(out, MESSAGE_REQUEST);
  put_int(out, FIELD_REQUEST, r->id);
  put_int(out, FIELD_CONNECTION, r->connection_id);
  put_int(out, FIELD_DELIVERIES, r->deliveries);
  put_int(out, FIELD_AGE_MS, (int64_t)(now_ms() - r->at_ms));
  if (!r->connection) put_int(out, FIELD_CLOSED, 1);
  put_bytes(out, FIELD_FRAME, r->frame, r->length);
  frame_end(out, begin);
  expect_pong();
}

/* ---- protobuf, as much as is needed to answer alone ---- */

static bool varint(const uint8_t **at, const uint8_t *end, uint64_t *value) {
  *value = 0;
  for (unsigned shift = 0; shift < 64 && *at < end; shift += 7) {
    uint8_t byte = *(*at)++;
    *value |= (uint64_t)(byte & 0x7f) << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

struct slice {
  const uint8_t *data;
  size_t length;
};

/* Field `number` of a message: a length-delimited one into *slice, or a varint into *value. */
static bool proto_field(struct slice message, unsigned number, struct slice *slice, uint64_t *value) {
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
      case 1: at += end - at < 8 ? end - at : 8; break;
      case 5: at += end - at < 4 ? end - at : 4; break;
      default: return false;
    }
  }
  return found;
}

static bool slice_is(struct slice s, const char *text) { return s.length == strlen(text) && !memcmp(s.data, text, s.length); }

static void put_varint(struct buffer *b, uint64_t value) {
  uint8_t bytes[10];
  unsigned n = 0;
  do bytes[n++] = (uint8_t)((value & 0x7f) | (value > 0x7f ? 0x80 : 0));
  while (value >>= 7);
  buffer_append(b, bytes, n);
}

static void put_proto_int(struct buffer *b, unsigned field, uint64_t value) {
  put_varint(b, field << 3);
  put_varint(b, value);
}

static void put_proto_bytes(struct buffer *b, unsigned field, const void *data, size_t length) {
  put_varint(b, field << 3 | 2);
  put_varint(b, length);
  buffer_append(b, data, length);
}

/* ---- responses ---- */

static void request_free(struct request *r) {
  for (struct request **at = &requests; *at; at = &(*at)->next)
    if (*at == r) {
      *at = r->next;
      break;
    }
  unanswered_all -= r->length;
  if (r->connection) {
    bool was_stopped = r->connection->stopped;
    r->connection->unanswered -= r->length;
    if (was_stopped) update_interest(r->connection);
  }
  for (struct memory *m = r->memories, *next; m; m = next) {
    next = m->next;
    free(m->step);
    free(m->frame);
    free(m);
  }
  free(r->frame);
  free(r);
}

static void respond(struct request *r, const void *frame, size_t length) {
  struct connection *c = r->connection;
  request_free(r);
  if (!c || length == 0) return;
  bool idle = buffer_length(&c->out) == 0;
  buffer_append(&c->out, frame, length);
  if (!connection_flush(c)) connection_close(c);
  else if (!idle || buffer_length(&c->out)) update_interest(c);
}

static void respond_message(struct request *r, int code, const char *text, const struct buffer *payload) {
  struct buffer body = {0}, frame = {0};
  if (code) {
    struct buffer status = {0};
    put_proto_int(&status, 1, (uint64_t)code);
    put_proto_bytes(&status, 2, text, strlen(text));
    put_proto_bytes(&body, 1, status.data + status.start, buffer_length(&status));
    buffer_free(&status);
  } else {
    put_proto_bytes(&body, 2, payload->data + payload->start, buffer_length(payload));
  }
  size_t length = buffer_length(&body);
  uint8_t header[HEADER] = {
    (uint8_t)(length >> 24), (uint8_t)(length >> 16), (uint8_t)(length >> 8), (uint8_t)length,
    (uint8_t)(r->stream >> 24), (uint8_t)(r->stream >> 16), (uint8_t)(r->stream >> 8), (uint8_t)r->stream, 2, 0};
  buffer_append(&frame, header, sizeof header);
  buffer_append(&frame, body.data + body.start, length);
  respond(r, frame.data + frame.start, buffer_length(&frame));
  buffer_free(&body);
  buffer_free(&frame);
}

static uint64_t patience_ms(void) { return environment_number("CEDANA_KEEPER_PATIENCE_MS", 10000); }

/* While no cedanad is there: Connect and Pids at once, which decide whether containerd believes that we live. */
static void answer_alone(struct request *r) {
  struct slice body = {r->frame + HEADER, r->length - HEADER}, service, method, payload = {0}, id = {0};
  if (r->length > HEADER && r->frame[8] == 1 && proto_field(body, 1, &service, NULL) && proto_field(body, 2, &method, NULL) &&
      (slice_is(service, "containerd.task.v2.Task") || slice_is(service, "containerd.task.v3.Task")) &&
      (slice_is(method, "Connect") || slice_is(method, "Pids"))) {
    proto_field(body, 3, &payload, NULL);
    proto_field(payload, 1, &id, NULL);
    autofree char *name = allocate(id.length + 1);
    if (id.length) memcpy(name, id.data, id.length);
    struct task *task = task_find(name);
    struct buffer answer = {0};
    if (slice_is(method, "Connect")) {
      put_proto_int(&answer, 1, (uint64_t)getpid());
      if (task && task->pid) put_proto_int(&answer, 2, (uint64_t)task->pid);
      put_proto_bytes(&answer, 3, "cedana", 6);
      respond_message(r, 0, NULL, &answer);
    } else if (!task) {
      respond_message(r, 5, "task does not exist: container not created", NULL);
    } else {
      for (unsigned i = 0; i <= task->exec_count; i++) {
        int64_t pid = i == 0 ? task->pid : task->exec_pids[i - 1];
        if (!pid) continue;
        struct buffer info = {0};
        put_proto_int(&info, 1, (uint64_t)pid);
        put_proto_bytes(&answer, 1, info.data + info.start, buffer_length(&info));
        buffer_free(&info);
      }
      respond_message(r, 0, NULL, &answer);
    }
    buffer_free(&answer);
    return;
  }
  uint64_t now = now_ms();
  if (!r->parked && !give_up.armed) timer_start(&give_up, patience_end(r) > now ? patience_end(r) - now : 0, give_up_due);
}

/* When a request that cedanad must answer has waited long enough for one: counted from when there was none, or it came. */
static uint64_t patience_end(const struct request *r) {
  return (r->at_ms > alone_since_ms ? r->at_ms : alone_since_ms) + patience_ms();
}

static void give_up_due(struct timer *timer) {
  if (cedanad_ready()) return;
  uint64_t now = now_ms(), next = 0;
  autofree char *text = format("cedanad could not be reached within %llu ms: see %s/cedanad.log",
                               (unsigned long long)patience_ms(), run_directory());
  for (struct request *r = requests, *following; r; r = following) {
    following = r->next;
    /* A Wait goes on waiting: its container runs on. What has begun is finished by the next cedanad: half a Create helps nobody. */
    if (r->parked || r->memories) continue;
    if (patience_end(r) <= now) respond_message(r, 14, text, NULL);
    else if (!next || patience_end(r) < next) next = patience_end(r);
  }
  if (next) timer_start(timer, next - now, give_up_due);
}

/* ---- reading ---- */

static void frame_arrived(struct connection *c, const uint8_t *frame, size_t length) {
  struct request *r = allocate(sizeof *r);
  r->id = ++last_request;
  r->connection = c;
  r->connection_id = c->id;
  r->stream = (uint32_t)frame[4] << 24 | (uint32_t)frame[5] << 16 | (uint32_t)frame[6] << 8 | frame[7];
  r->at_ms = last_ms = now_ms();
  r->frame = allocate(length);
  memcpy(r->frame, frame, length);
  r->length = length;
  uint64_t timeout_ns = 0;
  if (length > HEADER && proto_field((struct slice){frame + HEADER, length - HEADER}, 4, NULL, &timeout_ns))
    r->timeout_ms = (int64_t)(timeout_ns / 1000000);
  struct request **at = &requests; /* in the order of arrival */
  while (*at) at = &(*at)->next;
  *at = r;
  c->unanswered += length;
  unanswered_all += length;
  deliver(r);
}

static bool parse(struct connection *c) {
  while (buffer_length(&c->in) && !c->stopped) {
    size_t have = buffer_length(&c->in);
    if (c->skip) {
      size_t n = c->skip < have ? c->skip : have;
      c->skip -= n;
      buffer_consume(&c->in, n);
      continue;
    }
    if (have < HEADER) return true;
    const uint8_t *p = c->in.data + c->in.start;
    size_t length = (size_t)p[0] << 24 | (size_t)p[1] << 16 | (size_t)p[2] << 8 | p[3];
    size_t whole = HEADER + length;
    if (length > MESSAGE_MAX) {
      c->skip = length;
      whole = HEADER; /* cedanad gets the header, and refuses it */
    } else if (have < whole) {
      return true;
    }
    unsigned id = c->id;
    autofree uint8_t *frame = allocate(whole);
    memcpy(frame, p, whole);
    buffer_consume(&c->in, whole);
    frame_arrived(c, frame, whole);
    /* Answering may have closed the connection. */
    struct connection *known = connections;
    while (known && known->id != id) known = known->next;
    if (!known) return false;
    if (c->unanswered > UNANSWERED_MAX || unanswered_all > UNANSWERED_ALL_MAX) update_interest(c);
  }
  return true;
}

static void connection_ready(struct watch *watch, uint32_t events) {
  struct connection *c = container_of(watch, struct connection, watch);
  if (events & EPOLLOUT) {
    if (!connection_flush(c)) {
      connection_close(c);
      return;
    }
    update_interest(c);
  }
  if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR))) return;
  if (buffer_reserve(&c->in, 4096) < 0) return;
  ssize_t n = recv(watch->fd, c->in.data + c->in.end, c->in.capacity - c->in.end, MSG_DONTWAIT);
  if (n < 0 && (errno == EINTR || errno == EAGAIN)) return;
  if (n <= 0) {
    connection_close(c);
    return;
  }
  c->in.end += (size_t)n;
  parse(c);
}

static void accept_ready(struct watch *watch, uint32_t events) {
  (void)events;
  int fd = accept4(watch->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) return;
  struct ucred peer;
  socklen_t size = sizeof peer;
  if (connection_count >= CONNECTIONS_MAX || getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0 ||
      (peer.uid != 0 && peer.uid != getuid())) {
    close(fd);
    return;
  }
  struct connection *c = allocate(sizeof *c);
  c->watch = (struct watch){.fd = fd, .ready = connection_ready};
  c->id = ++last_connection;
  c->next = connections;
  connections = c;
  connection_count++;
  watch_events(&c->watch, EPOLLIN);
}

void requests_listen(int fd) {
  listener = (struct watch){.fd = fd, .ready = accept_ready};
  fcntl(fd, F_SETFL, O_NONBLOCK);
  watch_events(&listener, EPOLLIN);
}

/* ---- cedanad's side ---- */

void requests_resend(void) {
  uint64_t now = now_ms();
  timer_stop(&give_up);
  for (struct request *r = requests, *next; r; r = next) {
    next = r->next;
    if (r->timeout_ms > 0 && r->at_ms + (uint64_t)r->timeout_ms < now) request_free(r);
    else deliver(r);
  }
}

void requests_response(const struct message *m) {
  struct request *r = find(message_int(m, FIELD_REQUEST));
  const struct field *frame = message_field(m, FIELD_FRAME);
  if (r) respond(r, frame ? frame->value : NULL, frame ? frame->length : 0);
}

void requests_parked(const struct message *m) {
  struct request *r = find(message_int(m, FIELD_REQUEST));
  if (!r) return;
  r->deliveries = 0;
  r->parked = true;
}

void requests_cedanad_gone(void) {
  alone_since_ms = now_ms();
  for (struct request *r = requests, *next; r; r = next) {
    next = r->next;
    answer_alone(r);
  }
}

bool requests_repeated(struct tag tag, int type) {
  struct request *r = find(tag.request);
  if (!r || !tag.step) return false;
  for (struct memory *m = r->memories; m; m = m->next)
    if (m->type == type && strcmp(m->step, tag.step) == 0) {
      if (m->frame && cedanad_ready()) buffer_append(to_cedanad(), m->frame, m->length);
      return true;
    }
  struct memory *m = allocate(sizeof *m);
  m->step = copy_string(tag.step);
  m->type = type;
  m->next = r->memories;
  r->memories = m;
  return false;
}

void requests_remember(struct tag tag, const void *frame, size_t length) {
  struct request *r = find(tag.request);
  if (!r || !tag.step) return;
  for (struct memory *m = r->memories; m; m = m->next)
    if (strcmp(m->step, tag.step) == 0) {
      free(m->frame);
      m->frame = memcpy(allocate(length), frame, length);
      m->length = length;
      return;
    }
}
