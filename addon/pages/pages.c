/*
 * libcedana-pages.so: preloaded into `criu lazy-pages`, the daemon that fills the memory of a container restored lazily.
 *
 * A userfaultfd that nobody holds any more is gone, and what it had not filled yet reads as zeros, without an error. So the daemon must
 * not be the only one to hold them, and whoever else does must have them before the first page can be asked for: also those of
 * processes that the container forks, which come into being inside the daemon's read(2). Only a shared table of file descriptors can do
 * that, and execve(2) ends the sharing. Hence a library, which divides the process when it has been executed already:
 *
 *   guard (the process that was spawned) ─┬─ daemon (its child, which goes on to be CRIU)      all three with one table of
 *                                         └─ holder (its child, in a session of its own)     file descriptors
 *
 * The guard waits for the daemon. Exit status 0, all memory is filled: the guard ends the holder, and with 0. Any other end, by a signal
 * too: the guard ends with 1, and the holder, which does nothing but keep the descriptors, stays as long as a process lives whose memory
 * they are. A program that touches what is missing then waits, until somebody kills it; a restore under way fails, because its socket is
 * shut. The holder stays in the same way when the guard is killed, or both are.
 *
 * The environment, which the daemon doesn't see any more:
 *   CEDANA_PAGES_DIR          absolute; without it the library does nothing
 *   CEDANA_PAGES_CHECKPOINT        directory of the checkpoint, absolute: locked (flock(2), shared) as long as one of the three processes lives
 *   CEDANA_PAGES_DEADLINE_MS  how long the daemon may wait for a restore to connect
 * Files in CEDANA_PAGES_DIR, each put there by rename:
 *   guard   "GUARD DAEMON HOLDER\n", their pids, before CRIU begins
 *   ended   "exit STATUS\n", "signal NUMBER\n" or "deadline 0\n"
 * Signals: SIGTERM to the guard ends the daemon as SIGKILL does; all others that can be blocked are.
 *
 * No file descriptor may be closed here that isn't ours: they are the daemon's.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define HOLDER_LOOKS_MS 50

static const char *directory;

static uint64_t now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* fork(2) with one table of file descriptors for both. The C library's idea of its thread's id is wrong in the child; nobody asks. */
static pid_t divide(void) { return (pid_t)syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0); }

/* A file that is there whole or not at all. What can't be told isn't: whoever waits for it looks at the process, too. */
static bool tell(const char *name, const char *text) {
  char path[4096], temporary[4096];
  if (snprintf(path, sizeof path, "%s/%s", directory, name) >= (int)sizeof path) return false;
  if (snprintf(temporary, sizeof temporary, "%s/%s.new", directory, name) >= (int)sizeof temporary) return false;
  int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0) return false;
  bool whole = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
  close(fd);
  return whole && rename(temporary, path) == 0;
}

/* ---- the descriptors ---- */

/* Calls `look` for each descriptor until one says yes. */
static bool any_descriptor(bool (*look)(int fd)) {
  DIR *list = opendir("/proc/self/fd");
  if (!list) return true; /* no way to know: then they are there */
  bool found = false;
  for (struct dirent *entry; !found && (entry = readdir(list));) {
    int fd = atoi(entry->d_name);
    if (entry->d_name[0] != '.' && fd != dirfd(list)) found = look(fd);
  }
  closedir(list);
  return found;
}

static bool is_userfaultfd(int fd) {
  char name[32], target[64];
  snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(name, target, sizeof target - 1);
  if (length < 0) return false;
  target[length] = 0;
  return strcmp(target, "anon_inode:[userfaultfd]") == 0;
}

/*
 * Whether the process of a userfaultfd has memory still. Asked by a copy that can't succeed: its source is never mapped, so no page
 * is changed, wherever it was to go. ESRCH comes first when the process has ended.
 */
static bool has_process(int fd) {
  if (!is_userfaultfd(fd)) return false;
  long page = sysconf(_SC_PAGESIZE);
  static void *unreadable;
  if (!unreadable) unreadable = mmap(NULL, (size_t)page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  struct uffdio_copy copy = {.dst = 1 << 20, .src = (uintptr_t)unreadable, .len = (uint64_t)page};
  return !(ioctl(fd, UFFDIO_COPY, &copy) < 0 && errno == ESRCH);
}

static bool socket_option(int fd, int option, int wanted) {
  int value = 0;
  socklen_t size = sizeof value;
  return getsockopt(fd, SOL_SOCKET, option, &value, &size) == 0 && value == wanted;
}

static bool is_connection(int fd) {
  return socket_option(fd, SO_DOMAIN, AF_UNIX) && socket_option(fd, SO_TYPE, SOCK_STREAM) && socket_option(fd, SO_ACCEPTCONN, 0);
}

static bool is_listener(int fd) { return socket_option(fd, SO_DOMAIN, AF_UNIX) && socket_option(fd, SO_ACCEPTCONN, 1); }

/* From here on a restore that has more to say fails. What it has sent, and the daemon hasn't taken, is ours. */
static bool take_what_was_sent(int fd) {
  if (!is_connection(fd)) return false;
  shutdown(fd, SHUT_RDWR);
  char byte[64];
  union {
    char room[CMSG_SPACE(16 * sizeof(int))];
    struct cmsghdr align;
  } control;
  for (;;) {
    struct iovec data = {byte, sizeof byte};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof control.room};
    ssize_t n = recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
  }
}

/* A restore that connected, and that nobody has accepted, must not wait for ever. */
static bool close_listener(int fd) {
  if (is_listener(fd)) shutdown(fd, SHUT_RDWR);
  return false;
}

/* ---- the processes ---- */

/* main's arguments, which lie one after another; 0: the C library doesn't give them to constructors (musl), and the name alone changes */
static char *arguments;
static size_t arguments_room;

/* So that who means CRIU doesn't mean the guard: `pkill -f criu` would end both at once. */
static void change_name(void) {
  prctl(PR_SET_NAME, "cedana-pages");
  if (!arguments_room) return;
  memset(arguments, 0, arguments_room);
  snprintf(arguments, arguments_room, "cedana-pages");
}

/* What to do when the daemon has ended, and not well. */
static void take_over(void) {
  any_descriptor(close_listener);
  any_descriptor(take_what_was_sent);
}

/* The holder: nothing to do while the guard lives. Without it, the daemon may go on, and end well: then it has closed what it had. */
static void hold(pid_t parent, int daemon) {
  setsid();
  change_name();
  sigset_t orphaned;
  sigemptyset(&orphaned);
  sigaddset(&orphaned, SIGUSR1);
  prctl(PR_SET_PDEATHSIG, SIGUSR1);
  while (getppid() == parent) sigtimedwait(&orphaned, NULL, NULL);
  struct pollfd end = {.fd = daemon, .events = POLLIN};
  while (poll(&end, 1, -1) < 0 && errno == EINTR) continue;
  if (end.revents & POLLIN) take_over();
  while (any_descriptor(has_process)) poll(NULL, 0, HOLDER_LOOKS_MS);
  _exit(0);
}

static void guard(pid_t daemon, pid_t holder, uint64_t deadline) {
  sigset_t waited;
  sigemptyset(&waited);
  sigaddset(&waited, SIGCHLD);
  sigaddset(&waited, SIGTERM);
  bool too_late = false;
  int status;
  for (;;) {
    pid_t ended = waitpid(daemon, &status, WNOHANG);
    if (ended == daemon) break;
    if (ended < 0 && errno != EINTR) { /* can't be: it is our child, and nobody else waits for it */
      status = SIGKILL;
      break;
    }
    struct timespec patience = {0, 0}, *limit = NULL;
    if (deadline) {
      uint64_t now = now_ms();
      if (now >= deadline) {
        too_late = any_descriptor(is_listener); /* CRIU closes it with the connection that it waits for */
        deadline = 0;
        if (too_late) kill(daemon, SIGKILL);
        continue;
      }
      patience = (struct timespec){(time_t)((deadline - now) / 1000), (long)((deadline - now) % 1000) * 1000000};
      limit = &patience;
    }
    if (sigtimedwait(&waited, NULL, limit) == SIGTERM) kill(daemon, SIGKILL);
  }
  char text[64];
  bool good = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  if (!good) take_over();
  if (too_late) snprintf(text, sizeof text, "deadline 0\n");
  else if (WIFEXITED(status)) snprintf(text, sizeof text, "exit %d\n", WEXITSTATUS(status));
  else snprintf(text, sizeof text, "signal %d\n", WTERMSIG(status));
  tell("ended", text);
  if (good || !any_descriptor(has_process)) kill(holder, SIGKILL);
  _exit(good ? 0 : 1);
}

__attribute__((constructor)) static void begin(int argc, char **argv) {
  directory = getenv("CEDANA_PAGES_DIR");
  if (!directory || directory[0] != '/') return;
  directory = strdup(directory);
  const char *checkpoint = getenv("CEDANA_PAGES_CHECKPOINT"), *patience = getenv("CEDANA_PAGES_DEADLINE_MS");
  int lock = checkpoint ? open(checkpoint, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
  uint64_t deadline = patience && atoll(patience) > 0 ? now_ms() + (uint64_t)atoll(patience) : 0;
  if (!directory || lock < 0 || flock(lock, LOCK_SH | LOCK_NB) < 0) {
    static const char text[] = "cedana-pages: lock the checkpoint: it is gone, or being removed\n";
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0) { /* nobody to tell */
    }
    _exit(1);
  }
  for (const char *const *name = (const char *const[]){"CEDANA_PAGES_DIR", "CEDANA_PAGES_CHECKPOINT", "CEDANA_PAGES_DEADLINE_MS", "LD_PRELOAD", NULL}; *name; name++)
    unsetenv(*name);
  sigset_t all, before;
  sigfillset(&all);
  sigprocmask(SIG_BLOCK, &all, &before);
  pid_t self = getpid();
  int ready[2]; /* closed by the kernel in neither: the daemon waits until the guard has told who they are */
  if (pipe2(ready, O_CLOEXEC) < 0) _exit(1);
  pid_t daemon = divide();
  if (daemon < 0) _exit(1);
  if (daemon == 0) {
    char byte;
    while (read(ready[0], &byte, 1) < 0 && errno == EINTR) continue;
    close(ready[0]);
    close(ready[1]);
    sigprocmask(SIG_SETMASK, &before, NULL);
    return; /* on to be CRIU */
  }
#ifdef __GLIBC__
  if (argc > 0) {
    arguments = argv[0];
    arguments_room = (size_t)(argv[argc - 1] + strlen(argv[argc - 1]) - argv[0]);
  }
#else
  (void)argc, (void)argv;
#endif
  int ended = (int)syscall(SYS_pidfd_open, daemon, 0);
  pid_t holder = ended < 0 ? -1 : divide();
  if (holder == 0) hold(self, ended);
  change_name();
  char text[64];
  snprintf(text, sizeof text, "%d %d %d\n", (int)self, (int)daemon, (int)holder);
  /* A daemon that isn't guarded as it should be is none. */
  if (holder < 0 || !tell("guard", text) || write(ready[1], "", 1) < 0) {
    kill(daemon, SIGKILL);
    if (holder > 0) kill(holder, SIGKILL);
    _exit(1);
  }
  guard(daemon, holder, deadline);
}
