// reader FIFO BYTES: takes BYTES bytes from a container's output FIFO as fast as it can, and counts what some processes have
// computed meanwhile.
//
// Prints "ready" when the FIFO is open, reads the pids of those processes as one line from stdin, and prints at the end
// "NANOSECONDS CPU_NANOSECONDS", both from the first byte to the last.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static void die(const char *what) {
  fprintf(stderr, "reader: %s: %s\n", what, strerror(errno));
  exit(1);
}

static uint64_t clock_ns(clockid_t clock) {
  struct timespec t;
  if (clock_gettime(clock, &t) < 0) die("clock_gettime");
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int pids[8], pid_count;

static void read_pids(void) {
  char line[128];
  if (!fgets(line, sizeof line, stdin)) die("stdin");
  for (char *at = strtok(line, " \n"); at && pid_count < 8; at = strtok(NULL, " \n")) pids[pid_count++] = atoi(at);
}

static uint64_t cpu_ns(void) {
  uint64_t sum = 0;
  for (int i = 0; i < pid_count; i++) {
    clockid_t clock;
    if ((errno = clock_getcpuclockid(pids[i], &clock))) die("clock_getcpuclockid");
    sum += clock_ns(clock);
  }
  return sum;
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  static char block[256 * 1024];
  long long left = atoll(argv[2]);
  int fd = open(argv[1], O_RDONLY | O_NONBLOCK);
  if (fd < 0) die(argv[1]);
  puts("ready");
  fflush(stdout);
  read_pids();
  struct pollfd p = {.fd = fd, .events = POLLIN};
  while (poll(&p, 1, -1) < 0 || !(p.revents & POLLIN)) {}
  fcntl(fd, F_SETFL, 0);
  uint64_t cpu = cpu_ns(), start = clock_ns(CLOCK_MONOTONIC);
  while (left > 0) {
    ssize_t n = read(fd, block, sizeof block);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      fprintf(stderr, "reader: %lld bytes are missing: %s\n", left, n ? strerror(errno) : "end of file");
      return 1;
    }
    left -= n;
  }
  uint64_t end = clock_ns(CLOCK_MONOTONIC);
  printf("%llu %llu\n", (unsigned long long)(end - start), (unsigned long long)(cpu_ns() - cpu));
  return 0;
}
