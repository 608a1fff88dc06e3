// writer BYTES SIZE: writes BYTES bytes in writes of SIZE, each ending in a line end, and ends. The bytes are those
// of a fixed sequence, so that a reader can tell lost and doubled ones.
#include "say.h"
#include <stdint.h>

int main(int argc, char **argv) {
  long total = argc > 1 ? atol(argv[1]) : 1 << 20, size = argc > 2 ? atol(argv[2]) : 65536;
  char *block = malloc(size);
  if (!block) fail("malloc");
  uint32_t x = 2463534242u;
  for (long i = 0; i < size; i++) {
    x ^= x << 13, x ^= x >> 17, x ^= x << 5;
    block[i] = 'a' + x % 26;
  }
  block[size - 1] = '\n';
  for (long done = 0; done < total;) {
    long want = total - done < size ? total - done : size, at = 0;
    while (at < want) {
      ssize_t n = write(1, block + at, want - at);
      if (n < 0 && errno != EINTR) {
        dprintf(2, "write: %s\n", strerror(errno));
        return 1;
      }
      if (n > 0) at += n;
    }
    done += want;
  }
  return 0;
}
