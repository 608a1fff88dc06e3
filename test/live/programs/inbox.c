// inbox PATH: makes a datagram socket at PATH and prints the numbers that arrive.
#include "say.h"
#include <sys/socket.h>
#include <sys/un.h>

int main(int argc, char **argv) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (argc < 2) fail("no path");
  strcpy(address.sun_path, argv[1]);
  int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
  if (fd < 0 || bind(fd, (void *)&address, sizeof address)) fail("bind");
  for (long number;;) {
    ssize_t n = recv(fd, &number, sizeof number, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n != sizeof number) fail("recv");
    say("%ld", number);
  }
}
