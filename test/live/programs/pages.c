// pages COUNT: COUNT pages of memory. Each SIGUSR1 adds 1 to one of them, in turn from the first on; again and again it says "N TOUCHED SUM": how many signals came, and
// the sum of what is in the pages, which is the same as long as memory is whole.
#include "say.h"
#include <signal.h>
#include <sys/mman.h>

static volatile sig_atomic_t touched;
static void touch(int signal) {
  (void)signal;
  touched = touched + 1;
}

int main(int argc, char **argv) {
  long count = argc > 1 ? atol(argv[1]) : 256, done = 0;
  unsigned char *memory = mmap(0, count * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("mmap");
  for (long i = 0; i < count; i++) memory[i * 4096 + 1] = 1 + i % 255; // none is empty
  struct sigaction action = {.sa_handler = touch};
  sigaction(SIGUSR1, &action, 0);
  for (long n = 0;; n++) {
    for (; done < touched; done++) memory[done % count * 4096]++;
    long sum = 0;
    for (long i = 0; i < count; i++) sum += memory[i * 4096];
    say("%ld %ld %ld", n, done, sum);
    rest(20);
  }
}
