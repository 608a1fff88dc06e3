// background MS: leaves a child behind that keeps stdout open for MS milliseconds and then writes "late"; the parent ends at once with 5.
#include "say.h"
#include <signal.h>

int main(int argc, char **argv) {
  long ms = argc > 1 ? atol(argv[1]) : 500;
  say("first");
  if (fork() == 0) {
    setsid();
    rest(ms);
    say("late");
    _exit(0);
  }
  return 5;
}
