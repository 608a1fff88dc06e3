/*
 * The keeper of a pod: what must never be lost. Mechanism; every decision is cedanad's.
 *
 * Inherited: the listening TTRPC socket and a connection to cedanad, everything else has been closed. Signals: SIGCHLD by
 * signalfd; SIGPIPE, SIGXFSZ, SIGTERM and SIGINT are ignored. Exit codes: 0 when it leaves, 71 out of memory. When cedanad dies: everything is kept, and the next one is told (PROTOCOL.md); when the keeper dies, containerd calls `delete`.
 */
#include "keeper.h"
#include "daemon.h"
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PONG_MS 1000           /* containerd gives State 2 s; CEDANA_KEEPER_PONG_MS for tests */
#define LONELY_MS 60000        /* no task, no request: nobody needs us */
#define LEAVE_MS 2000
#define EARLY_MS 5000          /* a cedanad that ends sooner, without a welcome, wasn't well */
#define QUICK_MS 1000          /* one that ends so soon after it, maybe because of what we told it; CEDANA_KEEPER_QUICK_MS for tests */
#define BACKOFF_MIN_MS 100
#define BACKOFF_MAX_MS 5000    /* without a welcome */
#define BACKOFF_QUICK_MAX_MS 1000 /* with one: others may need it, and so may our callers (State: 2 s) */

struct keeper keeper;

static struct watch link_ = {.fd = -1};
static struct buffer in, out, nothing;
static bool welcomed, leaving;
static pid_t daemon_pid;
static int daemon_pidfd = -1;
static int64_t nonce, awaited;
static uint64_t link_since_ms, pong_since_ms, backoff_ms;
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

/* One whose Create has failed has no bundle here: it doesn't keep us. */
static bool has_task(void) {
  for (struct task *t = tasks; t; t = t->next)
    if (t->bundle[0]) return true;
  return false;
}

bool keeper_has_pid(pid_t pid) {
  for (struct task *t = tasks; t; t = t->next) {
    if (t->pid == pid) return true;
    for (unsigned i = 0; i < t->exec_count; i++)
      if (t->exec_pids[i] == pid) return true;
  }
  return false;
}

static struct task *task_make(const char *id) {
  struct task *t = allocate(sizeof *t);
  *t = (struct task){.id = copy_string(id), .bundle = copy_string(""), .oom = {.fd = -1}, .event_fd = -1, .next = tasks};
  tasks = t;
  return t;
}

static void task_set(const struct message *m) {
  const char *id = message_string(m, FIELD_ID), *bundle = message_string(m, FIELD_BUNDLE);
  if (!id) return;
  struct task *t = task_find(id);
  if (!t) t = task_make(id);
  free(t->bundle);
  t->bundle = copy_string(bundle ? bundle : "");
  t->pid = message_int(m, FIELD_PID);
  unsigned count = 0;
  for (unsigned i = 0; i < m->count; i++) count += m->fields[i].key == FIELD_EXEC_PID;
  t->exec_pids = reallocate(t->exec_pids, count * sizeof *t->exec_pids);
  t->exec_count = 0;
  for (unsigned i = 0; i < m->count; i++)
    if (m->fields[i].key == FIELD_EXEC_PID) t->exec_pids[t->exec_count++] = field_int(&m->fields[i]);
}

static uint64_t lonely_ms(void) { return environment_number("CEDANA_KEEPER_LONELY_MS", LONELY_MS); }

static _Noreturn void leave_now(void) {
  io_leave();
  exit(0);
}

static void lonely_due(struct timer *timer) {
  uint64_t idle = now_ms() - requests_last_ms(), limit = lonely_ms();
  if (!has_task() && requests_open() == 0 && idle >= limit) {
    requests_unlisten();
    leave_now();
  }
  timer_start(timer, idle < limit ? limit - idle : limit, lonely_due);
}

static void task_gone(const char *id) {
  for (struct task **at = &tasks; id && *at; at = &(*at)->next) {
    struct task *t = *at;
    if (strcmp(t->id, id)) continue;
    *at = t->next;
    watch_close(&t->oom);
    timer_stop(&t->oom_pause);
    close_fd(&t->event_fd);
    free(t->oom_file);
    free(t->id);
    free(t->bundle);
    free(t->exec_pids);
    loop_free_later(t);
    break;
  }
  if (id) events_forget(id);
}

/* A container at its limit makes the kernel note something up to a hundred times a second, and may lose a process as often. */
#define OOM_PAUSE_MS 100

/* Of memory.events; the last that was read where it can't be. */
static int64_t oom_kills(const struct task *t) {
  autofree char *text = NULL;
  if (read_file(t->oom_file, 4096, &text, NULL) < 0) return t->oom_kills;
  char *line = strstr(text, "oom_kill ");
  return line ? (int64_t)strtoll(line + strlen("oom_kill "), NULL, 10) : 0;
}

static void oom_due(struct timer *timer);

static void oom_tell(struct task *t) {
  t->oom_pending = false;
  if (!welcomed) return; /* the counters tell the next cedanad */
  if (t->oom_file) { /* reclaim is noted there, too */
    int64_t count = oom_kills(t);
    if (count == t->oom_kills) return;
    t->oom_kills = count;
  }
  size_t begin = frame_begin(&out, MESSAGE_OOM);
  put_string(&out, FIELD_ID, t->id);
  frame_end(&out, begin);
  timer_start(&t->oom_pause, OOM_PAUSE_MS, oom_due);
}

static void oom_due(struct timer *timer) {
  struct task *t = container_of(timer, struct task, oom_pause);
  if (t->oom_pending) oom_tell(t);
}

static void oom_ready(struct watch *watch, uint32_t events) {
  struct task *t = container_of(watch, struct task, oom);
  char data[4096];
  (void)events;
  while (read(watch->fd, data, sizeof data) > 0) continue;
  if (t->oom_pause.armed) t->oom_pending = true;
  else oom_tell(t);
}

/*
 * Version 2 of cgroups: inotify on memory.events, which is read then: only kills are told. Version 1: an eventfd registered by a line in
 * cgroup.event_control, which begins with its number and that of memory.oom_control, which must stay open.
 */
void oom_watch(const struct message *m) {
  struct tag tag = tag_of(m);
  const char *id = message_string(m, FIELD_ID), *path = message_string(m, FIELD_PATH);
  struct task *t = task_find(id);
  if (!id || !path) {
    result_send(tag, EINVAL, "watch without id or path");
    return;
  }
  if (!t) t = task_make(id); /* cedanad tells of the task when Create is done */
  watch_close(&t->oom);
  timer_stop(&t->oom_pause);
  close_fd(&t->event_fd);
  free(t->oom_file);
  t->oom_file = NULL;
  bool version2 = message_int(m, FIELD_FLAGS) == 2;
  int error = 0;
  autofd fd = version2 ? inotify_init1(IN_CLOEXEC | IN_NONBLOCK) : eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) {
    error = errno;
  } else if (version2) {
    autofree char *file = format("%s/memory.events", path);
    if (inotify_add_watch(fd, file, IN_MODIFY) < 0) error = errno;
    t->oom_file = error ? NULL : file;
    if (!error) file = NULL;
  } else {
    autofree char *control = format("%s/memory.oom_control", path);
    autofree char *registry = format("%s/cgroup.event_control", path);
    t->event_fd = open(control, O_RDONLY | O_CLOEXEC);
    if (t->event_fd < 0) error = errno;
    autofree char *line = format("%d %d", fd, t->event_fd);
    if (!error) error = -write_existing(registry, line);
  }
  if (error) {
    close_fd(&t->event_fd);
    autofree char *why = format("watch %s: %s", path, strerror(error));
    result_send(tag, error, why);
    return;
  }
  t->oom = (struct watch){.fd = fd, .ready = oom_ready};
  fd = -1;
  watch_events(&t->oom, EPOLLIN);
  result_send(tag, 0, NULL);
}

/* ---- leaving ---- */

static void leave_due(struct timer *timer) {
  (void)timer;
  leave_now();
}

/* Without a cedanad, which doesn't come back to us, nobody answers what is open. */
static void leave_if_done(void) {
  bool answered = requests_open() == 0 || link_.fd < 0;
  if (leaving && answered && events_idle() && requests_flushed()) leave_now();
}

/* The socket goes at once: who connected from now on would be lost when we are gone. A keeper that comes after us binds it anew. */
static void leave_begin(void) {
  if (leaving) return;
  leaving = true;
  requests_unlisten();
  timer_start(&leave, LEAVE_MS, leave_due);
}

/* ---- what cedanad says ---- */

static void operate(const struct message *m) {
  if (requests_repeated(tag_of(m), m->type)) return;
  switch (m->type) {
    case MESSAGE_SPAWN: children_spawn(m); return;
    case MESSAGE_SIGNAL: children_signal(m); return;
    case MESSAGE_MOUNT:
    case MESSAGE_UNMOUNT: mount_operate(m); return;
    case MESSAGE_IO_OPEN: io_open(m); return;
    case MESSAGE_IO_RESIZE: io_resize(m); return;
    case MESSAGE_IO_CLOSE_STDIN: io_close_stdin(m); return;
    case MESSAGE_IO_DRAIN: io_drain(m); return;
    case MESSAGE_IO_FREE: io_free(m); return;
    default: oom_watch(m); return;
  }
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
  if (welcomed) return;
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
    case MESSAGE_TAKEN: requests_taken(m); return;
    case MESSAGE_PONG:
      if (message_int(m, FIELD_NONCE) != awaited) return;
      awaited = 0;
      timer_stop(&pong);
      return;
    case MESSAGE_ACK: children_ack(message_int(m, FIELD_SEQUENCE)); return;
    case MESSAGE_EVENT: events_queue(m); return;
    case MESSAGE_LEAVE: leave_begin(); return;
    case MESSAGE_SPAWN ... MESSAGE_IO_FREE: operate(m); return;
    case MESSAGE_WATCH_OOM:
      if (KEEPER_VERSION_MAX >= 2) operate(m);
      return;
    default: return; /* newer than us */
  }
}

/* ---- the lifeline ---- */

/*
 * The pidfd is opened while the connection that the process has welcomed us on hasn't ended (see pong_due), so no other process
 * can be meant, however late the descriptor is fetched.
 */
int cedanad_fd(int64_t number) {
  if (daemon_pidfd < 0 && daemon_pid > 1 && link_.fd >= 0) {
    autofd pidfd = (int)syscall(SYS_pidfd_open, daemon_pid, 0);
    struct pollfd ended = {.fd = link_.fd, .events = POLLRDHUP};
    if (pidfd < 0 || poll(&ended, 1, 0) != 0) return -1;
    daemon_pidfd = pidfd;
    pidfd = -1;
  }
  return number < 0 || number > INT_MAX || daemon_pidfd < 0 ? -1 : (int)syscall(SYS_pidfd_getfd, daemon_pidfd, (int)number, 0);
}

static uint64_t pong_ms(void) { return environment_number("CEDANA_KEEPER_PONG_MS", PONG_MS); }

/*
 * A cedanad that hangs is worse than a dead one: containerd gives up after 2 s. It must be certain whom the pid means:
 *  - it has welcomed us: the pid is its own, and our connection ends with it. So, with a pidfd open, a connection that hasn't
 *    ended says that the pidfd is cedanad's. (SO_PEERCRED would name whoever called listen(2), a launcher.)
 *  - it hasn't: the lock file names it, and it must have that file open.
 */
static void pong_due(struct timer *timer) {
  (void)timer;
  if (link_.fd < 0) return;
  char byte;
  pid_t pid = daemon_pid;
  autofd pidfd = pid > 1 ? (int)syscall(SYS_pidfd_open, pid, 0) : daemon_lock_holder(&pid);
  ssize_t n = recv(link_.fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
  if (n > 0) { /* it has answered; we were slow */
    timer_start(&pong, pong_ms(), pong_due);
    return;
  }
  if (pidfd >= 0 && n < 0 && errno == EAGAIN) daemon_kill(pidfd, pid, now_ms() - pong_since_ms);
  link_lost();
}

void expect_pong(void) {
  if (awaited || !welcomed) return;
  awaited = ++nonce;
  size_t begin = frame_begin(&out, MESSAGE_PING);
  put_int(&out, FIELD_NONCE, awaited);
  frame_end(&out, begin);
  pong_since_ms = now_ms();
  timer_start(&pong, pong_ms(), pong_due);
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
    message_free(&in, &m);
  }
}

static void link_up(int fd) {
  link_ = (struct watch){.fd = fd, .ready = link_ready};
  watch_events(&link_, EPOLLIN);
  link_since_ms = pong_since_ms = now_ms();
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
  timer_start(&pong, daemon_patience_ms(), pong_due);
}

/* The next pause: twice as long each time, none at first when cedanad had been well. */
static uint64_t longer(uint64_t pause_ms, uint64_t max_ms) {
  return pause_ms == 0 ? BACKOFF_MIN_MS : pause_ms * 2 > max_ms ? max_ms : pause_ms * 2;
}

static void link_lost(void) {
  static bool quick;
  if (link_.fd < 0) return;
  uint64_t lived_ms = now_ms() - link_since_ms;
  watch_close(&link_);
  if (daemon_pidfd >= 0) close(daemon_pidfd);
  daemon_pidfd = -1;
  buffer_free(&out);
  if (!welcomed) {
    backoff_ms = lived_ms < EARLY_MS ? longer(backoff_ms, BACKOFF_MAX_MS) : 0;
  } else {
    bool ended_soon = lived_ms < environment_number("CEDANA_KEEPER_QUICK_MS", QUICK_MS);
    backoff_ms = ended_soon && quick ? longer(backoff_ms, BACKOFF_QUICK_MAX_MS) : 0;
    quick = ended_soon;
  }
  welcomed = false;
  awaited = 0;
  timer_stop(&pong);
  if (leaving) return; /* nobody is left to tell us more; what we have been told still goes out */
  requests_cedanad_gone();
  timer_start(&reconnect, backoff_ms, link_try);
}

static void link_try(struct timer *timer) {
  static uint64_t pause_ms, failed_ms;
  bool cannot_start = false;
  int fd = daemon_connect();
  if (fd == -ENOENT || fd == -ECONNREFUSED) {
    pid_t pid;
    fd = daemon_start(&pid);
    if (pid > 0) fd = daemon_connect();
    else cannot_start = fd < 0 && fd != -EBUSY;
  }
  if (fd >= 0) {
    pause_ms = failed_ms = 0;
    buffer_free(&in);
    link_up(fd);
    return;
  }
  bool soon = !cannot_start && (fd == -EBUSY || fd == -EAGAIN || fd == -ECONNREFUSED || fd == -ENOENT);
  if (soon) pause_ms = pause_ms == 0 ? 2 : pause_ms * 2 > 50 ? 50 : pause_ms * 2;
  else pause_ms = failed_ms = longer(failed_ms, BACKOFF_MAX_MS); /* nothing to start, or it can't be: each try is a line in the log */
  timer_start(timer, pause_ms, link_try);
}

static void before_round(void) {
  requests_resume();
  keeper_flush();
  leave_if_done();
}

_Noreturn void keeper_run(int cedanad) {
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN); /* a log file may be limited: write(2) says so */
  signal(SIGTERM, SIG_IGN);
  signal(SIGINT, SIG_IGN);
  daemon_as_sibling = true;
  if (loop_open() < 0 || children_init() < 0) _exit(71);
  requests_listen(keeper.listening);
  timer_start(&lonely, lonely_ms(), lonely_due);
  link_up(cedanad);
  for (;;) loop_round(before_round);
}
