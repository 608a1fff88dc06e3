// counter [MS [EXIT]]: the numbers from 0 on, one per line, one every MS (20) milliseconds. SIGTERM ends it with EXIT (0).
#include "say.h"
#include <signal.h>

static int status;
static void end(int signal) { (void)signal; _exit(status); }

int main(int argc, char **argv) {
  long ms = argc > 1 ? atol(argv[1]) : 20;
  status = argc > 2 ? atoi(argv[2]) : 0;
  signal(SIGTERM, end);
  for (long n = 0;; n++) {
    say("%ld", n);
    rest(ms);
  }
}
