/*
 * Stdio. An io object has up to three flows:
 *
 *   stdin    client's FIFO ──▶ pipe to the container, or its pty
 *   stdout   pipe from the container, or its pty ──▶ client's FIFO, a log file, a log program
 *   stderr   as stdout, never with a pty
 *
 * Pipe to pipe goes by splice(2); into files (opened O_APPEND, which splice refuses) and from ptys by copying. A flow asks for
 * exactly the side that isn't ready, one event at a time (EPOLLONESHOT), and makes at most ROUNDS moves for an event, so
 * that a loud container doesn't keep the frames waiting.
 *
 * Output FIFOs are opened O_RDWR: a reader that leaves gives neither EPIPE nor end of file, and one that returns goes on where
 * the other stopped. The stdin FIFO is held open for writing by ourselves until IO_CLOSE_STDIN.
 */
#include "keeper.h"
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define PIPE_SIZE (256 * 1024)
#define ROUNDS 64
#define COPY_SIZE 16384

enum { KIND_NONE, KIND_FIFO, KIND_FILE, KIND_LOGGER };

struct flow {
  struct io *io;
  struct watch from, to;
  bool open, copying, to_pollable;
  struct buffer pending; /* read, not yet written: copying only */
};

struct drain {
  struct tag tag;
  struct io *io;
  struct timer timer;
  struct drain *next;
};

struct io {
  char *key;
  bool terminal, has_stdin;
  int child[3];       /* the container's ends, until it has them */
  int stdin_keep;     /* our own write end of the stdin FIFO */
  int stdin_fifo, target[2]; /* of a terminal, until the master comes */
  struct flow in, out, err;
  int master;
  struct watch console;
  char *console_path;
  struct drain *drains;
  struct io *next;
};

static struct io *ios;

struct io *io_find(const char *key) {
  for (struct io *io = ios; key && io; io = io->next)
    if (!strcmp(io->key, key)) return io;
  return NULL;
}

static bool is_drained(const struct io *io) { return !io->out.open && !io->err.open; }

static void drain_end(struct drain *d, int error) {
  for (struct drain **at = &d->io->drains; *at; at = &(*at)->next)
    if (*at == d) {
      *at = d->next;
      break;
    }
  timer_stop(&d->timer);
  result_send(d->tag, error, error ? "output is still open" : NULL);
  tag_free(&d->tag);
  free(d);
}

static void flow_close(struct flow *f) {
  if (!f->open) return;
  f->open = false;
  watch_close(&f->from);
  watch_close(&f->to);
  buffer_free(&f->pending);
  if (is_drained(f->io))
    while (f->io->drains) drain_end(f->io->drains, 0);
}

static bool is_ready(int fd, short events) {
  struct pollfd p = {.fd = fd, .events = events};
  return poll(&p, 1, 0) > 0;
}

/* Moves some; 1: moved, 0: end, -EAGAIN: one side isn't ready, other -errno. */
static int move_some(struct flow *f) {
  if (!f->copying) {
    ssize_t n = splice(f->from.fd, NULL, f->to.fd, NULL, PIPE_SIZE, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    return n > 0 ? 1 : n == 0 ? 0 : -errno;
  }
  if (!buffer_length(&f->pending)) {
    if (buffer_reserve(&f->pending, COPY_SIZE) < 0) return -ENOMEM;
    ssize_t n = read(f->from.fd, f->pending.data + f->pending.end, COPY_SIZE);
    if (n < 0) return errno == EIO ? 0 : -errno; /* EIO: the last slave of a pty was closed */
    if (n == 0) return 0;
    f->pending.end += (size_t)n;
  }
  ssize_t n = write(f->to.fd, f->pending.data + f->pending.start, buffer_length(&f->pending));
  if (n < 0) return -errno;
  buffer_consume(&f->pending, (size_t)n);
  return 1;
}

static void flow_run(struct flow *f) {
  for (unsigned round = 0; round < ROUNDS; round++) {
    int moved = move_some(f);
    if (moved == 1 || moved == -EINTR) continue;
    if (moved != -EAGAIN) {
      flow_close(f); /* end of file, or nobody takes it any more (EPIPE, ENOSPC) */
      return;
    }
    bool from_ready = buffer_length(&f->pending) || is_ready(f->from.fd, POLLIN);
    if (from_ready && f->to_pollable) watch_events(&f->to, EPOLLOUT | EPOLLONESHOT);
    else watch_events(&f->from, EPOLLIN | EPOLLONESHOT);
    return;
  }
  watch_events(&f->from, EPOLLIN | EPOLLONESHOT); /* enough for now: the others' turn */
  if (buffer_length(&f->pending) && f->to_pollable) watch_events(&f->to, EPOLLOUT | EPOLLONESHOT);
}

static void from_ready(struct watch *watch, uint32_t events) {
  (void)events;
  flow_run(container_of(watch, struct flow, from));
}

static void to_ready(struct watch *watch, uint32_t events) {
  (void)events;
  flow_run(container_of(watch, struct flow, to));
}

/* Takes over both fds. */
static void flow_open(struct flow *f, struct io *io, int from, int to, bool copying) {
  struct stat st;
  fcntl(from, F_SETFL, fcntl(from, F_GETFL) | O_NONBLOCK);
  fcntl(to, F_SETFL, fcntl(to, F_GETFL) | O_NONBLOCK);
  *f = (struct flow){.io = io, .from = {.fd = from, .ready = from_ready}, .to = {.fd = to, .ready = to_ready}, .open = true, .copying = copying};
  f->to_pollable = fstat(to, &st) == 0 && !S_ISREG(st.st_mode) && !(S_ISCHR(st.st_mode) && !isatty(to));
  watch_events(&f->from, EPOLLIN | EPOLLONESHOT);
}

static void close_all(struct io *io) {
  for (int i = 0; i < 3; i++) close_fd(&io->child[i]);
  close_fd(&io->stdin_keep);
  close_fd(&io->stdin_fifo);
  close_fd(&io->target[0]);
  close_fd(&io->target[1]);
  close_fd(&io->master);
}

/* An output's target; *why says what failed. */
static int open_target(int kind, const char *path, char **why) {
  int fd = -1;
  if (kind == KIND_FIFO) {
    fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    struct stat st;
    if (fd >= 0 && fstat(fd, &st) == 0 && !S_ISFIFO(st.st_mode)) {
      close(fd);
      *why = format("%s is not a FIFO", path);
      return -EINVAL;
    }
    if (fd >= 0) fcntl(fd, F_SETPIPE_SZ, PIPE_SIZE);
  } else if (kind == KIND_FILE) {
    make_parents(path, 0755);
    fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  } else {
    fd = open("/dev/null", O_WRONLY | O_CLOEXEC);
  }
  if (fd >= 0) return fd;
  int error = errno;
  *why = format("open %s: %s", path, strerror(error));
  return -error;
}

static int make_pipe(int ends[2], const struct message *m) {
  if (pipe2(ends, O_CLOEXEC) < 0) return -errno;
  fcntl(ends[0], F_SETPIPE_SZ, PIPE_SIZE);
  int64_t uid = message_int(m, FIELD_UID), gid = message_int(m, FIELD_GID);
  if ((uid || gid) && fchown(ends[0], (uid_t)uid, (gid_t)gid) < 0) return -errno;
  return 0;
}

/* One program for both streams. On success the container's (or the pty's) write ends are in targets. */
static int start_logger(const struct message *m, int targets[2], bool both, char **why) {
  int out[2] = {-1, -1}, err[2] = {-1, -1}, ready[2] = {-1, -1};
  autofree char **argv = message_list(m, FIELD_DRIVER_ARGV);
  autofree char **env = message_list(m, FIELD_DRIVER_ENV);
  int result = argv ? 0 : -EINVAL;
  if (result == 0) result = make_pipe(out, m);
  if (result == 0) result = make_pipe(err, m);
  if (result == 0 && pipe2(ready, O_CLOEXEC) < 0) result = -errno;
  pid_t pid = result < 0 ? result : children_start_logger(argv, env, out[0], err[0], ready[1]);
  close_fd(&out[0]);
  close_fd(&err[0]);
  close_fd(&ready[1]);
  if (pid > 0) {
    int64_t limit = message_int(m, FIELD_TIMEOUT_MS);
    result = wait_fd(ready[0], POLLIN, now_ms() + (uint64_t)(limit > 0 ? limit : 10000));
    if (result < 0) {
      kill(pid, SIGKILL);
      *why = format("log program %s is not ready in time", argv[0]);
    }
  } else {
    result = pid;
    *why = format("start log program %s: %s", argv ? argv[0] : "(none)", strerror(-result));
  }
  close_fd(&ready[0]);
  if (result < 0 || !both) close_fd(&err[1]);
  if (result < 0) close_fd(&out[1]);
  targets[0] = out[1];
  targets[1] = err[1];
  return result;
}

void io_open(const struct message *m) {
  struct tag tag = tag_of(m);
  const char *key = message_string(m, FIELD_IO), *in = message_string(m, FIELD_STDIN);
  if (!key || io_find(key)) {
    result_send(tag, key ? EEXIST : EINVAL, key ? "io object exists" : "io without a key");
    return;
  }
  struct io *io = allocate(sizeof *io);
  io->key = copy_string(key);
  io->terminal = message_int(m, FIELD_TERMINAL);
  io->child[0] = io->child[1] = io->child[2] = io->stdin_keep = io->stdin_fifo = io->master = -1;
  io->target[0] = io->target[1] = io->console.fd = -1;
  int kinds[2] = {(int)message_int(m, FIELD_STDOUT_KIND), (int)message_int(m, FIELD_STDERR_KIND)};
  const char *paths[2] = {message_string(m, FIELD_STDOUT), message_string(m, FIELD_STDERR)};
  autofree char *why = NULL;
  int result = 0;
  if (in) {
    io->stdin_fifo = open(in, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (io->stdin_fifo >= 0) io->stdin_keep = open(in, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
    if (io->stdin_keep < 0) {
      result = -errno;
      why = format("open %s: %s", in, strerror(errno));
    }
  }
  if (result == 0 && kinds[0] == KIND_LOGGER) {
    result = start_logger(m, io->target, !io->terminal, &why);
  } else {
    for (int i = 0; i < 2 && result == 0; i++) {
      if (kinds[i] == KIND_NONE && !(io->terminal && i == 0)) continue;
      io->target[i] = open_target(kinds[i], paths[i] ? paths[i] : "", &why);
      if (io->target[i] < 0) result = io->target[i];
    }
  }
  if (result == 0 && !io->terminal) {
    int ends[2];
    if (io->stdin_fifo >= 0 && (result = make_pipe(ends, m)) == 0) {
      io->child[0] = ends[0];
      flow_open(&io->in, io, io->stdin_fifo, ends[1], false);
      io->stdin_fifo = -1;
    }
    for (int i = 0; i < 2 && result == 0; i++) {
      if (io->target[i] < 0) continue;
      if (kinds[0] == KIND_LOGGER) {
        io->child[1 + i] = io->target[i]; /* the program reads the container's pipe itself */
      } else if ((result = make_pipe(ends, m)) == 0) {
        io->child[1 + i] = ends[1];
        flow_open(i == 0 ? &io->out : &io->err, io, ends[0], io->target[i], kinds[i] == KIND_FILE);
      }
      io->target[i] = -1;
    }
  }
  if (result < 0) {
    flow_close(&io->in);
    flow_close(&io->out);
    flow_close(&io->err);
    close_all(io);
    free(io->key);
    free(io);
    result_send(tag, -result, why ? why : strerror(-result));
    return;
  }
  io->next = ios;
  ios = io;
  result_send(tag, 0, NULL);
}

void io_child_fds(struct io *io, int fds[3]) {
  for (int i = 0; i < 3; i++) fds[i] = io->child[i];
}

void io_spawned(struct io *io) {
  for (int i = 0; i < 3; i++) close_fd(&io->child[i]);
}

/* ---- terminals ---- */

static void master_arrived(struct io *io, int master) {
  if (io->master >= 0) {
    close(master);
    return;
  }
  io->master = master;
  fcntl(master, F_SETFD, FD_CLOEXEC);
  if (io->target[0] >= 0) flow_open(&io->out, io, fcntl(master, F_DUPFD_CLOEXEC, 3), io->target[0], true);
  if (io->stdin_fifo >= 0) flow_open(&io->in, io, io->stdin_fifo, fcntl(master, F_DUPFD_CLOEXEC, 3), true);
  io->target[0] = io->stdin_fifo = -1;
}

static void console_receive(struct io *io) {
  autofd peer = accept4(io->console.fd, NULL, NULL, SOCK_CLOEXEC);
  if (peer < 0) return;
  char data[64];
  union {
    struct cmsghdr header;
    char space[CMSG_SPACE(sizeof(int))];
  } control;
  struct iovec part = {data, sizeof data};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
  if (wait_fd(peer, POLLIN, now_ms() + 1000) < 0 || recvmsg(peer, &message, MSG_CMSG_CLOEXEC) < 0) return;
  struct cmsghdr *c = CMSG_FIRSTHDR(&message);
  if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS && c->cmsg_len == CMSG_LEN(sizeof(int))) {
    int fd;
    memcpy(&fd, CMSG_DATA(c), sizeof fd);
    master_arrived(io, fd);
  }
}

static void console_ready(struct watch *watch, uint32_t events) {
  (void)events;
  console_receive(container_of(watch, struct io, console));
}

int io_console_listen(struct io *io, const char *path) {
  struct sockaddr_un address;
  unsigned length;
  int result = socket_address(path, &address, &length);
  if (result < 0) return result;
  io_console_done(io);
  make_parents(path, 0700);
  unlink(path);
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return -errno;
  mode_t mask = umask(0177);
  result = bind(fd, (struct sockaddr *)&address, length) < 0 || listen(fd, 4) < 0 ? -errno : 0;
  umask(mask);
  if (result < 0) {
    close(fd);
    return result;
  }
  io->console = (struct watch){.fd = fd, .ready = console_ready};
  io->console_path = copy_string(path);
  watch_events(&io->console, EPOLLIN);
  return 0;
}

void io_console_done(struct io *io) {
  if (io->console.fd < 0) return;
  if (io->master < 0) console_receive(io); /* sent, but not yet seen */
  watch_close(&io->console);
  unlink(io->console_path);
  free(io->console_path);
  io->console_path = NULL;
}

void io_resize(const struct message *m) {
  struct tag tag = tag_of(m);
  struct io *io = io_find(message_string(m, FIELD_IO));
  struct winsize size = {.ws_col = (unsigned short)message_int(m, FIELD_WIDTH), .ws_row = (unsigned short)message_int(m, FIELD_HEIGHT)};
  int error = !io ? ENOENT : io->master < 0 ? ENOTTY : ioctl(io->master, TIOCSWINSZ, &size) < 0 ? errno : 0;
  result_send(tag, error, error ? strerror(error) : NULL);
}

void io_close_stdin(const struct message *m) {
  struct io *io = io_find(message_string(m, FIELD_IO));
  if (io) close_fd(&io->stdin_keep);
  result_send(tag_of(m), 0, NULL);
}

/* ---- end ---- */

static void drain_due(struct timer *timer) { drain_end(container_of(timer, struct drain, timer), ETIMEDOUT); }

void io_drain(const struct message *m) {
  struct tag tag = tag_of(m);
  struct io *io = io_find(message_string(m, FIELD_IO));
  if (!io || is_drained(io)) {
    result_send(tag, 0, NULL);
    return;
  }
  struct drain *d = allocate(sizeof *d);
  *d = (struct drain){.tag = tag_copy(tag), .io = io, .next = io->drains};
  io->drains = d;
  timer_start(&d->timer, (uint64_t)message_int(m, FIELD_TIMEOUT_MS), drain_due);
}

void io_free(const struct message *m) {
  struct io *io = io_find(message_string(m, FIELD_IO));
  if (io) {
    for (struct io **at = &ios; *at; at = &(*at)->next)
      if (*at == io) {
        *at = io->next;
        break;
      }
    io_console_done(io);
    flow_close(&io->in);
    flow_close(&io->out);
    flow_close(&io->err);
    while (io->drains) drain_end(io->drains, 0);
    close_all(io);
    free(io->key);
    loop_free_later(io);
  }
  result_send(tag_of(m), 0, NULL);
}
