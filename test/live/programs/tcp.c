// tcp: two processes and one established TCP connection over the loopback of the container's own network
// namespace. The client sends a number, the server sends it back, the client prints it. The listener stays open.
#include "say.h"
#include <arpa/inet.h>
#include <sys/socket.h>

static void whole(int fd, long *number, int writing) {
  for (size_t done = 0; done < sizeof *number;) {
    char *at = (char *)number + done;
    ssize_t n = writing ? write(fd, at, sizeof *number - done) : read(fd, at, sizeof *number - done);
    if (n == 0) fail("the connection ended");
    if (n < 0 && errno != EINTR) fail(writing ? "write" : "read");
    if (n > 0) done += n;
  }
}

int main(void) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(7070)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (bind(listener, (void *)&address, sizeof address) || listen(listener, 1)) fail("listen");
  pid_t server = fork();
  if (server < 0) fail("fork");
  if (server == 0) {
    int fd = accept(listener, 0, 0);
    if (fd < 0) fail("accept");
    for (long number;;) {
      whole(fd, &number, 0);
      whole(fd, &number, 1);
    }
  }
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  if (connect(fd, (void *)&address, sizeof address)) fail("connect");
  for (long n = 0;; n++) {
    long echo = n;
    whole(fd, &echo, 1);
    whole(fd, &echo, 0);
    say("%ld", echo);
    rest(20);
  }
}
