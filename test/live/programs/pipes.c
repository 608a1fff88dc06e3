// pipes: a child adds one to each number that comes through a pair of pipes; a third pipe holds 40,000 bytes
// that nobody reads until SIGUSR1, which prints "buffered SUM" of them.
#include "say.h"
#include <signal.h>

static volatile sig_atomic_t asked;
static void ask(int signal) { (void)signal; asked = 1; }

int main(void) {
  int there[2], back[2], full[2];
  if (pipe(there) || pipe(back) || pipe(full)) fail("pipe");
  unsigned char bytes[40000];
  for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = i * 7;
  if (write(full[1], bytes, sizeof bytes) != sizeof bytes) fail("write");
  struct sigaction action = {.sa_handler = ask, .sa_flags = SA_RESTART};
  sigaction(SIGUSR1, &action, 0);
  pid_t child = fork();
  if (child < 0) fail("fork");
  if (child == 0)
    for (long n;;) {
      if (read(there[0], &n, sizeof n) != sizeof n) fail("child's read");
      n++;
      if (write(back[1], &n, sizeof n) != sizeof n) fail("child's write");
    }
  for (long n = 0;;) {
    say("%ld", n);
    if (write(there[1], &n, sizeof n) != sizeof n) fail("write");
    if (read(back[0], &n, sizeof n) != sizeof n) fail("read");
    if (asked) {
      asked = 0;
      unsigned sum = 0;
      for (size_t left = sizeof bytes; left > 0;) {
        ssize_t got = read(full[0], bytes, left);
        if (got <= 0) fail("buffered read");
        for (ssize_t i = 0; i < got; i++) sum += bytes[i];
        left -= got;
      }
      say("buffered %u", sum);
    }
    rest(20);
  }
}
