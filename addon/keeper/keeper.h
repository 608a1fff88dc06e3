/*
 * The keeper's parts, in one process with one epoll loop. Who owns what:
 *   keeper.c    the loop, the lifeline to cedanad, tasks, and what arrives from cedanad
 *   requests.c  the TTRPC socket, its connections, requests and the results of their operations
 *   children.c  spawned and adopted processes
 *   io.c        stdio
 *   logger.c    log programs, and who writes log files
 *   mount.c     mounts
 *   events.c    events for containerd
 */
#pragma once
#include "loop.h"
#include "protocol.h"

/* The tag of an operation. Its strings live as long as the message that it came in. */
struct tag {
  int64_t request;
  const char *step;
};
struct tag tag_of(const struct message *m);
/* A copy that outlives the message. */
struct tag tag_copy(struct tag tag);
void tag_free(struct tag *tag);

/* ---- keeper.c ---- */
struct keeper {
  const char *namespace, *id, *address, *ttrpc_address, *publish_binary, *bundle, *socket_path;
  int listening;
};
extern struct keeper keeper;
/* Never returns. `cedanad`: a connection to it. */
_Noreturn void keeper_run(int cedanad);
/* Frames for cedanad go here; keeper_flush sends them. Dropped while no cedanad has been welcomed. */
struct buffer *to_cedanad(void);
bool cedanad_ready(void);
/* A descriptor of our own for one of cedanad's, CLOEXEC; -1 where that can't be had. The caller closes it. */
int cedanad_fd(int64_t number);
void keeper_flush(void);
/* A request or exit is on its way: cedanad must show that it lives. */
void expect_pong(void);
bool keeper_has_pid(pid_t pid);
struct task {
  char *id, *bundle;
  int64_t pid;
  unsigned exec_count;
  int64_t *exec_pids;
  int event_fd; /* memory.oom_control of cgroups version 1; -1: none */
  struct watch oom;
  char *oom_file;    /* memory.events; NULL: version 1 of cgroups */
  int64_t oom_kills; /* that it counted, and that were told */
  bool oom_pending;
  struct timer oom_pause;
  struct task *next;
};
struct task *task_find(const char *id);
/* RESULT, remembered with its request. `extra` may add fields. */
void result_send(struct tag tag, int errno_, const char *message);
size_t result_begin(struct buffer *out, struct tag tag, int errno_, const char *message);
void result_end(struct tag tag, struct buffer *out, size_t begin);
void oom_watch(const struct message *m);

/* ---- requests.c ---- */
void requests_listen(int fd);
void requests_resend(void);
void requests_response(const struct message *m);
void requests_taken(const struct message *m);
void requests_parked(const struct message *m);
/* A stopped connection may go on: its buffer is read before the next events. */
void requests_resume(void);
unsigned requests_open(void);
/* Whether every response has gone out. */
bool requests_flushed(void);
/* now_ms of the arrival of the oldest request that doesn't only wait; UINT64_MAX: none. */
uint64_t requests_oldest_working_ms(void);
/* The pod's socket goes; its connections stay. */
void requests_unlisten(void);
uint64_t requests_last_ms(void);
/* Whether the operation needn't be done: it was done (its result is sent again) or is under way. */
bool requests_repeated(struct tag tag, int type);
void requests_remember(struct tag tag, const void *frame, size_t length);
void requests_cedanad_gone(void);

/* ---- children.c ---- */
/* A process that we have started. Its owner is called once, when it has been reaped, and has the memory again from then on. */
struct child {
  pid_t pid;
  void (*ended)(struct child *child, int status);
  struct child *next;
};
void child_watch(struct child *child, pid_t pid, void (*ended)(struct child *child, int status));
int children_init(void);
void children_spawn(const struct message *m);
void children_signal(const struct message *m);
void children_resend_exits(void);
void children_ack(int64_t sequence);
/* A log program with its fds 3, 4, 5; -1: none. argv NULL: ourselves, by the name in `own`. Returns the pid, or -errno. */
pid_t children_start_logger(char **argv, char *const *own, char **env, int out, int err, int ready);

/* ---- io.c ---- */
struct io;
struct io *io_find(const char *key);
void io_open(const struct message *m);
/* The fds for a child; -1 for /dev/null. Valid until io_spawned. */
void io_child_fds(struct io *io, int fds[3]);
/* The child has its fds: ours of its ends are closed. */
void io_spawned(struct io *io);
/* Listens for the pty master; a path that is in the way is removed. */
int io_console_listen(struct io *io, const char *path);
void io_console_done(struct io *io);
void io_resize(const struct message *m);
void io_close_stdin(const struct message *m);
void io_drain(const struct message *m);
void io_free(const struct message *m);
/* What would be left of us in the file system. */
void io_leave(void);
/* A pipe, its owner as the message says. */
int io_make_pipe(int ends[2], const struct message *m);
void io_logger_started(struct io *io, int error, const char *why);
void io_logger_drained(struct io *io);

/* ---- logger.c ---- */
struct logger;
/* Starts the program; io_logger_started tells the rest. The caller has the pipes' write ends. */
int logger_start(const struct message *m, struct io *io, int write_ends[2], struct logger **out, char **why);
/* The same for log files, by a process of our own (file-log.c). NULL: not that stream, whose write end is -1. -EINVAL for a relative path. */
int logger_start_files(const struct message *m, struct io *io, const char *const paths[2], int write_ends[2], struct logger **out, char **why);
bool logger_is_starting(const struct logger *l);
/* Looks for its having read everything; io_logger_drained tells. */
void logger_drain(struct logger *l);
bool logger_is_drained(const struct logger *l);
/* Its streams are closed by now. False: it must be waited for; `tag` is answered when it is gone. */
bool logger_end(struct logger *l, struct tag tag);

/* ---- mount.c ---- */
/* MOUNT and UNMOUNT. */
void mount_operate(const struct message *m);
int unmount_below(const char *target, char **why);

/* ---- events.c ---- */
void events_queue(const struct message *m);
void events_forget(const char *id);
bool events_idle(void);
