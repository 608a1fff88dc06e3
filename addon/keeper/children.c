/*
 * Processes. SPAWN's children are reported by RESULT, with their tag; log programs and helpers by their owner's callback.
 * Everything else that ends as our child was adopted (we are a subreaper): reported by EXIT with a sequence number and kept until ACK.
 */
#include "keeper.h"
#include "daemon.h"
#include "spawn.h"
#include <fcntl.h>
#include <signal.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

/* Exits of processes that no task has, kept while no cedanad takes them. A container in the host's pid namespace can make thousands. */
#define ORPHANS_MAX 4096

extern char **environ;

struct tool {
  struct child child;
  struct tag tag;
  char *io; /* to close its console listener at the end */
  bool console, timed_out;
  struct timer timer;
};

struct exited {
  int64_t sequence;
  pid_t pid;
  int status;
  uint64_t at_ns, at_ms;
  struct rusage usage;
  struct exited *next;
};

static struct child *children;
static struct exited *exits, **exits_end = &exits;
static unsigned exit_count;
static int64_t last_sequence;
static struct watch signals;

static int64_t us(struct timeval t) { return (int64_t)t.tv_sec * 1000000 + t.tv_usec; }

void child_watch(struct child *child, pid_t pid, void (*ended)(struct child *child, int status)) {
  *child = (struct child){pid, ended, children};
  children = child;
}

static void exit_send(const struct exited *e) {
  if (!cedanad_ready()) return;
  struct buffer *out = to_cedanad();
  size_t begin = frame_begin(out, MESSAGE_EXIT);
  put_int(out, FIELD_SEQUENCE, e->sequence);
  put_int(out, FIELD_PID, e->pid);
  put_int(out, FIELD_WAIT_STATUS, e->status);
  put_int(out, FIELD_AT_NS, (int64_t)e->at_ns);
  put_int(out, FIELD_USER_US, us(e->usage.ru_utime));
  put_int(out, FIELD_SYSTEM_US, us(e->usage.ru_stime));
  put_int(out, FIELD_MAX_RSS_KB, e->usage.ru_maxrss);
  frame_end(out, begin);
  expect_pong();
}

static void exit_free(struct exited **at) {
  struct exited *e = *at;
  *at = e->next;
  if (exits_end == &e->next) exits_end = at;
  exit_count--;
  free(e);
}

/* The oldest orphan's, unless a call is under way that may yet learn that it was the pid of its process. */
static void forget_an_orphan(void) {
  uint64_t working_since = requests_oldest_working_ms();
  for (struct exited **at = &exits; *at; at = &(*at)->next) {
    if ((*at)->at_ms >= working_since) return;
    if (keeper_has_pid((*at)->pid)) continue;
    static bool said;
    if (!said) daemon_log_line("%s/%s: ends of more than %d orphans wait for cedanad: the oldest are forgotten", keeper.namespace, keeper.id, ORPHANS_MAX);
    said = true;
    exit_free(at);
    return;
  }
}

static void reaped(pid_t pid, int status, const struct rusage *usage) {
  for (struct child **at = &children; *at; at = &(*at)->next) {
    struct child *child = *at;
    if (child->pid != pid) continue;
    *at = child->next;
    child->ended(child, status);
    return;
  }
  struct exited *e = allocate(sizeof *e);
  *e = (struct exited){++last_sequence, pid, status, now_ns_real(), now_ms(), *usage, NULL};
  *exits_end = e;
  exits_end = &e->next;
  if (++exit_count > ORPHANS_MAX) forget_an_orphan();
  exit_send(e);
}

static void signals_ready(struct watch *watch, uint32_t events) {
  (void)events;
  struct signalfd_siginfo info;
  while (read(watch->fd, &info, sizeof info) == sizeof info) continue;
  for (;;) {
    int status;
    struct rusage usage;
    pid_t pid = wait4(-1, &status, WNOHANG, &usage);
    if (pid <= 0) return;
    reaped(pid, status, &usage);
  }
}

int children_init(void) {
  sigset_t set;
  signal(SIGCHLD, SIG_DFL); /* ignored by whoever started us, the kernel would reap in our place */
  sigemptyset(&set);
  sigaddset(&set, SIGCHLD);
  sigprocmask(SIG_SETMASK, &set, NULL);
  signals = (struct watch){.fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK), .ready = signals_ready};
  return signals.fd < 0 ? -errno : watch_events(&signals, EPOLLIN);
}

void children_resend_exits(void) {
  for (struct exited *e = exits; e; e = e->next) exit_send(e);
}

void children_ack(int64_t sequence) {
  for (struct exited **at = &exits; *at; at = &(*at)->next)
    if ((*at)->sequence == sequence) {
      exit_free(at);
      return;
    }
}

/* What systemd told us alone. */
static bool is_ours_alone(const char *entry) { return starts_with(entry, "NOTIFY_SOCKET="); }

static char **environment(char **added) {
  autofree char **own = filter_environment(environ, is_ours_alone);
  return environment_with(own, added);
}

static void tool_ended(struct child *child, int status) {
  struct tool *t = container_of(child, struct tool, child);
  struct io *io = t->console ? io_find(t->io) : NULL;
  if (io) io_console_done(io);
  struct buffer out = {0};
  size_t begin = result_begin(&out, t->tag, t->timed_out ? ETIMEDOUT : 0, t->timed_out ? "killed: it took too long" : NULL);
  put_int(&out, FIELD_PID, child->pid);
  put_int(&out, FIELD_WAIT_STATUS, status);
  put_int(&out, FIELD_AT_NS, (int64_t)now_ns_real());
  result_end(t->tag, &out, begin);
  timer_stop(&t->timer);
  tag_free(&t->tag);
  free(t->io);
  free(t);
}

static void timeout_due(struct timer *timer) {
  struct tool *t = container_of(timer, struct tool, timer);
  t->timed_out = true; /* reported when it has been reaped */
  kill(-t->child.pid, SIGKILL); /* with what it has started: the group is its own */
}

void children_spawn(const struct message *m) {
  struct tag tag = tag_of(m);
  autofree char **argv = message_list(m, FIELD_ARGV);
  autofree char **added = message_list(m, FIELD_ENV);
  const char *io_key = message_string(m, FIELD_IO), *output = message_string(m, FIELD_OUTPUT_PATH);
  const char *console = message_string(m, FIELD_CONSOLE_SOCKET);
  if (!argv) {
    result_send(tag, EINVAL, "spawn without argv");
    return;
  }
  struct io *io = NULL;
  autofd out = -1;
  autofd null = open("/dev/null", O_RDWR | O_CLOEXEC);
  int fds[3] = {-1, -1, -1};
  if (output) {
    out = open(output, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NONBLOCK, 0600); /* a FIFO must not make us wait */
    if (out < 0) {
      int error = errno;
      autofree char *why = format("open %s: %s", output, strerror(error));
      result_send(tag, error, why);
      return;
    }
    fcntl(out, F_SETFL, fcntl(out, F_GETFL) & ~O_NONBLOCK);
    fds[1] = fds[2] = out;
  } else if (io_key) {
    io = io_find(io_key);
    if (!io) {
      result_send(tag, ENOENT, "no such io object");
      return;
    }
    if (console) {
      int result = io_console_listen(io, console);
      if (result < 0) {
        autofree char *why = format("listen for the terminal at %s: %s", console, strerror(-result));
        result_send(tag, -result, why);
        return;
      }
    } else {
      io_child_fds(io, fds);
    }
  }
  autofree char **env = environment(added);
  autofree char *program = find_program(argv[0], getenv("PATH"));
  struct spawn s = {.path = program, .argv = argv, .env = env, .cwd = message_string(m, FIELD_CWD), .fd_count = 3,
                    .sched_core = message_int(m, FIELD_SCHED_CORE)};
  for (int i = 0; i < 3; i++) s.fds[i] = fds[i] >= 0 ? fds[i] : null;
  const char *sealed_of = message_string(m, FIELD_SEALED_OF);
  autofd sealed = program && sealed_of ? cedanad_fd(message_int(m, FIELD_SEALED_FD)) : -1;
  s.sealed = sealed;
  s.use_sealed = sealed >= 0 && is_sealed_copy(sealed, program, sealed_of);
  pid_t pid = program ? spawn_program(&s) : -ENOENT;
  if (pid < 0) {
    if (io && console) io_console_done(io);
    autofree char *why = format("execute %s: %s", argv[0], strerror(-pid));
    result_send(tag, -pid, why);
    return;
  }
  if (io && !console) io_spawned(io);
  struct tool *t = allocate(sizeof *t);
  child_watch(&t->child, pid, tool_ended);
  t->tag = tag_copy(tag);
  t->io = io_key ? copy_string(io_key) : NULL;
  t->console = console != NULL;
  int64_t limit = message_int(m, FIELD_TIMEOUT_MS);
  if (limit > 0) timer_start(&t->timer, (uint64_t)limit, timeout_due);
  struct buffer *to = to_cedanad();
  size_t begin = frame_begin(to, MESSAGE_SPAWNED);
  put_int(to, FIELD_REQUEST, tag.request);
  put_string(to, FIELD_STEP, tag.step);
  put_int(to, FIELD_PID, pid);
  frame_end(to, begin);
}

pid_t children_start_logger(char **argv, char *const *own, char **added, int out, int err, int ready) {
  autofree char **env = environment(added);
  /* The file may have been replaced meanwhile; what we run is there as long as we are. */
  autofree char *program = argv ? find_program(argv[0], getenv("PATH")) : copy_string("/proc/self/exe");
  autofd null = open("/dev/null", O_RDWR | O_CLOEXEC);
  struct spawn s = {.path = program, .argv = argv ? argv : own, .env = env, .fds = {null, null, null, out < 0 ? null : out, err < 0 ? null : err, ready}, .fd_count = 6};
  return program ? spawn_program(&s) : -ENOENT;
}

void children_signal(const struct message *m) {
  struct tag tag = tag_of(m);
  pid_t pid = (pid_t)message_int(m, FIELD_PID);
  int number = (int)message_int(m, FIELD_SIGNAL);
  siginfo_t info = {0};
  /* WNOWAIT: is it our child, and not ended? Nobody else can reap it, so the pid stays its own until we do. */
  if (pid <= 1 || waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) < 0 || info.si_pid != 0) {
    result_send(tag, ESRCH, NULL);
    return;
  }
  if (kill(pid, number) < 0) {
    autofree char *why = format("kill: %s", strerror(errno));
    result_send(tag, errno, why);
  } else {
    result_send(tag, 0, NULL);
  }
}
