// Shared by the test programs: whole lines by one write(2) each, so that a dump never cuts one in two,
// and an end with a message when something that must hold doesn't.
#pragma once
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static inline void say(const char *format, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(line, sizeof line - 1, format, arguments);
  va_end(arguments);
  line[length++] = '\n';
  for (int done = 0; done < length;) {
    ssize_t n = write(1, line + done, length - done);
    if (n < 0 && errno != EINTR) _exit(101);
    if (n > 0) done += n;
  }
}

static inline void fail(const char *what) {
  say("FAILED %s: %s", what, strerror(errno));
  _exit(100);
}

// Sleeps the whole time: an interrupted sleep goes on. CRIU interrupts sleeps.
static inline void rest(long ms) {
  struct timespec left = {ms / 1000, (ms % 1000) * 1000000};
  while (nanosleep(&left, &left) && errno == EINTR) {}
}
