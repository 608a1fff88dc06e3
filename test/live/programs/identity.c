// identity ADDRESS: a listener on every address, and a connection to it by one of them, accepted by the program itself. Prints a rising
// number, its host name, and whether the connection is open.
#include "say.h"
#include <arpa/inet.h>
#include <sys/socket.h>

int main(int argc, char **argv) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(7071)};
  int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (bind(listener, (void *)&address, sizeof address) || listen(listener, 1)) fail("listen");
  if (argc < 2 || inet_pton(AF_INET, argv[1], &address.sin_addr) != 1) fail("address");
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  if (connect(fd, (void *)&address, sizeof address)) fail("connect");
  int other = accept(listener, 0, 0);
  if (other < 0) fail("accept");
  for (long n = 0;; n++) {
    char name[256] = "", byte;
    gethostname(name, sizeof name - 1);
    ssize_t got = recv(fd, &byte, 1, MSG_DONTWAIT);
    int open = got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
    say("%ld %s %s", n, name, open ? "open" : "closed");
    rest(20);
  }
}
