// sockets: unix sockets of each kind between two processes: a socketpair, a stream socket with a path and a
// datagram socket with a path. A number goes round through all three and is printed when it is back.
#include "say.h"
#include <sys/socket.h>
#include <sys/un.h>

static struct sockaddr_un at(const char *path) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  strcpy(address.sun_path, path);
  unlink(path);
  return address;
}

static void put(int fd, long number) {
  if (send(fd, &number, sizeof number, 0) != sizeof number) fail("send");
}

static long take(int fd) {
  long number;
  ssize_t n;
  do n = recv(fd, &number, sizeof number, MSG_WAITALL);
  while (n < 0 && errno == EINTR);
  if (n != sizeof number) fail("recv");
  return number;
}

int main(void) {
  int pair[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair)) fail("socketpair");
  struct sockaddr_un stream = at("/tmp/stream.sock"), datagram = at("/tmp/datagram.sock");
  int listener = socket(AF_UNIX, SOCK_STREAM, 0), inbox = socket(AF_UNIX, SOCK_DGRAM, 0);
  if (bind(listener, (void *)&stream, sizeof stream) || listen(listener, 1)) fail("listen");
  if (bind(inbox, (void *)&datagram, sizeof datagram)) fail("bind");
  pid_t child = fork();
  if (child < 0) fail("fork");
  if (child == 0) {
    int to = socket(AF_UNIX, SOCK_STREAM, 0), dgram = socket(AF_UNIX, SOCK_DGRAM, 0);
    if (connect(to, (void *)&stream, sizeof stream)) fail("connect");
    if (connect(dgram, (void *)&datagram, sizeof datagram)) fail("connect datagram");
    for (;;) {
      put(to, take(pair[1]));
      put(dgram, take(to));
    }
  }
  int from = accept(listener, 0, 0);
  if (from < 0) fail("accept");
  for (long n = 0;; n++) {
    put(pair[0], n);
    put(from, take(from));
    say("%ld", take(inbox));
    rest(20);
  }
}
