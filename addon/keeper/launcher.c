/*
 * The shim's launcher, as containerd executes it:
 *
 *   containerd-shim-cedana-v2 -namespace NS -id ID -address ADDR [-publish-binary P] [-bundle B] [-debug] start|delete
 *   containerd-shim-cedana-v2 -info | -v
 *
 * Inherited: stdin with runtime options, stdout for the answer (containerd takes stderr for it too, so nothing is said there
 * on success). `start`: cwd is the bundle; the child becomes the keeper and keeps neither stdin, stdout nor stderr, because
 * containerd waits for their end. Exit codes: 0, or 1 with a message on stderr.
 */
#include "cgroup.h"
#include "daemon.h"
#include "keeper.h"
#include "launcher.h"
#include "protobuf.h"
#include "spawn.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define STDIN_MS 2000
/* containerd gives `delete` 5 s: together with the rest these stay below 4. */
#define DELETE_ASK_MS 1500
#define ENGINE_MS 1800
#define ASK_AGAIN_MIN_MS 20
#define ASK_AGAIN_MAX_MS 500

extern char **environ;

static struct {
  const char *namespace, *id, *address, *publish_binary, *bundle, *action;
  bool info, version, debug;
} flags;

static _Noreturn void die(const char *text, ...) {
  va_list list;
  va_start(list, text);
  fprintf(stderr, "containerd-shim-cedana-v2: ");
  vfprintf(stderr, text, list);
  fputc('\n', stderr);
  exit(1);
}

static void parse(int argc, char **argv) {
  static const char *ignored[] = {"socket", "debug-socket"};
  for (int i = 1; i < argc; i++) {
    char *name = argv[i];
    if (name[0] != '-') {
      if (flags.action) die("one action is expected, not %s and %s", flags.action, name);
      flags.action = name;
      continue;
    }
    name += 1 + (name[1] == '-');
    char *value = strchr(name, '=');
    if (value) *value++ = 0;
    bool *yes_no = !strcmp(name, "debug")                              ? &flags.debug
                   : !strcmp(name, "info")                             ? &flags.info
                   : !strcmp(name, "v") || !strcmp(name, "version") ? &flags.version
                                                                       : NULL;
    if (yes_no) {
      *yes_no = !value || !strcmp(value, "true") || !strcmp(value, "1");
    } else {
      if (!value && ++i < argc) value = argv[i];
      if (!value) die("flag -%s needs a value", name);
      if (!strcmp(name, "namespace")) flags.namespace = value;
      else if (!strcmp(name, "id")) flags.id = value;
      else if (!strcmp(name, "address")) flags.address = value;
      else if (!strcmp(name, "publish-binary")) flags.publish_binary = value;
      else if (!strcmp(name, "bundle")) flags.bundle = value;
      else {
        bool known = false;
        for (size_t k = 0; k < countof(ignored); k++) known |= !strcmp(name, ignored[k]);
        if (!known) die("flag -%s is unknown", name);
      }
    }
  }
}

static bool is_name(const char *text) {
  if (!text || !*text || strlen(text) > 255 || text[0] == '.' || text[0] == '-') return false;
  for (; *text; text++)
    if (*text == '/' || (unsigned char)*text < 0x21 || *text == 0x7f) return false;
  return true;
}

/* A question to cedanad; the answer's buffer belongs to *in. */
static int ask(int fd, struct buffer *question, int answer_type, uint64_t deadline, struct buffer *in, struct message *m) {
  while (buffer_length(question)) {
    int result = wait_fd(fd, POLLOUT, deadline);
    if (result < 0) return result;
    ssize_t n = send(fd, question->data + question->start, buffer_length(question), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno != EAGAIN && errno != EINTR) return -errno;
    if (n > 0) buffer_consume(question, (size_t)n);
  }
  for (;;) {
    ssize_t complete = frame_complete(in);
    if (complete < 0) return (int)complete;
    if (complete > 0) {
      int result = message_decode(in, m);
      return result < 0 ? result : m->type == answer_type ? 0 : -EBADMSG;
    }
    int result = wait_fd(fd, POLLIN, deadline);
    if (result < 0) return result;
    if (buffer_reserve(in, 4096) < 0) return -ENOMEM;
    ssize_t n = recv(fd, in->data + in->end, 4096, MSG_DONTWAIT);
    if (n == 0) return -ECONNRESET;
    if (n < 0 && errno != EAGAIN && errno != EINTR) return -errno;
    if (n > 0) in->end += (size_t)n;
  }
}

static void put_common(struct buffer *out) {
  put_string(out, FIELD_NAMESPACE, flags.namespace);
  put_string(out, FIELD_ID, flags.id);
  put_string(out, FIELD_BUNDLE, flags.bundle);
  put_int(out, FIELD_PID, getpid());
  put_int(out, FIELD_MOUNT_NS, (int64_t)mount_namespace("/proc/self/ns/mnt"));
}

/* Who doesn't close stdin (containerd does) makes us wait, but not for ever. */
static void read_stdin(struct buffer *in) {
  if (isatty(0)) return;
  int result = read_to_end(0, OPTIONS_MAX, STDIN_MS, in);
  if (result == -EFBIG) die("options on stdin are longer than 10 MiB");
}

/* Asks, again when cedanad goes away meanwhile. Returns the connection. */
static int ask_daemon(void (*fill)(struct buffer *), int answer_type, struct buffer *in, struct message *m) {
  uint64_t deadline = now_ms() + daemon_patience_ms();
  for (unsigned pause_ms = ASK_AGAIN_MIN_MS;; pause_ms = pause_ms * 2 > ASK_AGAIN_MAX_MS ? ASK_AGAIN_MAX_MS : pause_ms * 2) {
    int fd = daemon_connect_blocking(true, deadline);
    if (fd < 0) die("UNAVAILABLE: cedanad could not be reached at %s: %s; its log is %s", daemon_socket(), strerror(-fd), daemon_log());
    struct buffer question = {0};
    fill(&question);
    int result = ask(fd, &question, answer_type, deadline, in, m);
    buffer_free(&question);
    if (result == 0) return fd;
    close(fd);
    buffer_free(in);
    if (result == -ETIMEDOUT) { /* no keeper may be there to end one that hangs; the next call finds another */
      pid_t pid;
      autofd pidfd = daemon_lock_holder(&pid);
      if (pidfd >= 0) daemon_kill(pidfd, pid, daemon_patience_ms());
    }
    if (result == -ETIMEDOUT || now_ms() >= deadline)
      die("UNAVAILABLE: cedanad at %s gave no answer: %s; its log is %s", daemon_socket(), strerror(-result), daemon_log());
    struct timespec pause = {.tv_nsec = (long)pause_ms * 1000000};
    nanosleep(&pause, NULL);
  }
}

/* ---- start ---- */

static struct buffer options;
static struct buffer received; /* cedanad's answer, as long as it is used */

static void fill_start(struct buffer *out) {
  size_t begin = frame_begin(out, MESSAGE_START);
  put_common(out);
  put_string(out, FIELD_CONTAINERD_ADDRESS, flags.address);
  put_string(out, FIELD_TTRPC_ADDRESS, getenv("TTRPC_ADDRESS"));
  put_string(out, FIELD_PUBLISH_BINARY, flags.publish_binary);
  put_bytes(out, FIELD_OPTIONS, options.data + options.start, buffer_length(&options));
  put_int(out, FIELD_MAX_SHIM_VERSION, (int64_t)environment_number("MAX_SHIM_VERSION", 0));
  frame_end(out, begin);
}

/* A listening socket, or -EADDRINUSE: somebody serves there. */
static int listen_at(const char *path) {
  struct sockaddr_un address;
  unsigned length;
  int result = socket_address(path, &address, &length);
  if (result < 0) return result;
  if ((result = make_parents(path, 0700)) < 0) return result;
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return -errno;
  mode_t before = umask(0177);
  for (int attempt = 0; attempt < 2; attempt++) {
    result = bind(fd, (struct sockaddr *)&address, length) < 0 ? -errno : 0;
    if (result != -EADDRINUSE) break;
    int peer = connect_unix(path);
    if (peer >= 0) close(peer);
    if (peer >= 0 || peer == -EAGAIN) break; /* it is alive */
    unlink(path);
  }
  umask(before);
  if (result == 0 && listen(fd, 1024) < 0) result = -errno;
  if (result == 0) return fd;
  close(fd);
  return result;
}

/* Before the keeper is there: should this fail, nothing is left but a socket that the caller removes. */
static bool write_address(const char *path) {
  autofree char *file = format("%s/address", flags.bundle);
  autofree char *temporary = format("%s.new", file);
  autofree char *text = format("unix://%s", path);
  autofd fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  return fd >= 0 && write_all(fd, text, strlen(text)) == 0 && rename(temporary, file) == 0;
}

/* As the Go shim: one more than containerd's, so that the kernel takes the shim before containerd, and the containers before both. */
static void set_oom_score(pid_t containerd) {
  autofree char *path = format("/proc/%d/oom_score_adj", (int)containerd);
  autofree char *text = NULL;
  if (read_file(path, 64, &text, NULL) < 0) return;
  int score = atoi(text);
  if (score >= 1000) return;
  char number[16];
  snprintf(number, sizeof number, "%d", score + 1);
  write_existing("/proc/self/oom_score_adj", number); /* EACCES: lowering needs CAP_SYS_RESOURCE */
}

/* What ps shows: the flags that people look for, without the action. */
static void show_as_keeper(char **argv) {
  autofree char *text = format("containerd-shim-cedana-v2%c-namespace%c%s%c-id%c%s%c-address%c%s", 0, 0, flags.namespace, 0, 0,
                               flags.id, 0, 0, flags.address ? flags.address : "");
  size_t length = sizeof "containerd-shim-cedana-v2" + sizeof "-namespace" + strlen(flags.namespace) + 1 + sizeof "-id" +
                  strlen(flags.id) + 1 + sizeof "-address" + (flags.address ? strlen(flags.address) : 0) + 1;
  char *last = argv[0];
  for (char **a = argv; *a; a++)
    if (*a == last) last = *a + strlen(*a) + 1;
  size_t room = (size_t)(last - argv[0]);
  memset(argv[0], 0, room);
  memcpy(argv[0], text, length < room ? length : room - 1);
  prctl(PR_SET_NAME, "containerd-shim");
}

static _Noreturn void become_keeper(int listening, int cedanad, const char *socket_path, char **argv) {
  /* Strings of argv are about to be overwritten. */
  keeper.namespace = flags.namespace = copy_string(flags.namespace);
  keeper.id = flags.id = copy_string(flags.id);
  keeper.address = flags.address = flags.address ? copy_string(flags.address) : NULL;
  keeper.publish_binary = flags.publish_binary ? copy_string(flags.publish_binary) : NULL;
  keeper.bundle = copy_string(flags.bundle);
  keeper.ttrpc_address = getenv("TTRPC_ADDRESS");
  keeper.socket_path = copy_string(socket_path);
  setpgid(0, 0);
  setenv("GOMAXPROCS", "4", 1);
  int null = open("/dev/null", O_RDWR);
  for (int i = 0; i < 3; i++) dup2(null, i);
  listening = fcntl(listening, F_DUPFD_CLOEXEC, 10);
  cedanad = fcntl(cedanad, F_DUPFD_CLOEXEC, 10);
  dup3(listening, 3, O_CLOEXEC);
  dup3(cedanad, 4, O_CLOEXEC);
  close_from(5);
  if (chdir("/") < 0) _exit(71);
  umask(022);
  show_as_keeper(argv);
  buffer_free(&options);
  buffer_free(&received);
  keeper.listening = 3;
  keeper_run(4);
}

static int start(char **argv) {
  if (!flags.bundle) {
    static char cwd[4096];
    flags.bundle = getcwd(cwd, sizeof cwd);
    if (!flags.bundle) die("find the working directory, which is the bundle: %s", strerror(errno));
  }
  pid_t containerd = getppid();
  read_stdin(&options);
  struct message m;
  int cedanad = ask_daemon(fill_start, MESSAGE_START_ANSWER, &received, &m);
  if (message_int(&m, FIELD_ERRNO)) die("%s", message_string(&m, FIELD_MESSAGE));
  const char *path = message_string(&m, FIELD_SOCKET_PATH), *cgroup = message_string(&m, FIELD_SHIM_CGROUP);
  const struct field *answer = message_field(&m, FIELD_ANSWER);
  if (!path || !answer) die("cedanad's answer is not whole");
  int listening = listen_at(path);
  if (listening < 0 && listening != -EADDRINUSE) die("listen at %s: %s", path, strerror(-listening));
  if (!write_address(path)) {
    int error = errno;
    if (listening >= 0) unlink(path);
    die("write %s/address: %s", flags.bundle, strerror(error));
  }
  pid_t pid = 0;
  if (listening >= 0) {
    int ready[2];
    if (pipe2(ready, O_CLOEXEC) < 0) die("pipe: %s", strerror(errno));
    pid = fork();
    if (pid < 0) die("fork: %s", strerror(errno));
    if (pid == 0) {
      int result = cgroup ? cgroup_join(cgroup) : 0;
      if (result == 0 && getenv("SCHED_CORE") && *getenv("SCHED_CORE")) result = sched_core_create(SCHED_CORE_PROCESS_GROUP);
      set_oom_score(containerd);
      if (write(ready[1], &result, sizeof result) < 0) _exit(71);
      if (result < 0) _exit(1);
      become_keeper(listening, cedanad, path, argv);
    }
    int result = -ECHILD;
    close(ready[1]);
    if (read(ready[0], &result, sizeof result) != sizeof result) result = -ECHILD;
    if (result < 0) {
      unlink(path);
      die("prepare the keeper%s%s: %s", cgroup ? " in cgroup " : "", cgroup ? cgroup : "", strerror(-result));
    }
  }
  if (write_all(1, answer->value, answer->length) == 0) return 0;
  int error = errno;
  if (pid > 0) {
    kill(pid, SIGKILL); /* nobody has learned of it */
    unlink(path);
  }
  die("write the answer: %s", strerror(error));
}

/* ---- delete ---- */

static void fill_delete(struct buffer *out) {
  size_t begin = frame_begin(out, MESSAGE_DELETE);
  put_common(out);
  frame_end(out, begin);
}

/* The engine's forced delete, as far as it is needed, by what cedanad noted in the bundle. */
static void engine_delete(void) {
  autofree char *path = format("%s/cedana-engine", flags.bundle);
  autofree char *text = NULL;
  if (read_file(path, 64 * KIB, &text, NULL) < 0) return; /* nothing was created */
  char *save, *engine = strtok_r(text, "\n", &save), *root = strtok_r(NULL, "\n", &save), *id = strtok_r(NULL, "\n", &save);
  if (!engine || !root || !id || !is_name(id)) return;
  autofree char *state = format("%s/%s", root, id);
  struct stat st;
  if (stat(state, &st) < 0) return;
  autofree char *program = find_program(engine, getenv("PATH"));
  autofd null = open("/dev/null", O_RDWR | O_CLOEXEC);
  char *argv[] = {engine, "--root", root, "delete", "--force", id, NULL};
  struct spawn spawn = {.path = program, .argv = argv, .env = environ, .fds = {null, null, null}, .fd_count = 3};
  pid_t pid = program ? spawn_program(&spawn) : -ENOENT;
  if (pid < 0) {
    fprintf(stderr, "containerd-shim-cedana-v2: execute %s to delete %s: %s\n", engine, id, strerror(-pid));
    return;
  }
  uint64_t deadline = now_ms() + ENGINE_MS;
  while (waitpid(pid, NULL, WNOHANG) == 0) {
    if (now_ms() > deadline) {
      /* It goes on without us: containerd waits no longer, and killed it would leave its container's state. */
      fprintf(stderr, "containerd-shim-cedana-v2: %s delete --force %s takes longer than %d ms: left to itself\n", engine, id, ENGINE_MS);
      return;
    }
    struct timespec pause = {.tv_nsec = 2000000};
    nanosleep(&pause, NULL);
  }
}

static void remove_dead_socket(void) {
  autofree char *file = format("%s/address", flags.bundle);
  autofree char *text = NULL;
  if (read_file(file, 4096, &text, NULL) < 0 || !starts_with(text, "unix://")) return;
  int fd = connect_unix(text + 7);
  if (fd >= 0) close(fd);
  else if (fd == -ECONNREFUSED) unlink(text + 7);
}

/* containerd.task.v2.DeleteResponse: pid = 1, exit_status = 2, exited_at = 3 {seconds = 1, nanos = 2}. */
static void print_delete_response(uint64_t pid, uint64_t status, uint64_t at_ns) {
  struct buffer out = {0}, stamp = {0};
  if (pid) put_proto_int(&out, 1, pid);
  if (status) put_proto_int(&out, 2, status);
  put_proto_int(&stamp, 1, at_ns / 1000000000);
  put_proto_int(&stamp, 2, at_ns % 1000000000);
  put_proto_bytes(&out, 3, stamp.data, buffer_length(&stamp));
  if (write_all(1, out.data, buffer_length(&out)) < 0) exit(1);
  buffer_free(&out);
  buffer_free(&stamp);
}

static int delete(void) {
  if (!flags.bundle) {
    static char cwd[4096];
    flags.bundle = getcwd(cwd, sizeof cwd);
  }
  uint64_t pid = 0, status = 137, at_ns = now_ns_real();
  bool ended = false;
  uint64_t deadline = now_ms() + DELETE_ASK_MS;
  int fd = daemon_connect();
  if (fd >= 0) {
    struct buffer question = {0};
    struct message m;
    fill_delete(&question);
    if (ask(fd, &question, MESSAGE_DELETE_ANSWER, deadline, &received, &m) == 0 && !message_int(&m, FIELD_ERRNO) &&
        message_int(&m, FIELD_FLAGS) == 1) {
      ended = true;
      pid = (uint64_t)message_int(&m, FIELD_PID);
      status = (uint64_t)message_int(&m, FIELD_STATUS);
      at_ns = (uint64_t)message_int(&m, FIELD_AT_NS);
    }
    buffer_free(&question);
    close(fd);
  }
  if (!ended && flags.bundle) {
    engine_delete();
    autofree char *rootfs = format("%s/rootfs", flags.bundle);
    autofree char *why = NULL;
    if (unmount_below(rootfs, &why) < 0) fprintf(stderr, "containerd-shim-cedana-v2: %s\n", why);
  }
  if (flags.bundle) remove_dead_socket();
  print_delete_response(pid, status, at_ns);
  return 0;
}

/* ---- -info ---- */

static void fill_info(struct buffer *out) {
  size_t begin = frame_begin(out, MESSAGE_INFO);
  put_bytes(out, FIELD_OPTIONS, options.data + options.start, buffer_length(&options));
  frame_end(out, begin);
}

static int info(void) {
  read_stdin(&options);
  struct message m;
  int fd = ask_daemon(fill_info, MESSAGE_INFO_ANSWER, &received, &m);
  if (message_int(&m, FIELD_ERRNO)) die("%s", message_string(&m, FIELD_MESSAGE));
  const struct field *answer = message_field(&m, FIELD_ANSWER);
  if (answer && write_all(1, answer->value, answer->length) < 0) die("write the answer: %s", strerror(errno));
  close(fd);
  return 0;
}

int launcher_main(int argc, char **argv) {
  /* With one of the three closed, a socket of ours would get its number, and lose it to /dev/null in the keeper. */
  int fd = open("/dev/null", O_RDWR);
  while (fd >= 0 && fd <= 2) fd = open("/dev/null", O_RDWR);
  close_fd(&fd);
  parse(argc, argv);
  if (flags.version) {
    printf("%s:\n  Version:  %s\n  Revision: %s\n  Protocol: %d to %d\n\n", argv[0], BUILD_VERSION, BUILD_REVISION, PROTOCOL_MIN, KEEPER_VERSION_MAX);
    return 0;
  }
  signal(SIGPIPE, SIG_IGN);
  if (flags.info) return info();
  if (!is_name(flags.namespace)) die("-namespace is missing, or not a name");
  if (!is_name(flags.id)) die("-id is missing, or not a name");
  if (flags.action && !strcmp(flags.action, "start")) return start(argv);
  if (flags.action && !strcmp(flags.action, "delete")) return delete();
  die("the action must be start or delete; a keeper is begun by start");
}
