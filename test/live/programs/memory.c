// memory MIB: fills MIB mebibytes with numbers that don't compress, then again and again sums them up:
// "ready SUM", and "N SUM" for each round.
#include "say.h"
#include <stdint.h>
#include <sys/mman.h>

int main(int argc, char **argv) {
  size_t words = (size_t)(argc > 1 ? atol(argv[1]) : 16) * (1 << 20) / 8;
  uint64_t *memory = mmap(0, words * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("mmap");
  uint64_t x = 88172645463325252u;
  for (size_t i = 0; i < words; i++) {
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    memory[i] = x;
  }
  for (long n = -1;; n++) {
    uint64_t sum = 0;
    for (size_t i = 0; i < words; i++) sum = sum * 31 + memory[i];
    if (n < 0) say("ready %016llx", (unsigned long long)sum);
    else say("%ld %016llx", n, (unsigned long long)sum);
    rest(50);
  }
}
