// locks: holds a flock(2) lock and a record lock of fcntl(2) on two files. Prints a number as long as nobody else
// could get either: another open file for the one, another process for the other.
#include "say.h"
#include <fcntl.h>
#include <sys/file.h>
#include <sys/wait.h>

int main(void) {
  int whole = open("/tmp/whole", O_RDWR | O_CREAT, 0600), record = open("/tmp/record", O_RDWR | O_CREAT, 0600);
  struct flock range = {.l_type = F_WRLCK, .l_start = 10, .l_len = 20};
  if (whole < 0 || record < 0) fail("open");
  if (flock(whole, LOCK_EX | LOCK_NB) || fcntl(record, F_SETLK, &range)) fail("lock");
  for (long n = 0;; n++) {
    int other = open("/tmp/whole", O_RDWR);
    if (other < 0) fail("open again");
    if (!flock(other, LOCK_EX | LOCK_NB) || errno != EWOULDBLOCK) fail("the flock was free");
    close(other);
    pid_t child = fork();
    if (child < 0) fail("fork");
    if (child == 0) _exit(fcntl(record, F_SETLK, &range) == 0);
    int status;
    while (waitpid(child, &status, 0) < 0)
      if (errno != EINTR) fail("waitpid");
    if (status) fail("the record lock was free");
    say("%ld", n);
    rest(20);
  }
}
