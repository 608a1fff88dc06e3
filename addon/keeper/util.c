#include "util.h"

#include <ctype.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

void close_fd(int *fd) {
  if (*fd >= 0) close(*fd);
  *fd = -1;
}

void close_from(int first) {
  if (syscall(SYS_close_range, (unsigned)first, ~0U, 0) == 0) return;
  for (int fd = first; fd < (int)sysconf(_SC_OPEN_MAX); fd++) close(fd); /* Linux before 5.9 */
}

void free_pointer(void *pointer) { free(*(void **)pointer); }

static _Noreturn void out_of_memory(void) {
  static const char text[] = "out of memory\n";
  if (write(2, text, sizeof text - 1) < 0) _exit(71);
  _exit(71);
}

void *allocate(size_t size) {
  void *memory = calloc(1, size ? size : 1);
  if (!memory) out_of_memory();
  return memory;
}

void *reallocate(void *old, size_t size) {
  void *memory = realloc(old, size ? size : 1);
  if (!memory) out_of_memory();
  return memory;
}

char *copy_string(const char *text) {
  size_t size = strlen(text) + 1;
  return memcpy(allocate(size), text, size);
}

char *format(const char *text, ...) {
  va_list list;
  va_start(list, text);
  int length = vsnprintf(NULL, 0, text, list);
  va_end(list);
  char *out = allocate((size_t)length + 1);
  va_start(list, text);
  vsnprintf(out, (size_t)length + 1, text, list);
  va_end(list);
  return out;
}

int buffer_reserve(struct buffer *b, size_t more) {
  if (b->start == b->end) b->start = b->end = 0;
  if (b->capacity - b->end >= more) return 0;
  size_t used = buffer_length(b);
  if (b->start > 0 && (b->start >= used || used < 64 * KIB)) {
    /* Only when it is cheap, or a long queue from which little goes at a time would be moved again and again. */
    memmove(b->data, b->data + b->start, used);
    b->start = 0;
    b->end = used;
    if (b->capacity - b->end >= more) return 0;
  }
  size_t capacity = b->capacity ? b->capacity : 512;
  while (capacity - b->end < more) capacity *= 2;
  uint8_t *data = realloc(b->data, capacity);
  if (!data) return -ENOMEM;
  b->data = data;
  b->capacity = capacity;
  return 0;
}

void buffer_append(struct buffer *b, const void *data, size_t length) {
  if (buffer_reserve(b, length) < 0) out_of_memory();
  if (length) memcpy(b->data + b->end, data, length);
  b->end += length;
}

void buffer_consume(struct buffer *b, size_t length) {
  b->start += length;
  if (b->start < b->end) return;
  b->start = b->end = 0;
  if (b->capacity > 8 * KIB) buffer_free(b);
}

void buffer_free(struct buffer *b) {
  free(b->data);
  *b = (struct buffer){0};
}

uint64_t now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

uint64_t now_ns_real(void) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

uint64_t fnv1a(const void *data, size_t length) {
  const uint8_t *bytes = data;
  uint64_t hash = 0xcbf29ce484222325;
  for (size_t i = 0; i < length; i++) hash = (hash ^ bytes[i]) * 0x100000001b3;
  return hash;
}

bool starts_with(const char *text, const char *prefix) { return strncmp(text, prefix, strlen(prefix)) == 0; }

const char *base_name(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

int64_t parse_number(const char *text) {
  int64_t number = 0;
  if (!isdigit((unsigned char)*text)) return -EINVAL;
  for (; isdigit((unsigned char)*text); text++) {
    if (number > (INT64_MAX - 9) / 10) return -EINVAL;
    number = number * 10 + (*text - '0');
  }
  return *text == 0 || *text == '\n' ? number : -EINVAL;
}

uint64_t environment_number(const char *name, uint64_t fallback) {
  const char *text = getenv(name);
  int64_t number = text ? parse_number(text) : -EINVAL;
  return number < 0 ? fallback : (uint64_t)number;
}

int make_directories(const char *path, mode_t mode) {
  if (mkdir(path, mode) == 0 || errno == EEXIST) return 0;
  if (errno != ENOENT) return -errno;
  int result = make_parents(path, mode);
  if (result < 0) return result;
  return mkdir(path, mode) == 0 || errno == EEXIST ? 0 : -errno;
}

int make_parents(const char *path, mode_t mode) {
  autofree char *parent = copy_string(path);
  char *slash = strrchr(parent, '/');
  if (!slash || slash == parent) return 0;
  *slash = 0;
  return make_directories(parent, mode);
}

int read_file(const char *path, size_t limit, char **text, size_t *length) {
  *text = NULL;
  autofd fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -errno;
  size_t used = 0, capacity = 1024;
  autofree char *data = allocate(capacity);
  for (;;) {
    if (used + 1 >= capacity) data = reallocate(data, capacity *= 2);
    ssize_t n = read(fd, data + used, capacity - used - 1);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return -errno;
    if (n == 0) break;
    used += (size_t)n;
    if (used > limit) return -EFBIG;
  }
  data[used] = 0;
  if (length) *length = used;
  *text = data;
  data = NULL;
  return 0;
}

int write_existing(const char *path, const char *text) {
  autofd fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return -errno;
  return write(fd, text, strlen(text)) < 0 ? -errno : 0;
}

int write_all(int fd, const void *data, size_t length) {
  const uint8_t *bytes = data;
  while (length > 0) {
    ssize_t n = write(fd, bytes, length);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return -errno;
    bytes += n;
    length -= (size_t)n;
  }
  return 0;
}

int read_to_end(int fd, size_t limit, uint64_t idle_ms, struct buffer *out) {
  for (;;) {
    int result = wait_fd(fd, POLLIN, now_ms() + idle_ms);
    if (result < 0) return result;
    if (buffer_reserve(out, 4096) < 0) return -ENOMEM;
    ssize_t n = read(fd, out->data + out->end, out->capacity - out->end);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (n < 0) return -errno;
    if (n == 0) return 0;
    out->end += (size_t)n;
    if (buffer_length(out) > limit) return -EFBIG;
  }
}

int socket_address(const char *path, struct sockaddr_un *address, unsigned *length) {
  *address = (struct sockaddr_un){.sun_family = AF_UNIX};
  size_t size = strlen(path);
  if (size == 0) return -EINVAL;
  if (size > SOCKET_PATH_MAX) return -ENAMETOOLONG;
  memcpy(address->sun_path, path, size);
  if (path[0] == '@') {
    address->sun_path[0] = 0;
    *length = (unsigned)(offsetof(struct sockaddr_un, sun_path) + size);
  } else {
    *length = sizeof *address;
  }
  return 0;
}

int connect_unix(const char *path) {
  struct sockaddr_un address;
  unsigned length;
  int result = socket_address(path, &address, &length);
  if (result < 0) return result;
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return -errno;
  if (connect(fd, (struct sockaddr *)&address, length) < 0) {
    result = -errno;
    close(fd);
    return result;
  }
  return fd;
}

int wait_fd(int fd, short events, uint64_t deadline) {
  for (;;) {
    uint64_t now = now_ms();
    struct pollfd p = {.fd = fd, .events = events};
    uint64_t left = now >= deadline ? 0 : deadline - now;
    int n = poll(&p, 1, left > INT_MAX ? INT_MAX : (int)left);
    if (n > 0) return 0;
    if (n < 0 && errno != EINTR) return -errno;
    if (n == 0 && now_ms() >= deadline) return -ETIMEDOUT;
  }
}

const char *run_directory(void) {
  const char *directory = getenv("CEDANA_RUN_DIR");
  return directory && *directory ? directory : "/run/cedana";
}

uint64_t mount_namespace(const char *proc_entry) {
  struct stat st;
  return stat(proc_entry, &st) == 0 ? (uint64_t)st.st_ino : 0;
}
