#include "daemon.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "cgroup.h"
#include "spawn.h"

extern char **environ;

#define DAEMON_PATH "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

bool daemon_as_sibling;

const char *daemon_socket(void) {
  static char *path;
  if (path) return path;
  uint64_t own = mount_namespace("/proc/self/ns/mnt"), first = mount_namespace("/proc/1/ns/mnt");
  if (own != first) path = format("%s/cedanad-%llu.sock", run_directory(), (unsigned long long)own);
  else path = format("%s/cedanad.sock", run_directory());
  return path;
}

const char *daemon_log(void) {
  static char *path;
  if (!path) path = format("%s/cedanad.log", run_directory());
  return path;
}

uint64_t daemon_patience_ms(void) { return environment_number("CEDANA_KEEPER_PATIENCE_MS", 10000); }

int daemon_connect(void) { return connect_unix(daemon_socket()); }

void daemon_log_line(const char *text, ...) {
  autofd fd = open(daemon_log(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) return;
  char line[512], stamp[32];
  time_t now = time(NULL);
  struct tm parts;
  gmtime_r(&now, &parts);
  strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ", &parts);
  int used = snprintf(line, sizeof line, "%s keeper[%d]: ", stamp, (int)getpid());
  va_list list;
  va_start(list, text);
  int more = vsnprintf(line + used, sizeof line - (size_t)used - 1, text, list);
  va_end(list);
  size_t length = (size_t)used + (size_t)(more < 0 ? 0 : more);
  if (length > sizeof line - 2) length = sizeof line - 2;
  line[length++] = '\n';
  write_all(fd, line, length);
}

static int open_lock(void) {
  autofree char *path = format("%s.lock", daemon_socket());
  int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  return fd < 0 ? -errno : fd;
}

/* Whether the process has the lock file open. Its pid alone may be that of another process by now. */
static bool has_lock_open(pid_t pid, int lock) {
  struct stat wanted, st;
  autofree char *path = format("/proc/%d/fd", (int)pid);
  DIR *directory = fstat(lock, &wanted) == 0 ? opendir(path) : NULL;
  bool found = false;
  for (struct dirent *entry; directory && !found && (entry = readdir(directory));)
    found = fstatat(dirfd(directory), entry->d_name, &st, 0) == 0 && st.st_ino == wanted.st_ino && st.st_dev == wanted.st_dev;
  if (directory) closedir(directory);
  return found;
}

int daemon_lock_holder(pid_t *pid) {
  autofd lock = open_lock();
  if (lock < 0) return lock;
  if (flock(lock, LOCK_SH | LOCK_NB) == 0) return -ENOENT;
  char text[32] = {0};
  if (pread(lock, text, sizeof text - 1, 0) <= 0) return -ENOENT;
  int64_t number = parse_number(text);
  if (number <= 1 || number > INT32_MAX) return -ENOENT;
  *pid = (pid_t)number;
  autofd pidfd = (int)syscall(SYS_pidfd_open, *pid, 0);
  if (pidfd < 0) return -errno;
  if (!has_lock_open(*pid, lock)) return -ENOENT;
  int result = pidfd;
  pidfd = -1;
  return result;
}

void daemon_kill(int pidfd, pid_t pid, uint64_t waited_ms) {
  daemon_log_line("cedanad (pid %d) has not answered for %llu ms: killed", (int)pid, (unsigned long long)waited_ms);
  syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0);
}

/* Bound and listening, with mode 0600 from its first moment. */
static int make_listener(const char *path) {
  struct sockaddr_un address;
  unsigned length;
  int result = socket_address(path, &address, &length);
  if (result < 0) return result;
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return -errno;
  unlink(path);
  mode_t before = umask(0177);
  result = bind(fd, (struct sockaddr *)&address, length) < 0 ? -errno : 0;
  umask(before);
  if (result == 0 && listen(fd, 4096) < 0) result = -errno;
  if (result == 0) return fd;
  close(fd);
  return result;
}

/* The program: CEDANA_DAEMON, else `cedanad` beside our real file, else what the build recorded. */
static int daemon_command(char *argv[4]) {
  memset(argv, 0, 4 * sizeof *argv);
  const char *given = getenv("CEDANA_DAEMON");
  if (given && *given) {
    argv[0] = copy_string(given);
    return 0;
  }
  char self[4096];
  ssize_t length = readlink("/proc/self/exe", self, sizeof self - 16);
  if (length > 0) {
    self[length] = 0;
    char *slash = strrchr(self, '/');
    if (slash) strcpy(slash + 1, "cedanad");
    if (slash && access(self, X_OK) == 0) {
      argv[0] = copy_string(self);
      return 0;
    }
  }
  if (DAEMON_NODE[0] == 0 || DAEMON_JS[0] == 0) return -ENOENT;
  argv[0] = copy_string(DAEMON_NODE);
  argv[1] = "--max-semi-space-size=1"; /* as bin/cedanad, which says why */
  argv[2] = copy_string(DAEMON_JS);
  return 0;
}

static bool not_for_daemon(const char *entry) { return !starts_with(entry, "CEDANA_"); }

/* Steps, all under the lock:
 *  1. Connect once more: somebody may have started one between the caller's attempt and our lock.
 *  2. The listening socket, so that clients can queue from now on.
 *  3. Execute cedanad: socket as fd 3, lock as fd 4 (a flock belongs to the open file, so it lives on in the child),
 *     by a keeper as its sibling: it must not become the reaper of cedanad's orphans. By a launcher as its child: its
 *     sibling would be containerd's, which doesn't reap what it didn't start.
 *  4. Its pid into the lock file, for whoever must kill it before it could say its pid itself.
 */
int daemon_start(pid_t *pid) {
  *pid = 0;
  int result = make_directories(run_directory(), 0700);
  if (result < 0) return result;
  autofd lock = open_lock();
  if (lock < 0) return lock;
  if (flock(lock, LOCK_EX | LOCK_NB) < 0) return errno == EWOULDBLOCK ? -EBUSY : -errno;

  /* Whose pid stands there held the lock before us. Said by nobody, or the wrong process could be taken for a hung cedanad. */
  if (ftruncate(lock, 0) < 0) return -errno;
  int connection = daemon_connect();
  if (connection >= 0) return connection;
  if (connection == -EAGAIN) return -EBUSY;

  char *argv[4] = {0};
  result = daemon_command(argv);
  if (result < 0) {
    daemon_log_line("no cedanad to start: CEDANA_DAEMON is not set, none beside the shim, none recorded at build");
    return result;
  }
  autofree char *program = argv[0];
  autofree char *script = argv[2];
  autofd listener = make_listener(daemon_socket());
  if (listener < 0) return listener;
  autofd null = open("/dev/null", O_RDWR | O_CLOEXEC);
  autofd log = open(daemon_log(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  if (null < 0 || log < 0) return -errno;

  char listen_pid[32] = "LISTEN_PID=";
  char **own = filter_environment(environ, not_for_daemon);
  size_t count = 0;
  while (own[count]) count++;
  autofree char **env = reallocate(own, (count + 7) * sizeof *own);
  env[count++] = DAEMON_PATH;
  env[count++] = "LISTEN_FDS=1";
  env[count++] = "MALLOC_ARENA_MAX=1"; /* as bin/cedanad, these three */
  env[count++] = "MALLOC_MMAP_THRESHOLD_=131072";
  env[count++] = "MALLOC_TRIM_THRESHOLD_=131072";
  env[count++] = listen_pid;
  env[count] = NULL;

  const char *directory = run_directory();
  autofree char *group = format("cedanad-%016llx", (unsigned long long)fnv1a(directory, strlen(directory)));
  int ignored;
  char **join = cgroup_make(group, false, &ignored);

  struct spawn spawn = {
      .path = program,
      .argv = argv,
      .env = env,
      .cwd = "/",
      .fds = {null, log, log, listener, lock},
      .fd_count = 5,
      .new_session = true,
      .close_others = true, /* a status pipe of the wrapper's caller, say, who waits for its end */
      .sibling = daemon_as_sibling,
      .oom_score_adj = "-500",
      .join = join,
      .pid_text = listen_pid + sizeof "LISTEN_PID=" - 1,
  };
  pid_t started = spawn_program(&spawn);
  cgroup_free(join);
  if (started < 0) {
    unlink(daemon_socket());
    daemon_log_line("execute %s: %s", program, strerror(-started));
    return started;
  }
  *pid = started;
  char text[24];
  int length = snprintf(text, sizeof text, "%d\n", (int)started);
  if (pwrite(lock, text, (size_t)length, 0) < 0) { /* then nobody can kill it early */
  }
  return -EAGAIN;
}

int daemon_connect_blocking(bool start, uint64_t deadline) {
  uint64_t pause = 2, longest = 50;
  for (;;) {
    int result = daemon_connect();
    if (result >= 0) return result;
    if (start && (result == -ENOENT || result == -ECONNREFUSED)) {
      pid_t pid;
      result = daemon_start(&pid);
      if (result >= 0) return result;
      if (pid > 0 && longest == 50) { /* it listens already: its socket is ours */
        longest = 500;
        continue;
      }
      if (pid <= 0 && result != -EBUSY) return result; /* and one that ends at once is started again ever more slowly */
    } else if (result != -EAGAIN && result != -EBUSY) {
      return result;
    }
    uint64_t now = now_ms();
    if (now >= deadline) return -ETIMEDOUT;
    struct timespec wait = {.tv_nsec = (long)pause * 1000000};
    nanosleep(&wait, NULL);
    pause = pause * 2 > longest ? longest : pause * 2;
  }
}
