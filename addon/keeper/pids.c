/*
 * cedana-pids NAMESPACE [LAST]: what a restore has to know of a pid namespace in which others live, and where the kernel goes on in it.
 *
 * CRIU makes processes with the ids that they had. An id that somebody has is refused by the kernel, and in a shared namespace everybody
 * who starts a process takes the next one, CRIU's own helpers too. The kernel gives them in order, from the last one given on
 * (ns_last_pid), which can be set, but only from within the namespace: so a child of ours goes there.
 *
 *  1. setns(2) into NAMESPACE, which holds for children: this process stays where it is. fork(2): the child is in it.
 *  2. With LAST, the child writes it to /proc/sys/kernel/ns_last_pid, which is that of whoever writes: the next process gets a higher id.
 *  3. It says on stdout `taken N` for each id from stdin (decimal, a line each) that is a process's, a thread's or a process group's; then
 *     `last N`, the last id that was given before all this, and `max N`, below which all ids are.
 *
 * Contract: run by cedanad as root. Exit 0: said and done. Exit 1: a message on stderr; the id may have been written. The child is the
 * next process of the namespace, and leaves its id with its end; it sends no signal but 0.
 */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "launcher.h"
#include "util.h"

/* Ids are at most 4194304 (PID_MAX_LIMIT), of 7 digits. */
#define IDS_MAX (34 * MIB)
#define PATIENCE_MS 10000
#define LAST_PID "/proc/sys/kernel/ns_last_pid"
#define PID_MAX "/proc/sys/kernel/pid_max"

static int failed(const char *what) {
  fprintf(stderr, "cedana-pids: %s: %s\n", what, strerror(errno));
  return 1;
}

static int number_in(const char *path, long *number) {
  autofree char *text = NULL;
  int result = read_file(path, KIB, &text, NULL);
  if (result == 0) *number = strtol(text, NULL, 10);
  if (result < 0) errno = -result;
  return result;
}

/* A zombie has its id; a process group keeps the id of a first process that has ended. */
static bool is_taken(pid_t id) {
  if (kill(id, 0) == 0 || errno != ESRCH) return true;
  return id > 1 && (kill(-id, 0) == 0 || errno != ESRCH);
}

/* In the namespace. */
static int look(const char *last, const char *ids) {
  long max = 0;
  long given = 0;
  if (number_in(PID_MAX, &max) < 0) return failed("read " PID_MAX);
  if (number_in(LAST_PID, &given) < 0) return failed("read " LAST_PID);
  pid_t self = getpid();
  if (given == self) given--;
  if (last) { /* first: what is not taken now, nobody gets any more */
    int result = write_existing(LAST_PID, last);
    errno = -result;
    if (result < 0) return failed("write " LAST_PID);
  }
  for (const char *at = ids; *at;) {
    char *end;
    long id = strtol(at, &end, 10);
    if (end == at) break;
    at = end + (*end == '\n');
    if (id > 0 && id < max && id != self && is_taken((pid_t)id)) printf("taken %ld\n", id);
  }
  printf("last %ld\nmax %ld\n", given, max);
  if (fflush(stdout) != 0) return failed("write what was found");
  return 0;
}

int pids_main(int argc, char **argv) {
  if (argc != 2 && argc != 3) {
    fprintf(stderr, "usage: cedana-pids NAMESPACE [LAST]\n");
    return 1;
  }
  const char *last = argc == 3 ? argv[2] : NULL;
  if (last && parse_number(last) < 0) {
    fprintf(stderr, "cedana-pids: %s is no process id\n", last);
    return 1;
  }
  struct buffer ids = {0};
  int error = read_to_end(STDIN_FILENO, IDS_MAX, PATIENCE_MS, &ids);
  if (error < 0) {
    errno = -error;
    return failed("read ids from stdin");
  }
  buffer_append(&ids, "", 1);
  autofd namespace = open(argv[1], O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
  if (namespace < 0) return failed(argv[1]);
  if (setns(namespace, CLONE_NEWPID) < 0) return failed("join the pid namespace");
  pid_t child = fork();
  if (child < 0) return failed("start a process in the pid namespace");
  if (child == 0) _exit(look(last, (const char *)ids.data));
  buffer_free(&ids);
  int status = 0;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) return failed("wait for the process in the pid namespace");
  _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1); /* whatever a handler at the exit started would be in that namespace */
}
