/*
 * Log programs (`binary://`): one serves stdout and stderr of a container, whose pipes it reads itself.
 *
 *   inherited   0 to 2 /dev/null, 3 stdout, 4 stderr, 5 a pipe that it closes (or writes into) when it is ready
 *   ready       the operation that opened it is answered then; nothing else waits for it
 *   dies early  the pipes' read ends are held here too, so the container blocks when they are full, as under containerd's own
 *               shim; without them it would be killed by SIGPIPE
 *   drain       its end, which follows from the end of both streams; or, when it stays, that it has had nothing to read for a second
 *   end         its streams end, SIGTERM, and SIGKILL after TERMINATE_MS. The operation that frees it is answered when it is gone
 *
 * Log files (`file://`) are written by a process of the same kind, which is ourselves (file-log.c), and of which more is known:
 *
 *   ready       it says so, or why it can't be
 *   dies early  another one is started, and goes on with what is in the pipes; after a pause that grows where it can't
 *   drain       its end, which comes when all is written
 *   end         SIGKILL: the operation that frees it waits for no disk
 */
#include "keeper.h"
#include "daemon.h"
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define READY_MS 10000
#define TERMINATE_MS 12000 /* as containerd's own shim */
#define AGAIN_MS 100 /* doubling to */
#define AGAIN_MAX_MS 5000 /* where one that writes log files ends at once each time: its file can't be opened any more */
#define LOOK_MS 50
#define IDLE_LOOKS 20 /* a second */

struct logger {
  struct child child;
  struct io *io; /* NULL: freed */
  char *name;
  bool files;
  char *paths[2]; /* of files */
  int read_ends[2];
  struct watch ready;
  struct timer limit; /* starting: of its patience; freed: of ours; between two that write files: the pause */
  uint64_t begun_ms, pause_ms; /* of who writes files */
  struct timer look;
  unsigned idle_looks;
  bool starting, running, ended;
  struct tag freed_by;
};

static void logger_free(struct logger *l) {
  for (int i = 0; i < 2; i++) close_fd(&l->read_ends[i]);
  watch_close(&l->ready);
  timer_stop(&l->limit);
  timer_stop(&l->look);
  tag_free(&l->freed_by);
  free(l->name);
  for (int i = 0; i < 2; i++) free(l->paths[i]);
  loop_free_later(l);
}

static void writer_says(struct logger *l);
static void start_again_later(struct logger *l);

static void started(struct logger *l, int error, const char *why) {
  l->starting = false;
  if (!l->files) watch_close(&l->ready); /* else it may have more to say */
  timer_stop(&l->limit);
  io_logger_started(l->io, error, why);
}

static void ended(struct child *child, int status) {
  struct logger *l = container_of(child, struct logger, child);
  l->running = false;
  if (!l->io) {
    if (l->freed_by.step) result_send(l->freed_by, 0, NULL);
    logger_free(l);
    return;
  }
  /* Before its last words are lost. */
  if (l->files) writer_says(l);
  if (!l->io) return; /* by these words, and freed */
  autofree char *how = WIFSIGNALED(status) ? format("signal %d", WTERMSIG(status)) : format("exit code %d", WEXITSTATUS(status));
  if (l->starting) {
    l->ended = true;
    autofree char *why = format("log program %s ended before it was ready (%s)", l->name, how);
    started(l, ECHILD, why);
    return;
  }
  if (l->files && status != 0) {
    daemon_log_line("%s/%s: what writes %s (pid %d) ended with %s: another one follows", keeper.namespace, keeper.id, l->name, (int)child->pid, how);
    start_again_later(l);
    return;
  }
  l->ended = true;
  if (status != 0)
    daemon_log_line("%s/%s: log program %s (pid %d) ended with %s", keeper.namespace, keeper.id, l->name, (int)child->pid, how);
  timer_stop(&l->look);
  io_logger_drained(l->io);
}

static void limit_due(struct timer *timer) {
  struct logger *l = container_of(timer, struct logger, limit);
  if (!l->io) {
    kill(-l->child.pid, SIGKILL);
    return;
  }
  autofree char *why = l->files ? format("open %s: its file system does not answer", l->name) : format("log program %s is not ready in time", l->name);
  started(l, ETIMEDOUT, why);
}

/* Its end closes its fds a moment before it can be waited for: PF_EXITING in the flags of /proc/PID/stat tells. */
static bool is_exiting(pid_t pid) {
  autofree char *path = format("/proc/%d/stat", (int)pid);
  autofree char *text = NULL;
  if (read_file(path, 4096, &text, NULL) < 0) return true;
  char *at = strrchr(text, ')'); /* then: state, ppid, pgrp, session, tty, its pgrp, flags */
  for (int word = 0; at && word < 7; word++) at = strchr(at + 1, ' ');
  return !at || strtoul(at, NULL, 10) & 4;
}

/* What a writer of ours has to say, see file-log.c. */
static void writer_says(struct logger *l) {
  char text[1024];
  ssize_t n = l->ready.fd < 0 ? 0 : read(l->ready.fd, text, sizeof text - 1);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n <= 0) {
    watch_close(&l->ready); /* `ended` follows */
    return;
  }
  text[n] = 0;
  const char *words = text;
  if (*words == '+') {
    words++;
    if (l->starting) started(l, 0, NULL);
  } else if (*words == '-') {
    char *rest;
    int error = (int)strtol(words + 1, &rest, 10);
    const char *why = *rest == ' ' ? rest + 1 : rest;
    if (l->starting) started(l, error, why);
    else daemon_log_line("%s/%s: %s; the output waits", keeper.namespace, keeper.id, why);
    return;
  }
  if (*words) daemon_log_line("%s/%s: write %s: %s; its output waits", keeper.namespace, keeper.id, l->name, words);
}

static void ready(struct watch *watch, uint32_t events) {
  struct logger *l = container_of(watch, struct logger, ready);
  char byte;
  (void)events;
  if (l->files) {
    writer_says(l);
    return;
  }
  ssize_t n = read(watch->fd, &byte, 1);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n <= 0 && is_exiting(l->child.pid)) {
    watch_close(watch); /* `ended` follows, or the limit */
    return;
  }
  started(l, 0, NULL);
}

/* Ourselves, by another name. @returns the pid, or -errno */
static pid_t start_writer(struct logger *l) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0) return -errno;
  char *argv[] = {"cedana-log", l->paths[0] ? l->paths[0] : "", l->paths[1] ? l->paths[1] : "", NULL};
  pid_t pid = children_start_logger(NULL, argv, NULL, l->read_ends[0], l->read_ends[1], ends[1]);
  close(ends[1]);
  if (pid < 0) {
    close(ends[0]);
    return pid;
  }
  watch_close(&l->ready);
  l->running = true;
  l->begun_ms = now_ms();
  child_watch(&l->child, pid, ended);
  l->ready = (struct watch){.fd = ends[0], .ready = ready};
  watch_events(&l->ready, EPOLLIN);
  return pid;
}

static void again_due(struct timer *timer) {
  struct logger *l = container_of(timer, struct logger, limit);
  if (start_writer(l) < 0) start_again_later(l);
}

static void start_again_later(struct logger *l) {
  bool was_well = now_ms() - l->begun_ms > AGAIN_MAX_MS;
  uint64_t longer = l->pause_ms * 2 > AGAIN_MAX_MS ? AGAIN_MAX_MS : l->pause_ms * 2;
  l->pause_ms = was_well || l->pause_ms == 0 ? AGAIN_MS : longer;
  timer_start(&l->limit, l->pause_ms, again_due);
}

int logger_start(const struct message *m, struct io *io, int write_ends[2], struct logger **out, char **why) {
  autofree char **argv = message_list(m, FIELD_DRIVER_ARGV);
  autofree char **env = message_list(m, FIELD_DRIVER_ENV);
  autofd out_w = -1;
  autofd err_w = -1;
  autofd ready_r = -1;
  autofd ready_w = -1;
  int pipes[3][2];
  if (!argv) {
    *why = copy_string("no log program is named");
    return -EINVAL;
  }
  struct logger *l = allocate(sizeof *l);
  *l = (struct logger){.io = io, .name = copy_string(argv[0]), .read_ends = {-1, -1}, .ready = {.fd = -1}, .starting = true};
  int result = io_make_pipe(pipes[0], m);
  if (result == 0) {
    l->read_ends[0] = pipes[0][0], out_w = pipes[0][1];
    result = io_make_pipe(pipes[1], m);
  }
  if (result == 0) {
    l->read_ends[1] = pipes[1][0], err_w = pipes[1][1];
    result = pipe2(pipes[2], O_CLOEXEC) < 0 ? -errno : 0;
  }
  pid_t pid = result;
  if (result == 0) {
    ready_r = pipes[2][0], ready_w = pipes[2][1];
    pid = children_start_logger(argv, NULL, env, l->read_ends[0], l->read_ends[1], ready_w);
  }
  if (pid < 0) {
    *why = format("start log program %s: %s", argv[0], strerror(-pid));
    logger_free(l);
    return pid;
  }
  l->running = true;
  child_watch(&l->child, pid, ended);
  fcntl(ready_r, F_SETFL, O_NONBLOCK);
  l->ready = (struct watch){.fd = ready_r, .ready = ready};
  ready_r = -1;
  watch_events(&l->ready, EPOLLIN);
  int64_t limit = message_int(m, FIELD_TIMEOUT_MS);
  timer_start(&l->limit, limit > 0 ? (uint64_t)limit : READY_MS, limit_due);
  write_ends[0] = out_w, write_ends[1] = err_w;
  out_w = err_w = -1;
  *out = l;
  return 0;
}

int logger_start_files(const struct message *m, struct io *io, const char *const paths[2], int write_ends[2], struct logger **out, char **why) {
  for (int i = 0; i < 2; i++)
    if (paths[i] && paths[i][0] != '/') {
      *why = format("log file \"%s\": not an absolute path", paths[i]);
      return -EINVAL;
    }
  struct logger *l = allocate(sizeof *l);
  const char *other = paths[0] && paths[1] && strcmp(paths[0], paths[1]) ? paths[1] : NULL;
  const char *first = paths[0] ? paths[0] : paths[1];
  *l = (struct logger){.io = io, .read_ends = {-1, -1}, .ready = {.fd = -1}, .files = true, .starting = true};
  l->name = other ? format("the log files %s and %s", first, other) : format("the log file %s", first);
  int result = 0;
  for (int i = 0; i < 2 && result == 0; i++) {
    int ends[2];
    write_ends[i] = -1;
    if (!paths[i] || (result = io_make_pipe(ends, m)) < 0) continue;
    l->paths[i] = copy_string(paths[i]);
    l->read_ends[i] = ends[0];
    write_ends[i] = ends[1];
  }
  if (result == 0) result = start_writer(l);
  if (result < 0) {
    *why = format("start what writes %s: %s", l->name, strerror(-result));
    for (int i = 0; i < 2; i++) close_fd(&write_ends[i]);
    logger_free(l);
    return result;
  }
  int64_t limit = message_int(m, FIELD_TIMEOUT_MS);
  timer_start(&l->limit, limit > 0 ? (uint64_t)limit : READY_MS, limit_due);
  *out = l;
  return 0;
}

bool logger_is_starting(const struct logger *l) { return l->starting; }

/* Whether both streams have ended and been read to their end. */
static bool has_read_all(const struct logger *l) {
  for (int i = 0; i < 2; i++) {
    struct pollfd p = {.fd = l->read_ends[i], .events = POLLIN};
    int waiting = 0;
    if (poll(&p, 1, 0) < 0 || !(p.revents & POLLHUP) || ioctl(l->read_ends[i], FIONREAD, &waiting) < 0 || waiting > 0) return false;
  }
  return true;
}

static void look_due(struct timer *timer) {
  struct logger *l = container_of(timer, struct logger, look);
  l->idle_looks = has_read_all(l) ? l->idle_looks + 1 : 0;
  if (l->idle_looks >= IDLE_LOOKS) io_logger_drained(l->io);
  else timer_start(timer, LOOK_MS, look_due);
}

bool logger_is_drained(const struct logger *l) { return l->ended || (!l->files && l->idle_looks >= IDLE_LOOKS); }

void logger_drain(struct logger *l) {
  if (!l->files && !logger_is_drained(l) && !l->look.armed) timer_start(&l->look, LOOK_MS, look_due);
}

bool logger_end(struct logger *l, struct tag tag) {
  l->io = NULL;
  if (!l->running) {
    logger_free(l);
    return true;
  }
  for (int i = 0; i < 2; i++) close_fd(&l->read_ends[i]);
  watch_close(&l->ready);
  timer_stop(&l->look);
  if (l->files) {
    timer_stop(&l->limit);
    kill(-l->child.pid, SIGKILL);
    return true;
  }
  l->freed_by = tag_copy(tag);
  kill(l->child.pid, SIGTERM);
  timer_start(&l->limit, environment_number("CEDANA_KEEPER_LOGGER_MS", TERMINATE_MS), limit_due);
  return false;
}
