// outside PATH: sends a number to the datagram socket at PATH, which somebody outside of the container listens on, over a
// connected socket as syslog(3) has it, and prints it.
#include "say.h"
#include <sys/socket.h>
#include <sys/un.h>

int main(int argc, char **argv) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (argc < 2) fail("no path");
  strcpy(address.sun_path, argv[1]);
  int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
  if (fd < 0 || connect(fd, (void *)&address, sizeof address)) fail("connect");
  for (long n = 0;; n++) {
    if (send(fd, &n, sizeof n, 0) != sizeof n) fail("send");
    say("%ld", n);
    rest(20);
  }
}
