/*
 * Errors, where callers look for them: stderr has the text for people, and the --log file what runc would write there, one
 * entry a line, because shims and conmon take the last error of it for their own message.
 *
 *   text   time="2026-01-02T03:04:05Z" level=error msg="…"
 *   json   {"level":"error","msg":"…","time":"2026-01-02T03:04:05Z"}
 *
 * As in runc, text when nothing is asked for. crun's other places (journald:, syslog:) are left to stderr.
 */
#include <fcntl.h>
#include <stdarg.h>
#include <time.h>
#include <unistd.h>

#include "runtime.h"

static void append_quoted(struct buffer *out, const char *text) {
  buffer_append(out, "\"", 1);
  for (; *text; text++) {
    unsigned char c = (unsigned char)*text;
    char escaped[8];
    if (c == '"' || c == '\\') snprintf(escaped, sizeof escaped, "\\%c", c);
    else if (c == '\n') strcpy(escaped, "\\n");
    else if (c == '\t') strcpy(escaped, "\\t");
    else if (c < 0x20) snprintf(escaped, sizeof escaped, "\\u%04x", c);
    else escaped[0] = (char)c, escaped[1] = 0;
    buffer_append(out, escaped, strlen(escaped));
  }
  buffer_append(out, "\"", 1);
}

static void append(struct buffer *out, const char *text) { buffer_append(out, text, strlen(text)); }

static void write_log(const char *message) {
  const char *path = runtime.log;
  if (!path || !*path || starts_with(path, "journald:") || starts_with(path, "syslog:")) return;
  if (starts_with(path, "file:")) path += 5;
  char stamp[32];
  time_t now = time(NULL);
  struct tm parts;
  gmtime_r(&now, &parts);
  strftime(stamp, sizeof stamp, "%Y-%m-%dT%H:%M:%SZ", &parts);
  struct buffer line = {0};
  append(&line, runtime.log_json ? "{\"level\":\"error\",\"msg\":" : "time=\"");
  if (!runtime.log_json) append(&line, stamp), append(&line, "\" level=error msg=");
  append_quoted(&line, message);
  if (runtime.log_json) append(&line, ",\"time\":\""), append(&line, stamp), append(&line, "\"}");
  append(&line, "\n");
  autofd fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NONBLOCK, 0644);
  int result = fd < 0 ? -errno : write_all(fd, line.data + line.start, buffer_length(&line));
  if (result < 0) fprintf(stderr, "cedana-runtime: write the log %s: %s\n", path, strerror(-result));
  buffer_free(&line);
}

void runtime_say_error(const char *text) {
  write_log(text);
  fprintf(stderr, "%s\n", text);
}

void runtime_fail(const char *text, ...) {
  va_list list;
  va_start(list, text);
  char message[8192];
  int used = snprintf(message, sizeof message, "cedana-runtime: ");
  vsnprintf(message + used, sizeof message - (size_t)used, text, list);
  va_end(list);
  runtime_say_error(message);
  exit(1);
}
