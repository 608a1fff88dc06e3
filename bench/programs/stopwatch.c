// stopwatch [-m MOUNTNS] [-C DIR] [-i FILE] [-n COUNT] ARGV…: how long a program takes, without what starting it from a big
// process costs.
//
// Enters the mount namespace, then starts COUNT (1) copies of ARGV at once, in DIR, with FILE (/dev/null) as stdin; in each
// argument, `@` is the copy's number from 0 on. Waits as containerd waits for a shim: for the end of the shared stdout and
// stderr, and for the exits. Prints "NANOSECONDS STATUS…" (128 + signal for killed ones), a line end, and what came out.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void die(const char *what) {
  fprintf(stderr, "stopwatch: %s: %s\n", what, strerror(errno));
  exit(1);
}

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* The argument with every @ replaced by the number. */
static char *numbered(const char *argument, int number) {
  size_t room = strlen(argument) * 8 + 1, at = 0;
  char *text = malloc(room);
  if (!text) die("malloc");
  for (const char *c = argument; *c; c++) {
    if (*c == '@') at += (size_t)snprintf(text + at, room - at, "%d", number);
    else text[at++] = *c;
  }
  text[at] = 0;
  return text;
}

int main(int argc, char **argv) {
  const char *mount_ns = NULL, *directory = NULL, *input = "/dev/null";
  int count = 1, option;
  while ((option = getopt(argc, argv, "+m:C:i:n:")) != -1) {
    if (option == 'm') mount_ns = optarg;
    else if (option == 'C') directory = optarg;
    else if (option == 'i') input = optarg;
    else if (option == 'n') count = atoi(optarg);
    else return 2;
  }
  int argument_count = argc - optind;
  if (argument_count < 1 || count < 1) return 2;
  if (mount_ns) {
    int fd = open(mount_ns, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || setns(fd, CLONE_NEWNS) < 0) die(mount_ns);
    close(fd);
  }
  if (directory && chdir(directory) < 0) die(directory);
  int in = open(input, O_RDONLY | O_CLOEXEC), out[2];
  if (in < 0) die(input);
  if (pipe2(out, O_CLOEXEC) < 0) die("pipe");
  char ***copies = calloc((size_t)count, sizeof *copies);
  pid_t *pids = calloc((size_t)count, sizeof *pids);
  if (!copies || !pids) die("calloc");
  for (int i = 0; i < count; i++) {
    copies[i] = calloc((size_t)argument_count + 1, sizeof **copies);
    if (!copies[i]) die("calloc");
    for (int a = 0; a < argument_count; a++) copies[i][a] = numbered(argv[optind + a], i);
  }

  uint64_t start = now_ns();
  for (int i = 0; i < count; i++) {
    pids[i] = vfork();
    if (pids[i] < 0) die("vfork");
    if (pids[i] == 0) {
      lseek(in, 0, SEEK_SET);
      dup2(in, 0);
      dup2(out[1], 1);
      dup2(out[1], 2);
      execvp(copies[i][0], copies[i]);
      _exit(127);
    }
  }
  close(out[1]);
  size_t length = 0, room = 1 << 16;
  char *text = malloc(room);
  for (;;) {
    if (length == room && !(text = realloc(text, room *= 2))) die("realloc");
    ssize_t n = read(out[0], text + length, room - length);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) die("read");
    if (n == 0) break;
    length += (size_t)n;
  }
  int *statuses = calloc((size_t)count, sizeof *statuses);
  for (int i = 0; i < count; i++)
    if (waitpid(pids[i], &statuses[i], 0) < 0) die("waitpid");
  uint64_t end = now_ns();

  printf("%llu", (unsigned long long)(end - start));
  for (int i = 0; i < count; i++)
    printf(" %d", WIFEXITED(statuses[i]) ? WEXITSTATUS(statuses[i]) : 128 + WTERMSIG(statuses[i]));
  putchar('\n');
  fwrite(text, 1, length, stdout);
  return 0;
}
