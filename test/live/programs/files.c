// files: an open file that grows by a number per round, a file that was deleted while open (its contents and
// offset must survive), and a read-only one with an offset. Prints the number when all three say what they should.
#include "say.h"
#include <fcntl.h>
#include <sys/stat.h>

int main(void) {
  int log = open("/tmp/log", O_RDWR | O_CREAT | O_TRUNC | O_APPEND, 0600);
  int gone = open("/tmp/gone", O_RDWR | O_CREAT | O_TRUNC, 0600);
  int bin = open("/bin/busybox", O_RDONLY);
  if (log < 0 || gone < 0 || bin < 0) fail("open");
  if (write(gone, "kept in a deleted file", 22) != 22 || unlink("/tmp/gone")) fail("unlink");
  if (lseek(gone, 8, SEEK_SET) != 8 || lseek(bin, 4096, SEEK_SET) != 4096) fail("lseek");
  for (long n = 0;; n++) {
    long last = -1;
    char text[15] = "";
    struct stat state;
    if (write(log, &n, sizeof n) != sizeof n) fail("write");
    if (fstat(log, &state) || state.st_size != (n + 1) * (long)sizeof n) fail("size of the log");
    if (pread(log, &last, sizeof last, n * sizeof n) != sizeof last || last != n) fail("read of the log");
    if (lseek(gone, 0, SEEK_CUR) != 8 || pread(gone, text, 14, 8) != 14 || strcmp(text, "a deleted file"))
      fail("the deleted file");
    if (fstat(gone, &state) || state.st_nlink != 0) fail("links of the deleted file");
    if (lseek(bin, 0, SEEK_CUR) != 4096) fail("offset of the read-only file");
    say("%ld", n);
    rest(20);
  }
}
