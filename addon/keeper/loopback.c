/*
 * cedana-loopback: an OCI hook that sets the loopback interface up in a container's network namespace.
 *
 * runc restores a container that has a network namespace of its own into an empty one (it always asks CRIU for
 * --empty-ns network), in which lo is down, so that CRIU can't connect the restored sockets to each other. CRIU's
 * "setup-namespaces", when runc runs createRuntime hooks, comes before any socket: there cedanad puts this.
 *
 * Contract: the container's state is on stdin, as JSON (runtime-spec, "State"). Exit 0: lo is up (127.0.0.1 and ::1 come with
 * it). Exit 1: a message on stderr, and runc gives up the restore.
 */
#include "launcher.h"
#include "util.h"
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

/* A state has a few hundred bytes, and the container's annotations. */
#define STATE_MAX MIB
/* runc has the state at hand. CEDANA_LOOPBACK_PATIENCE_MS for tests. */
#define PATIENCE_MS 10000

/* The first "pid" that is a key: quotes within strings are escaped. 0: there is none. */
static long pid_of(const char *state) {
  for (const char *at = state; (at = strstr(at, "\"pid\"")); at++) {
    if (at > state && at[-1] == '\\') continue;
    const char *value = at + strlen("\"pid\"");
    value += strspn(value, " \t\r\n");
    if (*value++ != ':') continue;
    return strtol(value, NULL, 10);
  }
  return 0;
}

static int failed(const char *what) {
  fprintf(stderr, "cedana-loopback: %s: %s\n", what, strerror(errno));
  return 1;
}

int loopback_main(void) {
  struct buffer state = {0};
  int error = read_to_end(STDIN_FILENO, STATE_MAX, environment_number("CEDANA_LOOPBACK_PATIENCE_MS", PATIENCE_MS), &state);
  if (error < 0) {
    errno = -error;
    return failed("read the container's state from stdin");
  }
  buffer_append(&state, "", 1);
  long pid = pid_of((const char *)state.data);
  buffer_free(&state);
  if (pid <= 0) {
    fprintf(stderr, "cedana-loopback: stdin holds no container's state with a pid\n");
    return 1;
  }
  autofree char *path = format("/proc/%ld/ns/net", pid);
  autofd namespace = open(path, O_RDONLY | O_CLOEXEC);
  if (namespace < 0) return failed(path);
  if (setns(namespace, CLONE_NEWNET) < 0) return failed("join the container's network namespace");
  autofd any = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (any < 0) return failed("make a socket");
  struct ifreq lo = {.ifr_name = "lo"};
  if (ioctl(any, SIOCGIFFLAGS, &lo) < 0) return failed("ask for the flags of lo");
  lo.ifr_flags |= IFF_UP;
  if (ioctl(any, SIOCSIFFLAGS, &lo) < 0) return failed("set lo up");
  return 0;
}
