// eater: takes memory until the kernel stops it.
#include "say.h"

int main(void) {
  say("eating");
  for (;;) {
    char *chunk = malloc(1 << 20);
    if (!chunk) return 3;
    memset(chunk, 1, 1 << 20);
  }
}
