// signals: says "ready", then "signal N" for each signal that arrives and can be caught; SIGTERM too.
#include "say.h"
#include <signal.h>

int main(void) {
  sigset_t all;
  sigfillset(&all);
  sigprocmask(SIG_BLOCK, &all, 0);
  say("ready");
  for (;;) {
    int number = sigwaitinfo(&all, 0);
    if (number > 0 && number != SIGCHLD) say("signal %d", number);
  }
}
