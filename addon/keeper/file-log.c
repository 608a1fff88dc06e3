/*
 * cedana-log: writes a container's output into log files (`file://`), in a process of its own. Opening a file and writing to it wait for
 * the disk, or for a server that may be gone; the keeper must not, because all of its pod waits for it.
 *
 * Contract
 *   arguments   the files of stdout and stderr; "": there is no such stream. The same for both: one file
 *   inherited   0 to 2 /dev/null; 3 and 4 the pipes' read ends; 5 a pipe to the keeper
 *   says        on fd 5 "+" when the files are open; "-ERRNO TEXT" when one can't be, and exits with 1; later a TEXT whenever a
 *               file takes nothing. It is tried again then, for as long as it takes: the container waits
 *   exit        0 when the streams have ended and all of them is written
 *   killed      the keeper has the read ends, too, and starts another one: what had been read and not written is lost
 */
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include "launcher.h"
#include "util.h"

#define STREAMS 2
#define FIRST_FD 3
#define KEEPER_FD 5
#define BLOCK_BYTES (32 * 1024)
#define WRITE_AGAIN_MS 500

struct stream {
  int from, to; /* -1: none, or ended */
};

static void tell(const char *text) {
  /* Nobody to hear it: the keeper has gone, and the container will. */
  if (write(KEEPER_FD, text, strlen(text)) < 0) return;
}

/* O_NONBLOCK, so that a FIFO that nobody reads is an error; once it is open, it may wait. */
static int open_file(const char *path) {
  make_parents(path, 0755);
  int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0644);
  if (fd < 0) {
    int error = errno;
    autofree char *text = format("-%d open %s: %s", error, path, strerror(error));
    tell(text);
    return -error;
  }
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
  return fd;
}

static void write_whole(int fd, const uint8_t *data, size_t length) {
  bool failing = false;
  while (length > 0) {
    ssize_t count = write(fd, data, length);
    if (count > 0) {
      data += count;
      length -= (size_t)count;
      failing = false;
      continue;
    }
    if (count < 0 && errno == EINTR) continue;
    if (!failing) tell(count < 0 ? strerror(errno) : "nothing was written");
    failing = true;
    poll(NULL, 0, WRITE_AGAIN_MS);
  }
}

int log_main(int argc, char **argv) {
  static uint8_t block[BLOCK_BYTES];
  struct stream streams[STREAMS] = {{-1, -1}, {-1, -1}};
  if (argc != 1 + STREAMS || fcntl(KEEPER_FD, F_GETFD) < 0) {
    fputs("cedana-log: it is started by a pod's keeper, for containers with file:// logs\n", stderr);
    return 64;
  }
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN);
  /* No file system is held by where we are. */
  if (chdir("/") < 0) return 1;
  for (int i = 0; i < STREAMS; i++) {
    const char *path = argv[1 + i];
    if (!*path) continue;
    streams[i].from = FIRST_FD + i;
    bool same = i > 0 && streams[0].to >= 0 && !strcmp(path, argv[1]);
    streams[i].to = same ? streams[0].to : open_file(path);
    if (streams[i].to < 0) return 1;
  }
  tell("+");
  while (streams[0].from >= 0 || streams[1].from >= 0) {
    struct pollfd ready[STREAMS];
    for (int i = 0; i < STREAMS; i++) ready[i] = (struct pollfd){.fd = streams[i].from, .events = POLLIN};
    if (poll(ready, STREAMS, -1) < 0) continue; /* EINTR */
    for (int i = 0; i < STREAMS; i++) {
      if (streams[i].from < 0 || !ready[i].revents) continue;
      ssize_t count = read(streams[i].from, block, sizeof block);
      if (count > 0) write_whole(streams[i].to, block, (size_t)count);
      else if (count == 0 || (errno != EINTR && errno != EAGAIN)) streams[i].from = -1;
    }
  }
  return 0;
}
