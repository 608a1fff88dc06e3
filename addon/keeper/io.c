/*
 * Stdio. An io object has up to three flows:
 *
 *   stdin    client's FIFO ──▶ pipe to the container, or its pty
 *   stdout   pipe from the container, or its pty ──▶ client's FIFO, who writes a log file, a log program
 *   stderr   as stdout, never with a pty
 *
 * Pipe to pipe, large pieces go by splice(2) and small ones by copying: a spliced piece keeps a slot of the pipe to itself, so a
 * FIFO without a reader would be full after 16 lines, where a copy fills its pages. The size of the last piece decides. Pipes
 * grow when a flow first splices or first waits for its reader: they count against a limit per user (fs.pipe-user-pages-soft), which
 * a hundred quiet containers would reach with large ones, and past which their own pipes get two pages.
 * From and to ptys everything is copied. Whoever writes a log file, a process of its own, reads the container's pipe itself, or what
 * we copy from its pty: a file may make its writer wait.
 *
 * A flow asks for exactly the side that isn't ready, one event at a time (EPOLLONESHOT), and makes at most ROUNDS moves for an
 * event, so that a loud container doesn't keep the frames waiting.
 *
 * Output FIFOs are opened O_RDWR: a reader that leaves gives neither EPIPE nor end of file, and one that returns goes on where
 * the other stopped. The stdin FIFO is held open for writing by ourselves until IO_CLOSE_STDIN.
 */
#include "keeper.h"
#include "daemon.h"
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
#define COPY_SIZE (32 * 1024)
#define SPLICE_MIN 8192 /* after a piece as large as this the next is spliced, after a smaller one copied: slots are two thirds full */
#define LOOK_MS 100
#define LOOK_ALONE_MS 1000
#define READER_LOOK_MS 20

enum { KIND_NONE, KIND_FIFO, KIND_FILE, KIND_LOGGER };
enum { IO_ALL_PIPES = 1 };

struct flow {
  struct io *io;
  struct watch from, to;
  bool open, may_splice, splicing, grown, to_pollable;
  struct buffer pending; /* read, not yet written */
  struct timer again;    /* look whether the rest has been read */
  int left;              /* write end of a FIFO that has unread bytes, after the end; 0: none */
  uint64_t look_ms;
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
  struct watch console, console_peer;
  char *console_path;
  struct logger *logger;
  struct tag opening; /* IO_OPEN to be answered when the log program is ready, or readers have come */
  struct {
    char *path; /* of an output FIFO that nobody has opened for reading yet; NULL: none */
    int from;   /* the container's pipe; -1: a terminal's */
  } absent[2];
  struct timer readers;
  uint64_t readers_until_ms, readers_look_ms;
  struct drain *drains;
  struct io *next;
};

static struct io *ios;
/* Between a read and a write of one flow; what couldn't be written goes into its `pending`. */
static uint8_t scratch[COPY_SIZE];

struct io *io_find(const char *key) {
  for (struct io *io = ios; key && io; io = io->next)
    if (!strcmp(io->key, key)) return io;
  return NULL;
}

static bool is_drained(const struct io *io) {
  return !io->out.open && !io->err.open && !io->absent[0].path && !io->absent[1].path && (!io->logger || logger_is_drained(io->logger));
}

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

static void drained(struct io *io) {
  if (is_drained(io))
    while (io->drains) drain_end(io->drains, 0);
}

void io_logger_drained(struct io *io) { drained(io); }

static void look_due(struct timer *timer) {
  struct flow *f = container_of(timer, struct flow, again);
  struct pollfd p = {.fd = f->left};
  int unread = 0;
  if (ioctl(f->left, FIONREAD, &unread) < 0 || unread == 0) {
    close(f->left);
    f->left = 0;
    return;
  }
  /* Our fd can only write, so POLLERR says that there is no reader. */
  uint64_t longest = poll(&p, 1, 0) > 0 && p.revents & POLLERR ? LOOK_ALONE_MS : LOOK_MS;
  f->look_ms = f->look_ms * 2 > longest ? longest : f->look_ms * 2;
  timer_start(timer, f->look_ms, look_due);
}

/*
 * The process has ended. A FIFO loses its bytes with its last fd, so one that has unread bytes is kept until they are read, or
 * IO_FREE: its reader may be away, or leaving. But readers must see the end soon, because clients wait for it before they call
 * Delete. Nothing tells of a FIFO that has become empty, so we look: after a millisecond, then ever less often.
 */
static void keep_unread(struct flow *f) {
  int unread = 0;
  struct stat st;
  if (f == &f->io->in || fstat(f->to.fd, &st) < 0 || !S_ISFIFO(st.st_mode) || ioctl(f->to.fd, FIONREAD, &unread) < 0 || unread == 0) return;
  autofree char *path = format("/proc/self/fd/%d", f->to.fd);
  int fd = open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
  if (fd < 0) return;
  watch_close(&f->to);
  f->left = fd;
  f->look_ms = 1;
  timer_start(&f->again, f->look_ms, look_due);
}

static void flow_stop(struct flow *f, bool ended) {
  if (!f->open) return;
  f->open = false;
  timer_stop(&f->again);
  watch_close(&f->from);
  if (ended) keep_unread(f);
  watch_close(&f->to);
  buffer_free(&f->pending);
  drained(f->io);
}

static void flow_close(struct flow *f) {
  flow_stop(f, false);
  if (!f->left) return;
  timer_stop(&f->again);
  close(f->left);
  f->left = 0;
}

static bool is_ready(int fd, short events) {
  struct pollfd p = {.fd = fd, .events = events};
  return poll(&p, 1, 0) > 0;
}

/* Once: for a stream that is loud, or whose reader is away. */
static void flow_grow(struct flow *f) {
  if (f->grown || !f->may_splice) return;
  f->grown = true; /* EPERM: over the user's limit; they stay as they are */
  fcntl(f->from.fd, F_SETPIPE_SZ, PIPE_SIZE);
  fcntl(f->to.fd, F_SETPIPE_SZ, PIPE_SIZE);
}

/* Moves some; 1: moved, 0: end, -EAGAIN: one side isn't ready, other -errno: the target takes nothing. */
static int move_some(struct flow *f) {
  ssize_t n;
  if (buffer_length(&f->pending)) {
    n = write(f->to.fd, f->pending.data + f->pending.start, buffer_length(&f->pending));
    if (n < 0) return -errno;
    buffer_consume(&f->pending, (size_t)n);
    return 1;
  }
  if (f->splicing) {
    n = splice(f->from.fd, NULL, f->to.fd, NULL, PIPE_SIZE, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    if (n < 0) return -errno;
    f->splicing = n >= SPLICE_MIN;
    if (n >= COPY_SIZE) flow_grow(f);
    return n > 0 ? 1 : 0;
  }
  n = read(f->from.fd, scratch, COPY_SIZE);
  if (n < 0) return errno == EIO ? 0 : -errno; /* EIO: the last slave of a pty was closed */
  if (n == 0) return 0;
  ssize_t written = write(f->to.fd, scratch, (size_t)n);
  int error = written < 0 ? errno : 0;
  if (written < n) buffer_append(&f->pending, scratch + (error ? 0 : written), (size_t)(n - (error ? 0 : written)));
  if (error) return -error;
  f->splicing = f->may_splice && n >= SPLICE_MIN;
  return 1;
}

/* The target takes nothing: end of the flow. */
static void flow_failed(struct flow *f, int error) {
  if (error != EPIPE && error != EIO) /* these two: the process, or its terminal, has ended */
    daemon_log_line("%s/%s: stdio of %s: %s", keeper.namespace, keeper.id, f->io->key, strerror(error));
  flow_close(f);
}

static void flow_run(struct flow *f) {
  for (unsigned round = 0; round < ROUNDS; round++) {
    int moved = move_some(f);
    if (moved == 1 || moved == -EINTR) continue;
    if (moved == 0) {
      flow_stop(f, true);
      return;
    }
    if (moved != -EAGAIN) {
      flow_failed(f, -moved);
      return;
    }
    bool from_ready = buffer_length(&f->pending) || is_ready(f->from.fd, POLLIN);
    if (from_ready && f->to_pollable) {
      flow_grow(f);
      watch_events(&f->to, EPOLLOUT | EPOLLONESHOT);
    } else {
      watch_events(&f->from, EPOLLIN | EPOLLONESHOT);
    }
    return;
  }
  /* Enough for now: the others' turn. */
  if (buffer_length(&f->pending) && f->to_pollable) watch_events(&f->to, EPOLLOUT | EPOLLONESHOT);
  else watch_events(&f->from, EPOLLIN | EPOLLONESHOT);
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
static void flow_open(struct flow *f, struct io *io, int from, int to, bool may_splice) {
  struct stat st;
  fcntl(from, F_SETFL, fcntl(from, F_GETFL) | O_NONBLOCK);
  fcntl(to, F_SETFL, fcntl(to, F_GETFL) | O_NONBLOCK);
  *f = (struct flow){.io = io, .from = {.fd = from, .ready = from_ready}, .to = {.fd = to, .ready = to_ready}, .open = true, .may_splice = may_splice};
  f->to_pollable = fstat(to, &st) == 0 && !(S_ISCHR(st.st_mode) && !isatty(to));
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

/* Without O_NONBLOCK an open would wait for the other side, and everything of the pod with it. */
static int open_fifo(const char *path, int mode, char **why) {
  autofd fd = open(path, mode | O_NONBLOCK | O_CLOEXEC);
  struct stat st;
  if (fd < 0 || fstat(fd, &st) < 0) {
    int error = errno;
    *why = format("open %s: %s", path, strerror(error));
    return -error;
  }
  if (!S_ISFIFO(st.st_mode)) {
    *why = format("%s is not a FIFO", path);
    return -EINVAL;
  }
  int result = fd;
  fd = -1;
  return result;
}

/* An output's target; *why says what failed. */
static int open_target(int kind, const char *path, char **why) {
  if (kind == KIND_FIFO) return open_fifo(path, O_RDWR, why);
  int fd = open("/dev/null", O_WRONLY | O_CLOEXEC);
  if (fd >= 0) return fd;
  int error = errno;
  *why = format("open /dev/null: %s", strerror(error));
  return -error;
}

int io_make_pipe(int ends[2], const struct message *m) {
  if (pipe2(ends, O_CLOEXEC) < 0) return -errno;
  int64_t uid = message_int(m, FIELD_UID), gid = message_int(m, FIELD_GID);
  if ((uid == 0 && gid == 0) || fchown(ends[0], (uid_t)uid, (gid_t)gid) == 0) return 0;
  int error = errno;
  close(ends[0]);
  close(ends[1]);
  return -error;
}

/* Everything of an io object but the memory, which the loop frees. A log program that must be waited for goes on by itself: false. */
static bool io_destroy(struct io *io, struct tag tag) {
  for (struct io **at = &ios; *at; at = &(*at)->next)
    if (*at == io) {
      *at = io->next;
      break;
    }
  io_console_done(io);
  flow_close(&io->in);
  flow_close(&io->out);
  flow_close(&io->err);
  timer_stop(&io->readers);
  for (int i = 0; i < 2; i++) {
    if (io->absent[i].path && io->absent[i].from >= 0) close(io->absent[i].from);
    free(io->absent[i].path);
    io->absent[i].path = NULL;
  }
  while (io->drains) drain_end(io->drains, 0);
  close_all(io);
  bool gone = !io->logger || logger_end(io->logger, tag);
  tag_free(&io->opening);
  free(io->key);
  loop_free_later(io);
  return gone;
}

void io_logger_started(struct io *io, int error, const char *why) {
  if (!error && (io->absent[0].path || io->absent[1].path)) return; /* readers_due follows */
  struct tag tag = io->opening;
  io->opening = (struct tag){0};
  result_send(tag, error, why);
  tag_free(&tag);
  if (error) io_destroy(io, (struct tag){0});
}

/*
 * A client opens its FIFOs while it asks for the process. One that is still about to when the process has ended already may take the
 * end for its own and read nothing; so, as with the Go shim, nothing is begun before the readers have come. Unlike there, not for ever.
 *
 * -ENXIO: nobody has opened the FIFO for reading yet. Else an fd, which the caller closes when its own is open: a reader that was let
 * in by this one would see the end without it.
 */
static int reader_of(const char *path) {
  int fd = open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
  return fd < 0 ? -errno : fd;
}

static void readers_due(struct timer *timer) {
  struct io *io = container_of(timer, struct io, readers);
  bool late = now_ms() >= io->readers_until_ms;
  for (int i = 0; i < 2; i++) {
    autofree char *path = io->absent[i].path;
    autofree char *why = NULL;
    if (!path) continue;
    autofd reader = reader_of(path);
    if (reader == -ENXIO && !late) {
      path = NULL; /* still absent */
      continue;
    }
    io->absent[i].path = NULL;
    int target = open_fifo(path, O_RDWR, &why);
    if (target < 0) { /* its client has removed it: nobody will read */
      daemon_log_line("output of %s has nowhere to go: %s", io->key, why);
      target = open("/dev/null", O_WRONLY | O_CLOEXEC);
    }
    if (!io->terminal) flow_open(i == 0 ? &io->out : &io->err, io, io->absent[i].from, target, true);
    else if (io->master >= 0) flow_open(&io->out, io, fcntl(io->master, F_DUPFD_CLOEXEC, 3), target, false);
    else io->target[0] = target;
  }
  if (io->absent[0].path || io->absent[1].path) {
    io->readers_look_ms = io->readers_look_ms * 2 > READER_LOOK_MS ? READER_LOOK_MS : io->readers_look_ms * 2;
    timer_start(timer, io->readers_look_ms, readers_due);
    return;
  }
  if (io->logger && logger_is_starting(io->logger)) return; /* io_logger_started follows */
  struct tag tag = io->opening;
  io->opening = (struct tag){0};
  result_send(tag, 0, NULL);
  tag_free(&tag);
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
  io->target[0] = io->target[1] = io->console.fd = io->console_peer.fd = -1;
  int kinds[2] = {(int)message_int(m, FIELD_STDOUT_KIND), (int)message_int(m, FIELD_STDERR_KIND)};
  const char *paths[2] = {message_string(m, FIELD_STDOUT), message_string(m, FIELD_STDERR)};
  int64_t limit_ms = message_int(m, FIELD_TIMEOUT_MS);
  bool all_pipes = !io->terminal && (message_int(m, FIELD_FLAGS) & IO_ALL_PIPES);
  autofree char *why = NULL;
  int result = 0;
  if (in) {
    io->stdin_fifo = result = open_fifo(in, O_RDONLY, &why);
    if (result >= 0) io->stdin_keep = result = open_fifo(in, O_WRONLY, &why);
    if (result > 0) result = 0;
  }
  if (result == 0 && kinds[0] == KIND_LOGGER) {
    result = logger_start(m, io, io->target, &io->logger, &why);
    if (result == 0 && io->terminal) close_fd(&io->target[1]);
  } else {
    const char *files[2] = {NULL, NULL};
    for (int i = 0; i < (io->terminal ? 1 : 2); i++)
      if (kinds[i] == KIND_FILE) files[i] = paths[i] ? paths[i] : "";
    if (result == 0 && (files[0] || files[1])) result = logger_start_files(m, io, files, io->target, &io->logger, &why);
    for (int i = 0; i < 2 && result == 0; i++) {
      if (kinds[i] == KIND_FILE) continue;
      if (kinds[i] == KIND_NONE && !(io->terminal && i == 0) && !all_pipes) continue;
      autofd reader = kinds[i] == KIND_FIFO && paths[i] && limit_ms > 0 ? reader_of(paths[i]) : -1;
      if (reader == -ENXIO) {
        io->absent[i].path = copy_string(paths[i]);
        io->absent[i].from = -1;
        continue;
      }
      io->target[i] = open_target(kinds[i], paths[i] ? paths[i] : "", &why);
      if (io->target[i] < 0) result = io->target[i];
    }
  }
  if (result == 0 && !io->terminal) {
    int ends[2];
    if (io->stdin_fifo >= 0 && (result = io_make_pipe(ends, m)) == 0) {
      io->child[0] = ends[0];
      flow_open(&io->in, io, io->stdin_fifo, ends[1], true);
      io->stdin_fifo = -1;
    } else if (result == 0 && all_pipes && (result = io_make_pipe(ends, m)) == 0) {
      io->child[0] = ends[0];
      close(ends[1]); /* it reads the end, as from /dev/null */
    }
    for (int i = 0; i < 2 && result == 0; i++) {
      if (io->absent[i].path && (result = io_make_pipe(ends, m)) == 0) {
        io->child[1 + i] = ends[1];
        io->absent[i].from = ends[0];
      }
      if (io->target[i] < 0) continue;
      if (kinds[0] == KIND_LOGGER || kinds[i] == KIND_FILE) {
        io->child[1 + i] = io->target[i]; /* the program reads the container's pipe itself */
      } else if ((result = io_make_pipe(ends, m)) == 0) {
        io->child[1 + i] = ends[1];
        flow_open(i == 0 ? &io->out : &io->err, io, ends[0], io->target[i], kinds[i] == KIND_FIFO);
      } else {
        break;
      }
      io->target[i] = -1;
    }
  }
  io->next = ios;
  ios = io;
  if (result < 0) {
    result_send(tag, -result, why ? why : strerror(-result));
    io_destroy(io, (struct tag){0});
  } else if (!io->logger && !io->absent[0].path && !io->absent[1].path) {
    result_send(tag, 0, NULL);
  } else {
    io->opening = tag_copy(tag);
    if (!io->absent[0].path && !io->absent[1].path) return; /* the logger's word follows */
    io->readers_until_ms = now_ms() + (uint64_t)limit_ms;
    io->readers_look_ms = 1;
    timer_start(&io->readers, io->readers_look_ms, readers_due);
  }
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
  if (io->target[0] >= 0) flow_open(&io->out, io, fcntl(master, F_DUPFD_CLOEXEC, 3), io->target[0], false);
  if (io->stdin_fifo >= 0) flow_open(&io->in, io, io->stdin_fifo, fcntl(master, F_DUPFD_CLOEXEC, 3), false);
  io->target[0] = io->stdin_fifo = -1;
}

/* The message with the pty master, if it has come. Whatever it is, the connection has served. */
static void console_receive(struct io *io) {
  char data[64];
  union {
    struct cmsghdr header;
    char space[CMSG_SPACE(sizeof(int))];
  } control;
  struct iovec part = {data, sizeof data};
  /* CMSG_LEN, not CMSG_SPACE: its padding has room for a second fd. */
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = CMSG_LEN(sizeof(int))};
  if (io->console_peer.fd < 0) return;
  ssize_t n = recvmsg(io->console_peer.fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  struct cmsghdr *c = n < 0 ? NULL : CMSG_FIRSTHDR(&message);
  if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS && c->cmsg_len == CMSG_LEN(sizeof(int))) {
    int fd;
    memcpy(&fd, CMSG_DATA(c), sizeof fd);
    if (isatty(fd) && !(message.msg_flags & MSG_CTRUNC)) master_arrived(io, fd);
    else close(fd);
  }
  watch_close(&io->console_peer);
}

static void console_peer_ready(struct watch *watch, uint32_t events) {
  (void)events;
  console_receive(container_of(watch, struct io, console_peer));
}

/* One connection at a time: one that says nothing makes way for the next. */
static bool console_accept(struct io *io) {
  int fd = accept4(io->console.fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) return false;
  watch_close(&io->console_peer);
  io->console_peer = (struct watch){.fd = fd, .ready = console_peer_ready};
  watch_events(&io->console_peer, EPOLLIN);
  return true;
}

static void console_ready(struct watch *watch, uint32_t events) {
  (void)events;
  console_accept(container_of(watch, struct io, console));
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
  do console_receive(io); /* sent by one that has ended meanwhile, but not yet seen */
  while (io->master < 0 && console_accept(io));
  watch_close(&io->console_peer);
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
  if (io) io_spawned(io); /* of one that never started, our own ends would keep the flows open */
  if (!io || is_drained(io)) {
    result_send(tag, 0, NULL);
    return;
  }
  struct drain *d = allocate(sizeof *d);
  *d = (struct drain){.tag = tag_copy(tag), .io = io, .next = io->drains};
  io->drains = d;
  if (io->logger) logger_drain(io->logger);
  timer_start(&d->timer, (uint64_t)message_int(m, FIELD_TIMEOUT_MS), drain_due);
}

void io_free(const struct message *m) {
  struct tag tag = tag_of(m);
  struct io *io = io_find(message_string(m, FIELD_IO));
  if (io && io->opening.step) result_send(io->opening, ECANCELED, "the io object was freed before it was ready");
  if (!io || io_destroy(io, tag)) result_send(tag, 0, NULL);
}

void io_leave(void) {
  for (struct io *io = ios; io; io = io->next)
    if (io->console_path) unlink(io->console_path);
}
