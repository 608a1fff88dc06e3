/*
 * The pod's TTRPC socket: connections of containerd, their frames, and what is remembered of each request until its
 * response has gone out. Nothing is decoded here but frame lengths, and what is needed to answer alone.
 */
#include "keeper.h"
#include "daemon.h"
#include "protobuf.h"
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#define HEADER 10
#define MESSAGE_MAX (4 * MIB)
#define CONNECTIONS_MAX 1024
#define UNANSWERED_MAX (8 * MIB)      /* per connection; then it isn't read any more */
#define UNANSWERED_ALL_MAX (32 * MIB) /* all together */
#define UNREAD_MAX (1 * MIB)          /* responses that a client hasn't read; then it isn't read either */
#define OUT_MAX (16 * MIB)            /* one that still doesn't read them is cut off */
#define PARTIAL_ALL_MAX (64 * MIB)    /* of frames that haven't come whole */
#define ACCEPT_AGAIN_MS 100           /* after the kernel had no fd or memory for a connection */
#define UNDER_WAY_PATIENCE 6          /* times the usual one, for a request whose operations have begun */

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
  unsigned deliveries, taken;
  bool parked; /* accepted, and only waiting since */
  uint64_t at_ms;
  int64_t timeout_ms; /* 0: none */
  uint8_t *frame;
  size_t length;
  struct memory *memories;
};

struct connection {
  struct watch watch;
  unsigned id;
  struct buffer in, out;
  size_t unanswered, skip;
  bool stopped;
  struct connection *next;
};

static struct watch listener = {.fd = -1};
static struct connection *connections;
static unsigned connection_count, last_connection;
/* By their numbers, which is the order of arrival. Waits can be thousands. */
static struct request **open_requests;
static size_t open_count, open_capacity;
static int64_t last_request;
static size_t unanswered_all;
static bool resumable; /* a connection that was stopped may be read again */
static uint64_t last_ms, alone_since_ms;
static struct timer give_up, accept_again;

static void answer_alone(struct request *r);
static void give_up_due(struct timer *timer);
static uint64_t patience_end(const struct request *r);

unsigned requests_open(void) { return (unsigned)open_count; }

bool requests_flushed(void) {
  for (struct connection *c = connections; c; c = c->next)
    if (buffer_length(&c->out)) return false;
  return true;
}

uint64_t requests_last_ms(void) { return last_ms; }

/* Where the request of this number is, or would be. */
static size_t place_of(int64_t id) {
  size_t low = 0, high = open_count;
  while (low < high) {
    size_t middle = low + (high - low) / 2;
    if (open_requests[middle]->id < id) low = middle + 1;
    else high = middle;
  }
  return low;
}

static struct request *find(int64_t id) {
  size_t at = place_of(id);
  return at < open_count && open_requests[at]->id == id ? open_requests[at] : NULL;
}

uint64_t requests_oldest_working_ms(void) {
  for (size_t i = 0; i < open_count; i++)
    if (!open_requests[i]->parked) return open_requests[i]->at_ms;
  return UINT64_MAX;
}

static bool must_stop(const struct connection *c) {
  return c->unanswered > UNANSWERED_MAX || unanswered_all > UNANSWERED_ALL_MAX || buffer_length(&c->out) > UNREAD_MAX;
}

static void update_interest(struct connection *c) {
  bool was_stopped = c->stopped;
  c->stopped = must_stop(c);
  if (was_stopped && !c->stopped) resumable = true; /* whole frames may lie in its buffer: requests_resume */
  watch_events(&c->watch, (c->stopped ? 0 : EPOLLIN) | (buffer_length(&c->out) ? EPOLLOUT : 0));
}

static void connection_close(struct connection *c) {
  for (struct connection **at = &connections; *at; at = &(*at)->next)
    if (*at == c) {
      *at = c->next;
      break;
    }
  for (size_t i = 0; i < open_count; i++) /* finished all the same: half a Create helps nobody */
    if (open_requests[i]->connection == c) open_requests[i]->connection = NULL;
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
  put_int(out, FIELD_TAKEN, r->taken);
  put_int(out, FIELD_AGE_MS, (int64_t)(now_ms() - r->at_ms));
  if (!r->connection) put_int(out, FIELD_CLOSED, 1);
  put_bytes(out, FIELD_FRAME, r->frame, r->length);
  frame_end(out, begin);
  expect_pong();
}

/* ---- responses ---- */

static void request_free(struct request *r) {
  size_t at = place_of(r->id);
  memmove(open_requests + at, open_requests + at + 1, (--open_count - at) * sizeof *open_requests);
  bool all_stopped = unanswered_all > UNANSWERED_ALL_MAX;
  unanswered_all -= r->length;
  if (r->connection) {
    r->connection->unanswered -= r->length;
    if (r->connection->stopped) update_interest(r->connection);
  }
  if (all_stopped && unanswered_all <= UNANSWERED_ALL_MAX)
    for (struct connection *c = connections; c; c = c->next)
      if (c->stopped) update_interest(c);
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
  buffer_append(&c->out, frame, length);
  if (!connection_flush(c)) connection_close(c);
  else update_interest(c);
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
  if (r->parked) return;
  uint64_t now = now_ms(), end = patience_end(r);
  if (!give_up.armed || end < give_up.at_ms) timer_start(&give_up, end > now ? end - now : 0, give_up_due);
}

/*
 * When a request has waited long enough for a cedanad: counted from when there was none, or it came. One whose operations have
 * begun waits longer, because half a Create helps nobody; but not for ever, or its caller would.
 */
static uint64_t patience_end(const struct request *r) {
  return (r->at_ms > alone_since_ms ? r->at_ms : alone_since_ms) + daemon_patience_ms() * (r->memories ? UNDER_WAY_PATIENCE : 1);
}

static void give_up_due(struct timer *timer) {
  if (cedanad_ready()) return;
  uint64_t now = now_ms(), next = UINT64_MAX;
  for (size_t i = 0; i < open_count;) {
    struct request *r = open_requests[i];
    uint64_t end = patience_end(r);
    if (!r->parked && end <= now) { /* a Wait goes on waiting: its container runs on */
      autofree char *text = format("cedanad could not be reached within %llu ms: see %s",
                                   (unsigned long long)(now - (r->at_ms > alone_since_ms ? r->at_ms : alone_since_ms)), daemon_log());
      respond_message(r, 14, text, NULL);
      continue;
    }
    if (!r->parked && end < next) next = end;
    i++;
  }
  if (next != UINT64_MAX) timer_start(timer, next - now, give_up_due);
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
  if (open_count == open_capacity)
    open_requests = reallocate(open_requests, (open_capacity = open_capacity * 2 + 8) * sizeof *open_requests);
  open_requests[open_count++] = r;
  c->unanswered += length;
  unanswered_all += length;
  deliver(r);
}

/* The whole frames of what has come, until there are too many. */
static void parse(struct connection *c) {
  while (c->watch.fd >= 0 && !c->stopped) { /* answering may close the connection */
    size_t have = buffer_length(&c->in);
    if (c->skip && have) {
      size_t n = c->skip < have ? c->skip : have;
      c->skip -= n;
      buffer_consume(&c->in, n);
      continue;
    }
    if (have < HEADER) return;
    const uint8_t *p = c->in.data + c->in.start;
    size_t length = (size_t)p[0] << 24 | (size_t)p[1] << 16 | (size_t)p[2] << 8 | p[3];
    size_t whole = HEADER + length;
    if (length > MESSAGE_MAX) {
      c->skip = length;
      whole = HEADER; /* cedanad gets the header, and refuses it */
    } else if (have < whole) {
      return;
    }
    frame_arrived(c, p, whole);
    if (c->watch.fd < 0) return;
    buffer_consume(&c->in, whole);
    if (must_stop(c)) update_interest(c);
  }
}

void requests_resume(void) {
  while (resumable) {
    resumable = false;
    for (struct connection *c = connections, *next; c; c = next) {
      next = c->next; /* parsing closes no other connection than its own */
      if (!c->stopped) parse(c);
    }
  }
}

/* Half frames of many connections: whoever makes it too much goes. */
static bool too_much_partial(const struct connection *own) {
  size_t all = 0;
  if (buffer_length(&own->in) < 64 * KIB) return false;
  for (struct connection *c = connections; c; c = c->next) all += buffer_length(&c->in);
  return all > PARTIAL_ALL_MAX;
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
  if (c->watch.fd >= 0 && too_much_partial(c)) {
    daemon_log_line("%s: too many unfinished requests: a connection is closed", keeper.socket_path);
    connection_close(c);
  }
}

static void accept_again_due(struct timer *timer) {
  (void)timer;
  if (listener.fd >= 0) watch_events(&listener, EPOLLIN);
}

static void accept_ready(struct watch *watch, uint32_t events) {
  (void)events;
  int fd = accept4(watch->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) {
    if (errno != EMFILE && errno != ENFILE && errno != ENOMEM && errno != ENOBUFS) return;
    watch_events(watch, 0); /* it stays ready: without a pause we would spin */
    timer_start(&accept_again, ACCEPT_AGAIN_MS, accept_again_due);
    return;
  }
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

void requests_unlisten(void) {
  timer_stop(&accept_again);
  watch_close(&listener);
  unlink(keeper.socket_path);
}

/* ---- cedanad's side ---- */

void requests_resend(void) {
  uint64_t now = now_ms();
  timer_stop(&give_up);
  for (size_t i = 0; i < open_count;) {
    struct request *r = open_requests[i];
    if (r->timeout_ms > 0 && r->at_ms + (uint64_t)r->timeout_ms < now) {
      request_free(r); /* its caller has given up */
      continue;
    }
    deliver(r);
    i++;
  }
}

void requests_response(const struct message *m) {
  struct request *r = find(message_int(m, FIELD_REQUEST));
  const struct field *frame = message_field(m, FIELD_FRAME);
  if (r) respond(r, frame ? frame->value : NULL, frame ? frame->length : 0);
}

void requests_taken(const struct message *m) {
  struct request *r = find(message_int(m, FIELD_REQUEST));
  if (r && r->taken < r->deliveries) r->taken++; /* once for each, whatever is said */
}

void requests_parked(const struct message *m) {
  struct request *r = find(message_int(m, FIELD_REQUEST));
  if (!r) return;
  r->deliveries = r->taken = 0;
  r->parked = true;
}

void requests_cedanad_gone(void) {
  alone_since_ms = now_ms();
  for (size_t i = 0; i < open_count;) {
    int64_t id = open_requests[i]->id;
    answer_alone(open_requests[i]);
    if (i < open_count && open_requests[i]->id == id) i++;
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
    if (!m->frame && strcmp(m->step, tag.step) == 0) {
      m->frame = memcpy(allocate(length), frame, length);
      m->length = length;
      return;
    }
}
