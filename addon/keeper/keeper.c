/*
 * The keeper of a pod: what must never be lost. Mechanism; every decision is cedanad's.
 *
 * Inherited: the listening TTRPC socket and a connection to cedanad, everything else has been closed. Signals: SIGCHLD by
 * signalfd, SIGPIPE ignored, SIGTERM and SIGINT only heard without a task. Exit codes: 0 when it leaves, 71 out of memory. When
 * cedanad dies: everything is kept, and the next one is told (PROTOCOL.md); when the keeper dies, containerd calls `delete`.
 */
#include "keeper.h"
#include "daemon.h"
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PONG_MS 1000           /* containerd gives State 2 s */
#define WELCOME_MS 10000
#define LONELY_MS 60000        /* no task, no request: nobody needs us */
#define LEAVE_MS 2000
#define EARLY_MS 5000          /* a cedanad that ends sooner wasn't well */
#define BACKOFF_MAX_MS 5000

struct keeper keeper;

static struct watch link_ = {.fd = -1};
static struct buffer in, out, nothing;
static bool welcomed, leaving;
static int version;
static pid_t daemon_pid;
static int64_t nonce, awaited;
static uint64_t daemon_since_ms, backoff_ms;
static struct task *tasks;
static struct timer reconnect, pong, lonely, leave;

static void link_lost(void);
static void link_try(struct timer *timer);

struct tag tag_of(const struct message *m) { return (struct tag){message_int(m, FIELD_REQUEST), message_string(m, FIELD_STEP)}; }
struct tag tag_copy(struct tag tag) { return (struct tag){tag.request, tag.step ? copy_string(tag.step) : NULL}; }
void tag_free(struct tag *tag) { free((char *)tag->step); }

bool cedanad_ready(void) { return welcomed; }

struct buffer *to_cedanad(void) {
  if (welcomed) return &out;
  buffer_free(&nothing); /* written for nobody */
  return &nothing;
}

size_t result_begin(struct buffer *to, struct tag tag, int error, const char *message) {
  size_t begin = frame_begin(to, MESSAGE_RESULT);
  put_int(to, FIELD_REQUEST, tag.request);
  put_string(to, FIELD_STEP, tag.step);
  put_int(to, FIELD_ERRNO, error);
  put_string(to, FIELD_MESSAGE, message);
  return begin;
}

void result_end(struct tag tag, struct buffer *frame, size_t begin) {
  frame_end(frame, begin);
  requests_remember(tag, frame->data + frame->start, buffer_length(frame));
  if (welcomed) buffer_append(&out, frame->data + frame->start, buffer_length(frame));
  buffer_free(frame);
}

void result_send(struct tag tag, int error, const char *message) {
  struct buffer frame = {0};
  size_t begin = result_begin(&frame, tag, error, message);
  result_end(tag, &frame, begin);
}

/* ---- tasks ---- */

struct task *task_find(const char *id) {
  for (struct task *t = tasks; id && t; t = t->next)
    if (!strcmp(t->id, id)) return t;
  return NULL;
}

bool keeper_has_task(void) { return tasks; }

static void task_set(const struct message *m) {
  const char *id = message_string(m, FIELD_ID), *bundle = message_string(m, FIELD_BUNDLE);
  if (!id) return;
  struct task *t = task_find(id);
  if (!t) {
    t = allocate(sizeof *t);
    t->id = copy_string(id);
    t->oom.fd = -1;
    t->next = tasks;
    tasks = t;
  }
  free(t->bundle);
  t->bundle = copy_string(bundle ? bundle : "");
  t->pid = message_int(m, FIELD_PID);
  t->exec_count = 0;
  for (unsigned i = 0; i < m->count; i++) t->exec_count += m->fields[i].key == FIELD_EXEC_PID;
  free(t->exec_pids);
  t->exec_pids = allocate(t->exec_count * sizeof *t->exec_pids);
  for (unsigned i = 0, n = 0; i < m->count; i++)
    if (m->fields[i].key == FIELD_EXEC_PID && m->fields[i].length == 8) memcpy(&t->exec_pids[n++], m->fields[i].value, 8);
}

static void lonely_due(struct timer *timer) {
  if (!tasks && requests_open() == 0 && now_ms() - requests_last_ms() >= LONELY_MS) {
    unlink(keeper.socket_path);
    _exit(0);
  }
  timer_start(timer, LONELY_MS, lonely_due);
}

static void task_gone(const char *id) {
  for (struct task **at = &tasks; id && *at; at = &(*at)->next) {
    struct task *t = *at;
    if (strcmp(t->id, id)) continue;
    *at = t->next;
    watch_close(&t->oom);
    if (t->event_fd > 0) close(t->event_fd);
    free(t->id);
    free(t->bundle);
    free(t->exec_pids);
    loop_free_later(t);
    break;
  }
  if (id) events_forget(id);
}

static void oom_ready(struct watch *watch, uint32_t events) {
  struct task *t = container_of(watch, struct task, oom);
  char data[4096];
  (void)events;
  while (read(watch->fd, data, sizeof data) > 0) continue;
  if (!welcomed) return; /* the counters tell the next cedanad */
  size_t begin = frame_begin(&out, MESSAGE_OOM);
  put_string(&out, FIELD_ID, t->id);
  frame_end(&out, begin);
}

/*
 * Version 2 of cgroups: inotify on memory.events. Version 1: an eventfd registered by a line in cgroup.event_control, whose
 * notification begins with the memory.oom_control that must stay open.
 */
void oom_watch(const struct message *m) {
  struct tag tag = tag_of(m);
  const char *id = message_string(m, FIELD_ID), *path = message_string(m, FIELD_PATH);
  struct task *t = task_find(id);
  if (!id || !path) {
    result_send(tag, EINVAL, "watch without id or path");
    return;
  }
  if (!t) { /* cedanad tells of the task when Create is done */
    t = allocate(sizeof *t);
    t->id = copy_string(id);
    t->bundle = copy_string("");
    t->oom.fd = -1;
    t->next = tasks;
    tasks = t;
  }
  watch_close(&t->oom);
  int fd = -1, error = 0;
  if (message_int(m, FIELD_FLAGS) == 2) {
    autofree char *file = format("%s/memory.events", path);
    fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    if (fd >= 0 && inotify_add_watch(fd, file, IN_MODIFY) < 0) error = errno;
  } else {
    autofree char *control = format("%s/memory.oom_control", path);
    autofree char *registry = format("%s/cgroup.event_control", path);
    fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int oom = open(control, O_RDONLY | O_CLOEXEC);
    if (oom < 0) error = errno;
    autofree char *line = format("%d %d", fd, oom);
    int result = error ? 0 : write_existing(registry, line);
    if (result < 0) error = -result;
    if (t->event_fd > 0) close(t->event_fd);
    t->event_fd = oom;
  }
  if (fd < 0) error = errno;
  if (error) {
    if (fd >= 0) close(fd);
    autofree char *why = format("watch %s: %s", path, strerror(error));
    result_send(tag, error, why);
    return;
  }
  t->oom = (struct watch){.fd = fd, .ready = oom_ready};
  watch_events(&t->oom, EPOLLIN);
  result_send(tag, 0, NULL);
}

/* ---- leaving ---- */

static void leave_due(struct timer *timer) {
  (void)timer;
  unlink(keeper.socket_path);
  _exit(0);
}

static void leave_if_done(void) {
  if (leaving && events_idle() && requests_open() == 0) leave_due(NULL);
}

/* ---- what cedanad says ---- */

static void operate(const struct message *m) {
  if (requests_repeated(tag_of(m), m->type)) return;
  char *why = NULL;
  int result;
  switch (m->type) {
    case MESSAGE_SPAWN: children_spawn(m); return;
    case MESSAGE_SIGNAL: children_signal(m); return;
    case MESSAGE_MOUNT: result = mount_make(m, &why); break;
    case MESSAGE_UNMOUNT: result = unmount_below(message_string(m, FIELD_TARGET), &why); break;
    case MESSAGE_IO_OPEN: io_open(m); return;
    case MESSAGE_IO_RESIZE: io_resize(m); return;
    case MESSAGE_IO_CLOSE_STDIN: io_close_stdin(m); return;
    case MESSAGE_IO_DRAIN: io_drain(m); return;
    case MESSAGE_IO_FREE: io_free(m); return;
    default: oom_watch(m); return;
  }
  result_send(tag_of(m), -result, why ? why : result ? strerror(-result) : NULL);
  free(why);
}

static void tell_everything(void) {
  for (struct task *t = tasks; t; t = t->next) {
    size_t begin = frame_begin(&out, MESSAGE_TASK);
    put_string(&out, FIELD_ID, t->id);
    put_string(&out, FIELD_BUNDLE, t->bundle);
    put_int(&out, FIELD_PID, t->pid);
    for (unsigned i = 0; i < t->exec_count; i++) put_int(&out, FIELD_EXEC_PID, t->exec_pids[i]);
    frame_end(&out, begin);
  }
  children_resend_exits();
  requests_resend();
  size_t begin = frame_begin(&out, MESSAGE_END);
  frame_end(&out, begin);
}

static void welcome(const struct message *m) {
  if (message_int(m, FIELD_ERRNO)) {
    daemon_log_line("cedanad refuses this keeper: %s", message_string(m, FIELD_MESSAGE));
    link_lost();
    return;
  }
  version = (int)message_int(m, FIELD_VERSION);
  daemon_pid = (pid_t)message_int(m, FIELD_PID);
  welcomed = true;
  awaited = 0;
  timer_stop(&pong);
  tell_everything();
}

static void handle(const struct message *m) {
  switch (m->type) {
    case MESSAGE_WELCOME: welcome(m); return;
    case MESSAGE_TASK: task_set(m); return;
    case MESSAGE_TASK_GONE: task_gone(message_string(m, FIELD_ID)); return;
    case MESSAGE_RESPONSE: requests_response(m); return;
    case MESSAGE_PARKED: requests_parked(m); return;
    case MESSAGE_PONG:
      if (message_int(m, FIELD_NONCE) != awaited) return;
      awaited = 0;
      timer_stop(&pong);
      return;
    case MESSAGE_ACK: children_ack(message_int(m, FIELD_SEQUENCE)); return;
    case MESSAGE_EVENT: events_queue(m); return;
    case MESSAGE_LEAVE:
      leaving = true;
      timer_start(&leave, LEAVE_MS, leave_due);
      return;
    case MESSAGE_SPAWN ... MESSAGE_IO_FREE: operate(m); return;
    case MESSAGE_WATCH_OOM:
      if (KEEPER_VERSION_MAX >= 2) operate(m);
      return;
    default: return; /* newer than us */
  }
}

/* ---- the lifeline ---- */

/* A cedanad that hangs is worse than a dead one: containerd gives up after 2 s. */
static void pong_due(struct timer *timer) {
  (void)timer;
  if (link_.fd < 0) return;
  char byte;
  if (welcomed && recv(link_.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) > 0) { /* it has answered; we were slow */
    timer_start(&pong, PONG_MS, pong_due);
    return;
  }
  pid_t pid = daemon_pid ? daemon_pid : daemon_lock_holder();
  int pidfd = pid > 1 ? (int)syscall(SYS_pidfd_open, pid, 0) : -1;
  /* The pid is that of whoever holds the lock still: opened first, so that it can't be another's by now. */
  if (pidfd >= 0 && daemon_lock_holder() == pid) {
    daemon_log_line("cedanad (pid %d) has not answered for %d ms: killed", (int)pid, welcomed ? PONG_MS : WELCOME_MS);
    syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0);
  }
  if (pidfd >= 0) close(pidfd);
  link_lost();
}

void expect_pong(void) {
  if (awaited || !welcomed) return;
  awaited = ++nonce;
  size_t begin = frame_begin(&out, MESSAGE_PING);
  put_int(&out, FIELD_NONCE, awaited);
  frame_end(&out, begin);
  timer_start(&pong, PONG_MS, pong_due);
}

void keeper_flush(void) {
  if (link_.fd < 0) return;
  while (buffer_length(&out)) {
    ssize_t n = send(link_.fd, out.data + out.start, buffer_length(&out), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) break;
    if (n < 0) {
      link_lost();
      return;
    }
    buffer_consume(&out, (size_t)n);
  }
  watch_events(&link_, EPOLLIN | (buffer_length(&out) ? EPOLLOUT : 0));
}

static void link_ready(struct watch *watch, uint32_t events) {
  if (!(events & (EPOLLIN | EPOLLHUP | EPOLLERR))) return; /* EPOLLOUT: flushed before the next round */
  if (buffer_reserve(&in, 16 * KIB) < 0) return;
  ssize_t n = recv(watch->fd, in.data + in.end, in.capacity - in.end, MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n <= 0) {
    link_lost();
    return;
  }
  in.end += (size_t)n;
  while (link_.fd >= 0) {
    ssize_t complete = frame_complete(&in);
    if (complete == 0) break;
    struct message m;
    int result = complete < 0 ? (int)complete : message_decode(&in, &m);
    if (result < 0) {
      daemon_log_line("unreadable frame from cedanad: %s", strerror(-result));
      link_lost();
      return;
    }
    handle(&m);
    if (link_.fd >= 0) message_free(&in, &m);
  }
}

static void link_up(int fd) {
  link_ = (struct watch){.fd = fd, .ready = link_ready};
  watch_events(&link_, EPOLLIN);
  daemon_since_ms = now_ms();
  daemon_pid = 0;
  size_t begin = frame_begin(&out, MESSAGE_HELLO);
  put_int(&out, FIELD_VERSION_MIN, PROTOCOL_MIN);
  put_int(&out, FIELD_VERSION_MAX, KEEPER_VERSION_MAX);
  put_int(&out, FIELD_PID, getpid());
  put_int(&out, FIELD_MOUNT_NS, (int64_t)mount_namespace("/proc/self/ns/mnt"));
  put_string(&out, FIELD_NAMESPACE, keeper.namespace);
  put_string(&out, FIELD_ID, keeper.id);
  put_string(&out, FIELD_BUNDLE, keeper.bundle);
  put_string(&out, FIELD_CONTAINERD_ADDRESS, keeper.address);
  put_string(&out, FIELD_TTRPC_ADDRESS, keeper.ttrpc_address);
  put_string(&out, FIELD_PUBLISH_BINARY, keeper.publish_binary);
  put_string(&out, FIELD_SOCKET_PATH, keeper.socket_path);
  put_string(&out, FIELD_BUILD, BUILD_VERSION);
  frame_end(&out, begin);
  timer_start(&pong, WELCOME_MS, pong_due);
}

static void link_lost(void) {
  if (link_.fd < 0) return;
  watch_close(&link_);
  buffer_free(&in);
  buffer_free(&out);
  bool early = now_ms() - daemon_since_ms < EARLY_MS && !welcomed;
  welcomed = false;
  awaited = 0;
  timer_stop(&pong);
  if (leaving) leave_due(NULL); /* nobody is left to tell us more */
  backoff_ms = !early ? 0 : backoff_ms == 0 ? 100 : backoff_ms * 2 > BACKOFF_MAX_MS ? BACKOFF_MAX_MS : backoff_ms * 2;
  requests_cedanad_gone();
  timer_start(&reconnect, backoff_ms, link_try);
}

static void link_try(struct timer *timer) {
  static uint64_t pause_ms;
  int fd = daemon_connect();
  if (fd == -ENOENT || fd == -ECONNREFUSED) {
    pid_t pid;
    fd = daemon_start(&pid);
    if (pid > 0) fd = daemon_connect();
  }
  if (fd >= 0) {
    pause_ms = 0;
    link_up(fd);
    return;
  }
  bool soon = fd == -EBUSY || fd == -EAGAIN || fd == -ECONNREFUSED || fd == -ENOENT;
  pause_ms = !soon ? 1000 : pause_ms == 0 ? 2 : pause_ms * 2 > 50 ? 50 : pause_ms * 2;
  timer_start(timer, pause_ms, link_try);
}

static void before_round(void) {
  keeper_flush();
  leave_if_done();
}

_Noreturn void keeper_run(int cedanad) {
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  signal(SIGPIPE, SIG_IGN);
  signal(SIGTERM, SIG_IGN);
  signal(SIGINT, SIG_IGN);
  daemon_as_sibling = true;
  if (loop_open() < 0) _exit(71);
  children_init();
  requests_listen(keeper.listening);
  timer_start(&lonely, LONELY_MS, lonely_due);
  link_up(cedanad);
  for (;;) loop_round(before_round);
}
