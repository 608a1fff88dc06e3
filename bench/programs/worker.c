// worker MIB THREADS: fills MIB mebibytes with numbers that don't compress, says "ready", and then computes on them in THREADS threads for
// ever, or with 0 waits in epoll_wait(2) for what never comes, as a server does for its next client.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>

static volatile uint64_t *memory;
static size_t words;

static void *compute(void *unused) {
  (void)unused;
  for (uint64_t sum = 0;;)
    for (size_t i = 0; i < words; i++) {
      sum = sum * 31 + memory[i];
      if (i % 512 == 0) memory[i] = sum; // a word of each page
    }
}

int main(int argc, char **argv) {
  if (argc != 3) return 1;
  words = (size_t)atol(argv[1]) * (1 << 20) / sizeof *memory;
  memory = mmap(NULL, words * sizeof *memory, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return perror("mmap"), 1;
  uint64_t x = 88172645463325252u;
  for (size_t i = 0; i < words; i++) {
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    memory[i] = x;
  }
  puts("ready");
  fflush(stdout);
  int threads = atoi(argv[2]), epoll = epoll_create1(0);
  for (int i = 1; i < threads; i++) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, compute, NULL) != 0) return fputs("pthread_create\n", stderr), 1;
  }
  if (threads > 0) compute(NULL);
  for (struct epoll_event event;;) epoll_wait(epoll, &event, 1, -1);
}
