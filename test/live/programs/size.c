// size: prints "ROWS COLUMNS" of its terminal at the start and at each SIGWINCH.
#include "say.h"
#include <signal.h>
#include <sys/ioctl.h>

int main(void) {
  sigset_t change;
  sigemptyset(&change);
  sigaddset(&change, SIGWINCH);
  sigprocmask(SIG_BLOCK, &change, 0);
  for (;;) {
    struct winsize size;
    if (ioctl(0, TIOCGWINSZ, &size)) fail("TIOCGWINSZ");
    say("%d %d", size.ws_row, size.ws_col);
    sigwaitinfo(&change, 0);
  }
}
