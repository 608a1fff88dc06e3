// inflight: a listening socket with a connection that nobody has accepted yet, and a number per round.
#include "say.h"
#include <arpa/inet.h>
#include <sys/socket.h>

int main(void) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(7071)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (bind(listener, (void *)&address, sizeof address) || listen(listener, 8)) fail("listen");
  int client = socket(AF_INET, SOCK_STREAM, 0);
  if (connect(client, (void *)&address, sizeof address)) fail("connect");
  for (long n = 0;; n++) {
    say("%ld", n);
    rest(20);
  }
}
