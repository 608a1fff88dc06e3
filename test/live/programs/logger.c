// logger file FILE [delay MS]: a log program for binary:// as containerd knows them, with the URI's query as its arguments: stdout on
// fd 3, stderr on fd 4, and fd 5 to be closed when it is ready, after MS. Writes "out: LINE" and "err: LINE" to FILE, and whose
// they are first.
#include "say.h"
#include <fcntl.h>
#include <poll.h>

static void copy(FILE *log, const char *name, int fd, char *buffer, size_t *length, int *open) {
  ssize_t n = read(fd, buffer + *length, 4096 - *length);
  if (n <= 0) {
    *open = 0;
    return;
  }
  *length += (size_t)n;
  for (char *end; (end = memchr(buffer, '\n', *length));) {
    size_t line = (size_t)(end - buffer);
    fprintf(log, "%s: %.*s\n", name, (int)line, buffer);
    *length -= line + 1;
    memmove(buffer, end + 1, *length);
  }
  fflush(log);
}

int main(int argc, char **argv) {
  const char *path = 0;
  long delay = 0;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (!strcmp(argv[i], "file")) path = argv[i + 1];
    if (!strcmp(argv[i], "delay")) delay = atol(argv[i + 1]);
  }
  FILE *log = path ? fopen(path, "a") : 0;
  if (!log) return 2;
  rest(delay);
  fprintf(log, "container %s in %s\n", getenv("CONTAINER_ID"), getenv("CONTAINER_NAMESPACE"));
  fflush(log);
  close(5);
  char buffers[2][4096];
  size_t lengths[2] = {0, 0};
  int open[2] = {1, 1};
  while (open[0] || open[1]) {
    struct pollfd fds[2] = {{open[0] ? 3 : -1, POLLIN, 0}, {open[1] ? 4 : -1, POLLIN, 0}};
    if (poll(fds, 2, -1) < 0) return 4;
    for (int i = 0; i < 2; i++)
      if (open[i] && fds[i].revents) copy(log, i ? "err" : "out", 3 + i, buffers[i], &lengths[i], &open[i]);
  }
  fprintf(log, "end\n");
  return fclose(log);
}
