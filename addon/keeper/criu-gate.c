/*
 * criu: what engines take for CRIU, which it becomes. It answers for the version, and is the gate at which the CRIU of a dump waits until
 * a container stands still, and that of a restore until its checkpoint has been looked at.
 *
 * In a directory of cedanad's that comes first in an engine's PATH (src/criu/tools.ts) it is asked for CRIU's version, for which both
 * engines start CRIU once more. What CRIU has answered stands in there:
 *   version      behind a line that says of which file (PROTOCOL.md, sealedOf). Not there, or another file's: CRIU is asked itself
 *
 * An engine takes its time until CRIU runs: it starts, asks CRIU for its version, looks for what it has mounted. So cedanad starts it
 * early, with a PATH in which this program is the first `criu`: before a dump while the container still runs, and the CRIU that is to
 * dump is stopped; before a restore while cedanad still looks at the checkpoint, and who comes first is stopped, which is the question
 * for the version, before the engine has mounted or made anything but the directory of its state. It is let go when everything else is
 * done. What is asked for is in the first request on the socket that CRIU inherits (`criu swrk FD`, SOCK_SEQPACKET), which is looked at
 * and left there (MSG_PEEK).
 *
 * CEDANA_CRIU_GATE names a directory of cedanad's, 0700:
 *   criu         a link to this program, so that PATH finds it
 *   socket       where cedanad listens. Being connected says: CRIU is here. One byte lets it go; the end of the connection forbids it
 *   closed.conf  what the engine's environment names as CRIU_CONFIG_FILE: an option that CRIU doesn't know, so that no CRIU begins that
 *                an engine has started past us. We remove it when we let CRIU go: while it is there, nothing was begun
 *   criu.conf    what CRIU gets for CRIU_CONFIG_FILE from us; the last word on it is written before the gate is opened
 *   seen         we make it: the engine's way to CRIU leads here
 * CEDANA_CRIU_GATE_HOLDS=first: whoever comes while closed.conf is there is stopped, whatever is asked for. Then we put the real CRIU in
 * our place (criu), and the engine's next one is started without us. The engine's CRIU_CONFIG_FILE is criu.conf from the beginning, which
 * holds the unknown option until cedanad opens the gate
 *
 * Contract: we become the first other `criu` in PATH, with the same arguments, descriptors and environment, less what is said above.
 * Requests that only ask (version, features) go through at once; that for the version is answered by us where we can. Exit 1, and a
 * message on stderr, where CRIU is not to start: cedanad says no or has ended, an hour has passed, there is no other `criu`. The engine
 * takes that for a CRIU that failed; where it has ended itself, nothing is said. Source of the numbers: CRIU images/rpc.proto, criu_req.
 */
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "launcher.h"
#include "protobuf.h"
#include "spawn.h"
#include "util.h"

/* The chain in cedanad bounds its steps by itself; this is for one that hangs with the connection open. */
#define PATIENCE_MS (60 * 60 * 1000)
/* The type comes first; what follows may be cut off. */
#define PEEK_BYTES 4096
/* It has some 50. */
#define VERSION_BYTES 4096

enum { FIELD_TYPE = 1, CHECK = 3, CPUINFO_DUMP = 7, CPUINFO_CHECK = 8, FEATURE_CHECK = 9, VERSION = 10, UNKNOWN };

extern char **environ;

static int failed(const char *text, ...) {
  va_list arguments;
  va_start(arguments, text);
  fputs("criu (gate of cedana): ", stderr);
  vfprintf(stderr, text, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  return 1;
}

/* PATH without the gate. */
static char *path_without(const char *path, const char *directory) {
  char *rest = allocate(strlen(path) + 1), *end = rest;
  for (const char *at = path; *at;) {
    size_t length = strcspn(at, ":"), with_colon = length + (at[length] == ':');
    if (length != strlen(directory) || memcmp(at, directory, length) != 0) {
      memcpy(end, at, with_colon);
      end += with_colon;
    }
    at += with_colon;
  }
  if (end > rest && end[-1] == ':' && path[strlen(path) - 1] != ':') end--; /* the gate stood last */
  *end = 0;
  return rest;
}

static bool is_ourselves(const char *path) {
  struct stat it, us;
  return stat(path, &it) == 0 && stat("/proc/self/exe", &us) == 0 && it.st_dev == us.st_dev && it.st_ino == us.st_ino;
}

/* The first criu in PATH that isn't we; the caller frees. NULL: none. *tools: the directory in PATH where we are, where there is one. */
static char *find_real(const char *path, char **tools) {
  for (const char *at = path; *at;) {
    size_t length = strcspn(at, ":");
    autofree char *directory = format("%.*s", (int)length, at);
    char *candidate = *directory ? find_program("criu", directory) : NULL;
    if (candidate && !is_ourselves(candidate)) return candidate;
    if (candidate && !*tools) *tools = copy_string(directory);
    free(candidate);
    at += length + (at[length] == ':');
  }
  return NULL;
}

/* What the engine asks for; -errno: nobody will ask any more; UNKNOWN: it can't be read. */
static int kind_of_request(int engine) {
  struct pollfd request = {.fd = engine, .events = POLLIN};
  while (poll(&request, 1, -1) < 0)
    if (errno != EINTR) return -errno;
  uint8_t bytes[PEEK_BYTES];
  ssize_t length = recv(engine, bytes, sizeof bytes, MSG_PEEK);
  if (length < 0) return -errno;
  if (length == 0) return -ECONNRESET;
  uint64_t kind = 0;
  /* The first field alone, where a long request is cut off. */
  bool is_first = bytes[0] == FIELD_TYPE << 3 && length > 1;
  if (!proto_field((struct slice){bytes, is_first ? 2 : (size_t)length}, FIELD_TYPE, NULL, &kind) || kind > VERSION) return UNKNOWN;
  return (int)kind;
}

/* What is unknown may begin something. */
static bool only_asks(int kind) {
  return kind == CHECK || kind == CPUINFO_DUMP || kind == CPUINFO_CHECK || kind == FEATURE_CHECK || kind == VERSION;
}

/* Answers in the place of `real`. False: the answer isn't known, or is another file's. */
static bool answer_version(const char *directory, const char *real, int engine) {
  autofree char *path = format("%s/version", directory);
  autofree char *of = file_identity(real);
  autofree char *text = NULL;
  size_t length;
  if (!of || read_file(path, VERSION_BYTES, &text, &length) < 0) return false;
  size_t line = strlen(of);
  if (length <= line + 1 || memcmp(text, of, line) != 0 || text[line] != '\n') return false;
  uint8_t request[PEEK_BYTES];
  if (recv(engine, request, sizeof request, MSG_DONTWAIT) <= 0) return false;
  return send(engine, text + line + 1, length - line - 1, MSG_NOSIGNAL) > 0;
}

/* Waits until the gate is opened: 0. -ECONNREFUSED: it won't be; -EPIPE: the engine has ended; -ETIMEDOUT. */
static int wait_at(int gate, int engine) {
  uint64_t deadline = now_ms() + environment_number("CEDANA_CRIU_GATE_MS", PATIENCE_MS);
  for (;;) {
    uint64_t now = now_ms();
    if (now >= deadline) return -ETIMEDOUT;
    /* Of the engine's socket only its end: the request stays there. */
    struct pollfd both[] = {{.fd = gate, .events = POLLIN}, {.fd = engine, .events = POLLRDHUP}};
    if (poll(both, countof(both), (int)(deadline - now)) < 0) {
      if (errno == EINTR) continue;
      return -errno;
    }
    if (both[1].revents) return -EPIPE;
    if (!both[0].revents) continue;
    char go;
    ssize_t count = recv(gate, &go, 1, MSG_DONTWAIT);
    if (count == 1) return 0;
    if (count == 0 || (errno != EAGAIN && errno != EINTR)) return -ECONNREFUSED;
  }
}

static int stop_at_gate(const char *directory, int engine) {
  /* A socket's address has 107 bytes; a bundle's path may have more. */
  autofd place = open(directory, O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (place < 0) return failed("open %s: %s", directory, strerror(errno));
  autofree char *socket = format("/proc/self/fd/%d/socket", place);
  autofd gate = connect_unix(socket);
  if (gate < 0) return failed("connect to %s/socket: %s: cedanad has ended, or does not want it any more", directory, strerror(-gate));
  int result = wait_at(gate, engine);
  if (result == -ECONNREFUSED) return failed("cedanad has ended, or does not want it any more");
  if (result == -EPIPE) return 1; /* nobody is there to hear it */
  if (result < 0) return failed("wait for cedanad: %s", strerror(-result));
  if (unlinkat(place, "closed.conf", 0) < 0) return failed("remove %s/closed.conf: %s", directory, strerror(errno));
  return 0;
}

static bool is_closed(const char *directory) {
  autofree char *closed = format("%s/closed.conf", directory);
  return access(closed, F_OK) == 0;
}

/* Where it fails, we are asked again: it costs a millisecond. */
static void leave_place(const char *directory, const char *real) {
  autofree char *criu = format("%s/criu", directory), *fresh = format("%s/criu.new", directory);
  if (*real == '/' && symlink(real, fresh) == 0) rename(fresh, criu);
}

int criu_main(int argc, char **argv) {
  const char *gate = getenv("CEDANA_CRIU_GATE"), *holds = getenv("CEDANA_CRIU_GATE_HOLDS");
  if (gate && *gate != '/') return failed("CEDANA_CRIU_GATE names no directory: it is for engines that cedanad starts");
  autofree char *directory = gate ? copy_string(gate) : NULL;
  const char *given = getenv("PATH") ? getenv("PATH") : "";
  autofree char *path = directory ? path_without(given, directory) : copy_string(given);
  autofree char *tools = NULL;
  autofree char *real = find_real(path, &tools);
  if (!real) return failed("there is no criu in PATH (%s)", path);
  if (directory) {
    autofree char *seen = format("%s/seen", directory);
    autofd mark = open(seen, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (mark < 0) return failed("make %s: %s", seen, strerror(errno));
  }
  int64_t engine = argc == 3 && !strcmp(argv[1], "swrk") ? parse_number(argv[2]) : -1;
  if (engine >= 0) {
    int kind = kind_of_request((int)engine);
    if (kind < 0) return failed("read the engine's request: %s", strerror(-kind));
    bool holds_first = holds && !strcmp(holds, "first");
    bool is_held = directory && (holds_first ? is_closed(directory) : !only_asks(kind));
    if (is_held && stop_at_gate(directory, (int)engine)) return 1;
    if (directory && holds_first) leave_place(directory, real);
    if (kind == VERSION && tools && answer_version(tools, real, (int)engine)) return 0;
  }
  if (directory) {
    autofree char *config = format("%s/criu.conf", directory);
    if (setenv("PATH", path, 1) < 0 || setenv("CRIU_CONFIG_FILE", config, 1) < 0) return failed("set the environment: %s", strerror(errno));
    unsetenv("CEDANA_CRIU_GATE");
    unsetenv("CEDANA_CRIU_GATE_HOLDS");
    unsetenv("CEDANA_CRIU_GATE_MS");
  }
  execve(real, argv, environ);
  return failed("execute %s: %s", real, strerror(errno));
}
