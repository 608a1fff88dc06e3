// gaps MIB: fills MIB mebibytes with numbers that don't compress, says "ready", then looks at the clock as fast as it can, and says how
// many milliseconds it stood still whenever that were more than 5.
#include "say.h"
#include <stdint.h>
#include <sys/mman.h>

static int64_t now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000000000LL + time.tv_nsec;
}

int main(int argc, char **argv) {
  size_t words = (size_t)(argc > 1 ? atol(argv[1]) : 16) * (1 << 20) / 8;
  uint64_t *memory = mmap(0, words * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("mmap");
  uint64_t x = 88172645463325252u;
  for (size_t i = 0; i < words; i++) {
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    memory[i] = x;
  }
  say("ready");
  for (int64_t last = now();;) {
    rest(1);
    int64_t at = now();
    if (at - last > 5000000) say("%.1f", (at - last) / 1e6);
    last = at;
  }
}
