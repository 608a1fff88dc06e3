/*
 * What cedanad decides. The wrapper tells it the command (RUNTIME) and does what it says, until the answer:
 *
 *   RUNTIME_RUN     run a program as our own child, because conmon and Docker must stay the ancestors of the container: with
 *                   our stdio, our other inherited fds, our environment and what is added to it; or become it
 *   RUNTIME_ENDED   how it ended
 *   RUNTIME_ANSWER  the exit status, what is printed, and the error, which also goes to the --log file
 *
 * Signals: what we get while the child runs is passed on to it, and ends us when there is none, except SIGKILL, which ends us: the child gets a SIGKILL then too
 * (PDEATHSIG), so that nothing goes on unwatched; cedanad sees our connection close and undoes what it had prepared.
 * cedanad missing or dead: it is started; after 10 s the command fails and says so. One that dies in the middle of a checkpoint has a successor,
 * whom we ask again, once: he finishes it where the container has ended with it, or begins it anew. One that dies when the engine has restored a container
 * by its word leaves nobody who knows of it: we end it then, for the command has failed. Where the engine has failed, as it does when cedanad ends
 * before it lets its CRIU go, we remove the state that crun leaves.
 */
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "daemon.h"
#include "protocol.h"
#include "runtime.h"
#include "spawn.h"

extern char **environ;

#define REACH_MS 10000
/* Stops that a child takes by itself (the terminal's), and those that mean us. */
static const int passed_on[] = {SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGWINCH, SIGCONT};

/* Absolute: cedanad is elsewhere, and markers are known by it. The caller frees. */
static char *absolute(const char *path) {
  char cwd[4096];
  if (*path == '/') return copy_string(path);
  while (starts_with(path, "./")) path += 2 + strspn(path + 2, "/");
  if (!getcwd(cwd, sizeof cwd)) runtime_fail("find the working directory: %s", strerror(errno));
  return format("%s/%s", cwd, path);
}

/* Where the engine keeps its state when nobody says. Of root's, crun alone goes by XDG_RUNTIME_DIR, which a login sets for root, too. */
char *runtime_state_root(void) {
  if (runtime.root && *runtime.root) return absolute(runtime.root);
  if (!starts_with(base_name(runtime.engine_path), "crun")) return copy_string("/run/runc");
  const char *runtime_directory = getenv("XDG_RUNTIME_DIR");
  return runtime_directory && *runtime_directory ? format("%s/crun", runtime_directory) : copy_string("/run/crun");
}

char *runtime_marker(const char *id) {
  if (!*id || strchr(id, '/') || strlen(id) > 200 || !strcmp(id, ".") || !strcmp(id, "..")) return NULL;
  autofree char *root = runtime_state_root();
  for (size_t length = strlen(root); length > 1 && root[length - 1] == '/';) root[--length] = 0;
  const char *directory = runtime_run_directory ? runtime_run_directory : run_directory();
  return format("%s/oci/%016llx-%s", directory, (unsigned long long)fnv1a(root, strlen(root)), id);
}

static int send_all(int fd, struct buffer *out, uint64_t deadline) {
  while (buffer_length(out)) {
    int result = wait_fd(fd, POLLOUT, deadline);
    if (result < 0) return result;
    ssize_t n = send(fd, out->data + out->start, buffer_length(out), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno != EAGAIN && errno != EINTR) return -errno;
    if (n > 0) buffer_consume(out, (size_t)n);
  }
  return 0;
}

/* The next frame; the time a dump takes is cedanad's affair, so only its end ends the wait. */
static int receive(int fd, struct buffer *in, struct message *m) {
  for (;;) {
    ssize_t complete = frame_complete(in);
    if (complete < 0) return (int)complete;
    if (complete > 0) return message_decode(in, m);
    if (buffer_reserve(in, 4096) < 0) return -ENOMEM;
    struct pollfd p = {.fd = fd, .events = POLLIN};
    if (poll(&p, 1, -1) < 0 && errno != EINTR) return -errno;
    ssize_t n = recv(fd, in->data + in->end, 4096, MSG_DONTWAIT);
    if (n == 0) return -ECONNRESET;
    if (n < 0 && errno != EAGAIN && errno != EINTR) return -errno;
    if (n > 0) in->end += (size_t)n;
  }
}

static int deliveries;

static void put_request(struct buffer *out) {
  char cwd[4096];
  if (!getcwd(cwd, sizeof cwd)) runtime_fail("find the working directory: %s", strerror(errno));
  size_t begin = frame_begin(out, MESSAGE_RUNTIME);
  for (int i = 1; i < runtime.command; i++) put_string(out, FIELD_GLOBAL_ARGV, runtime.argv[i]);
  for (int i = runtime.command; i < runtime.argc; i++) put_string(out, FIELD_ARGV, runtime.argv[i]);
  put_string(out, FIELD_PATH, runtime.engine_path);
  autofree char *root = runtime_state_root();
  put_string(out, FIELD_ROOT, root);
  const char *id = runtime_container_id();
  autofree char *marker = id ? runtime_marker(id) : NULL;
  if (!marker)
    runtime_fail("%s: \"%s\" can't be the id of a container of cedana's: it may have 200 characters, no slash, and not be . or ..", runtime.argv[runtime.command],
                 id ? id : "");
  put_string(out, FIELD_ID, id);
  put_string(out, FIELD_MARKER, marker);
  put_string(out, FIELD_CWD, cwd);
  put_int(out, FIELD_PID, getpid());
  put_int(out, FIELD_MOUNT_NS, (int64_t)mount_namespace("/proc/self/ns/mnt"));
  if (deliveries > 1) put_int(out, FIELD_DELIVERIES, deliveries);
  frame_end(out, begin);
}

/* ---- running what cedanad says ---- */

static volatile sig_atomic_t child;

static void pass_on(int number) {
  int saved = errno;
  if (child > 0) {
    kill((pid_t)child, number);
  } else if (number == SIGTERM || number == SIGINT || number == SIGHUP || number == SIGQUIT) {
    /* Nobody to pass it on to: it means us, and cedanad undoes what it has begun. */
    signal(number, SIG_DFL);
    raise(number);
  }
  errno = saved;
}

/* stdout and stderr of the child into a file, which the answer then speaks of. */
static void redirect_output(const char *path) {
  int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
  if (fd < 0 || null < 0 || dup2(null, 0) < 0 || dup2(fd, 1) < 0 || dup2(fd, 2) < 0) _exit(127);
}

/*
 * Fds of socket activation are for the process that LISTEN_PID names: the caller means us, and so the engine that we run. Another pid,
 * as Podman's 1, stays: who doesn't look at it mustn't be told otherwise. Source: sd_listen_fds(3).
 */
static void env_for_child(char **env, pid_t parent) {
  static char listen_pid[sizeof "LISTEN_PID=" + 20];
  for (; *env; env++)
    if (starts_with(*env, "LISTEN_PID=") && strtol(*env + sizeof "LISTEN_PID=" - 1, NULL, 10) == parent) {
      snprintf(listen_pid, sizeof listen_pid, "LISTEN_PID=%d", (int)getpid());
      *env = listen_pid;
    }
}

/* The wait status, or -errno. `caller`: the environment that we were called with. */
static int64_t run(const struct message *m, char **caller, int64_t *pid_out) {
  autofree char **argv = message_list(m, FIELD_ARGV);
  autofree char **added = message_list(m, FIELD_ENV);
  const char *cwd = message_string(m, FIELD_CWD), *output = message_string(m, FIELD_OUTPUT_PATH);
  if (!argv || !argv[0]) return -EINVAL;
  autofree char **env = environment_with(caller, added);
  /* A signal between fork and exec must reach neither nobody nor our handler in the child. */
  sigset_t blocked, before;
  sigemptyset(&blocked);
  for (size_t i = 0; i < countof(passed_on); i++) sigaddset(&blocked, passed_on[i]);
  sigprocmask(SIG_BLOCK, &blocked, &before);
  pid_t parent = getpid(), pid = fork();
  if (pid < 0) {
    int error = errno;
    sigprocmask(SIG_SETMASK, &before, NULL);
    return -error;
  }
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(127);
    for (size_t i = 0; i < countof(passed_on); i++) {
      struct sigaction action;
      if (sigaction(passed_on[i], NULL, &action) == 0 && action.sa_handler == pass_on) signal(passed_on[i], SIG_DFL);
    }
    sigprocmask(SIG_SETMASK, &before, NULL);
    if (cwd && chdir(cwd) < 0) _exit(127);
    if (output) redirect_output(output);
    env_for_child(env, parent);
    execve(argv[0], argv, env);
    _exit(127);
  }
  *pid_out = pid;
  child = pid;
  sigprocmask(SIG_SETMASK, &before, NULL);
  int status;
  while (waitpid(pid, &status, 0) < 0)
    if (errno != EINTR) return -errno;
  child = 0;
  return status;
}

static _Noreturn void become(const struct message *m, char **caller) {
  char **argv = message_list(m, FIELD_ARGV);
  const char *cwd = message_string(m, FIELD_CWD);
  if (!argv) runtime_fail("cedanad's answer is not whole: it names no program");
  if (cwd && chdir(cwd) < 0) runtime_fail("change to %s: %s", cwd, strerror(errno));
  runtime_execute(argv[0], argv, environment_with(caller, message_list(m, FIELD_ENV)));
}

static _Noreturn void answer(const struct message *m) {
  const struct field *text = message_field(m, FIELD_ANSWER);
  if (text && write_all(1, text->value, text->length) < 0) runtime_fail("write the answer: %s", strerror(errno));
  const char *message = message_string(m, FIELD_MESSAGE);
  if (message) runtime_say_error(message);
  exit((int)message_int(m, FIELD_STATUS));
}

/*
 * Asks, and returns a connection on which cedanad has said something: a first frame is in *in. One that goes away before has done
 * nothing yet, so it is asked again, or its successor is; that holds of the connection, too, which a cedanad that is about to die
 * may still take. -errno after the time is over.
 */
static int ask(void (*fill)(struct buffer *), struct buffer *in) {
  uint64_t deadline = now_ms() + environment_number("CEDANA_KEEPER_PATIENCE_MS", REACH_MS);
  for (;;) {
    int fd = daemon_connect_blocking(true, deadline);
    if (fd < 0) return fd;
    struct buffer out = {0};
    fill(&out);
    int result = send_all(fd, &out, deadline);
    buffer_free(&out);
    while (result == 0 && (result = (int)frame_complete(in)) == 0) {
      if ((result = wait_fd(fd, POLLIN, deadline)) < 0 || (result = buffer_reserve(in, 4096)) < 0) break;
      ssize_t n = recv(fd, in->data + in->end, 4096, MSG_DONTWAIT);
      if (n == 0) result = -ECONNRESET;
      if (n < 0 && errno != EAGAIN && errno != EINTR) result = -errno;
      if (n > 0) in->end += (size_t)n;
    }
    if (result > 0) return fd;
    close(fd);
    buffer_free(in);
    if (result == -ETIMEDOUT || now_ms() >= deadline) return result;
    struct timespec pause = {.tv_nsec = 20000000};
    nanosleep(&pause, NULL);
  }
}

static void put_status(struct buffer *out) { frame_end(out, frame_begin(out, MESSAGE_STATUS)); }

/* A cedanad that ended in the middle: its successor puts right what it has left, a frozen container above all, before it answers. */
static void wake_successor(void) {
  struct buffer in = {0};
  int fd = ask(put_status, &in);
  if (fd >= 0) close(fd);
}

/* Whether a program is an engine that leaves a restored container running when it succeeds. */
static bool restores(char **argv) {
  bool restore = false, detach = false;
  for (char **a = argv; a && *a; a++) {
    restore |= !strcmp(*a, "restore");
    detach |= !strcmp(*a, "--detach");
  }
  return restore && detach;
}

/*
 * What crun leaves of its state where it fails before it restores: copies of files. A directory that says of a container what has become of it,
 * or was there before, is another's.
 */
static void remove_state(time_t since) {
  autofree char *root = runtime_state_root(), *path = format("%s/%s", root, runtime_container_id());
  autofd place = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  struct stat found;
  if (place < 0 || fstat(place, &found) < 0 || found.st_ctime < since) return;
  if (faccessat(place, "state.json", F_OK, 0) == 0 || faccessat(place, "status", F_OK, 0) == 0) return;
  unlinkat(place, "config.json", 0);
  rmdir(path); /* ENOTEMPTY: there is more to it than that */
}

static void delete_restored(char **caller) {
  struct buffer out = {0};
  struct message m;
  size_t begin = frame_begin(&out, MESSAGE_RUNTIME_RUN);
  put_string(&out, FIELD_ARGV, runtime.engine_path);
  for (int i = 1; i < runtime.command; i++) put_string(&out, FIELD_ARGV, runtime.argv[i]);
  put_string(&out, FIELD_ARGV, "delete");
  put_string(&out, FIELD_ARGV, "--force");
  put_string(&out, FIELD_ARGV, runtime_container_id());
  frame_end(&out, begin);
  int64_t pid = 0, status = message_decode(&out, &m) < 0 ? -EINVAL : run(&m, caller, &pid);
  if (status != 0) runtime_say_error("cedana-runtime: the restored container could not be deleted; it may run on");
}

void runtime_ask(void) {
  /* cedanad, if we start it, is started with our variables; the engine with those of our caller. */
  size_t count = 0;
  while (environ[count]) count++;
  char **caller = allocate((count + 1) * sizeof *caller);
  memcpy(caller, environ, count * sizeof *caller);
  runtime_config_export();

  struct buffer out = {0}, in = {0};
  int fd = ask(put_request, &in), result;
  if (fd < 0)
    runtime_fail("%s: cedanad could not be reached at %s within 10 s, or gave no answer: %s; its log is %s. Containers run on, and what "
                 "cedana-runtime passes through works without it",
                 runtime.argv[runtime.command], daemon_socket(), strerror(-fd), daemon_log());
  for (size_t i = 0; i < countof(passed_on); i++) {
    struct sigaction before, action = {.sa_handler = pass_on};
    /* What our caller ignores stays ignored (nohup). */
    if (sigaction(passed_on[i], NULL, &before) == 0 && before.sa_handler != SIG_IGN) sigaction(passed_on[i], &action, NULL);
  }
  struct message m;
  time_t engine_ran = 0;
  bool restored = false, repeats = !strcmp(runtime.argv[runtime.command], "checkpoint");
  deliveries = 1;
again:
  while ((result = receive(fd, &in, &m)) == 0) {
    if (m.type == MESSAGE_RUNTIME_ANSWER) answer(&m);
    if (m.type == MESSAGE_RUNTIME_RUN) {
      if (message_int(&m, FIELD_FLAGS) & 1) become(&m, caller);
      autofree char **argv = message_list(&m, FIELD_ARGV);
      if (restores(argv)) engine_ran = time(NULL);
      int64_t pid = 0, status = run(&m, caller, &pid);
      restored |= status == 0 && restores(argv);
      size_t at = frame_begin(&out, MESSAGE_RUNTIME_ENDED);
      put_int(&out, FIELD_PID, pid);
      if (status < 0) put_int(&out, FIELD_ERRNO, -status);
      else put_int(&out, FIELD_WAIT_STATUS, status);
      frame_end(&out, at);
      if ((result = send_all(fd, &out, now_ms() + REACH_MS)) < 0) break;
    }
    message_free(&in, &m);
  }
  close(fd);
  if (repeats && deliveries == 1) {
    deliveries++;
    buffer_free(&in);
    buffer_free(&out);
    if ((fd = ask(put_request, &in)) >= 0) goto again;
    result = fd;
  }
  if (restored) delete_restored(caller);
  else if (engine_ran) remove_state(engine_ran);
  if (fd >= 0) wake_successor(); /* else there is none, as we have just seen */
  runtime_fail("%s: cedanad at %s ended in the middle of it: %s; its log is %s", runtime.argv[runtime.command], daemon_socket(),
               strerror(-result), daemon_log());
}
