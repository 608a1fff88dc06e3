// tree: a process with three children, each with two of its own, in different sessions and process groups. All nine
// raise a number of theirs in shared memory when the root asks; the root prints it when every one has.
#include "say.h"
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/wait.h>

enum { CHILDREN = 3, GRANDCHILDREN = 2, ALL = CHILDREN * (1 + GRANDCHILDREN) };
static struct { _Atomic long asked, done[ALL]; } *shared;

static void follow(int me) {
  for (;;) {
    long asked = atomic_load(&shared->asked);
    if (atomic_load(&shared->done[me]) != asked) atomic_store(&shared->done[me], asked);
    rest(2);
  }
}

int main(void) {
  shared = mmap(0, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) fail("mmap");
  for (int c = 0; c < CHILDREN; c++) {
    if (fork()) continue;
    if (c == 1) setsid();
    if (c == 2) setpgid(0, 0);
    for (int g = 0; g < GRANDCHILDREN; g++)
      if (!fork()) follow(CHILDREN + c * GRANDCHILDREN + g);
    follow(c);
  }
  for (long n = 0;; n++) {
    atomic_store(&shared->asked, n);
    for (int i = 0; i < ALL; i++)
      while (atomic_load(&shared->done[i]) != n) {
        if (waitpid(-1, 0, WNOHANG) > 0) fail("a child ended");
        rest(1);
      }
    say("%ld", n);
    rest(10);
  }
}
