// sleeper [EXIT]: does nothing until SIGTERM, then ends with EXIT (0).
#include "say.h"
#include <signal.h>

static int status;
static void end(int signal) { (void)signal; _exit(status); }

int main(int argc, char **argv) {
  status = argc > 1 ? atoi(argv[1]) : 0;
  signal(SIGTERM, end);
  for (;;) pause();
}
