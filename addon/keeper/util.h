/*
 * Small things that every part uses: buffers, time, files, messages for people.
 *
 * Functions return 0 (or a count, or an fd) or -errno. Memory for small things is taken for granted: when the
 * kernel refuses a few bytes the program ends, because nothing sensible can follow. Sizes that somebody
 * else chooses (frames) are checked.
 */
#pragma once

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

#define countof(array) (sizeof(array) / sizeof((array)[0]))
#define container_of(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))

#define KIB ((size_t)1024)
#define MIB ((size_t)1024 * 1024)

/* Longest path that fits a unix socket's address with its NUL. */
#define SOCKET_PATH_MAX 107

/* Frees or closes at the end of the scope, so that early returns are safe. */
void close_fd(int *fd);
void free_pointer(void *pointer);
#define autofd __attribute__((cleanup(close_fd))) int
#define autofree __attribute__((cleanup(free_pointer)))

/* Closes every descriptor from `first` on. */
void close_from(int first);

/* Never NULL. */
void *allocate(size_t size);
void *reallocate(void *old, size_t size);
char *copy_string(const char *text);
char *format(const char *text, ...) __attribute__((format(printf, 1, 2)));

/* Bytes waiting to be sent or parsed: data[start..end). */
struct buffer {
  uint8_t *data;
  size_t start, end, capacity;
};

static inline size_t buffer_length(const struct buffer *b) { return b->end - b->start; }
/* Room for `more` bytes after `end`; -ENOMEM. */
int buffer_reserve(struct buffer *b, size_t more);
void buffer_append(struct buffer *b, const void *data, size_t length);
/* Drops bytes from the front; an empty buffer that had grown gives its memory back. */
void buffer_consume(struct buffer *b, size_t length);
void buffer_free(struct buffer *b);

uint64_t now_ms(void);      /* CLOCK_MONOTONIC */
uint64_t now_ns_real(void); /* CLOCK_REALTIME */

uint64_t fnv1a(const void *data, size_t length);

bool starts_with(const char *text, const char *prefix);
/* The part after the last slash. */
const char *base_name(const char *path);
/* A decimal number, or -EINVAL. */
int64_t parse_number(const char *text);
/* An environment variable as a number, or `fallback` when it is unset or no number. */
uint64_t environment_number(const char *name, uint64_t fallback);

/* mkdir -p. */
int make_directories(const char *path, mode_t mode);
int make_parents(const char *path, mode_t mode);
/* A whole file, at most `limit` bytes, with a NUL behind it; the caller frees *text. */
int read_file(const char *path, size_t limit, char **text, size_t *length);
/* One write(2) into an existing file such as those of /proc and cgroups. */
int write_existing(const char *path, const char *text);
int write_all(int fd, const void *data, size_t length);
/* Reads until end of file, or until nothing has come for `idle_ms`: -ETIMEDOUT; at most `limit` bytes, more is -EFBIG. */
int read_to_end(int fd, size_t limit, uint64_t idle_ms, struct buffer *out);

/* A socket address for a path, or for an abstract name that begins with '@'; *length for bind and connect. */
struct sockaddr_un;
int socket_address(const char *path, struct sockaddr_un *address, unsigned *length);
/* Connects without blocking; an fd with CLOEXEC and NONBLOCK. -EAGAIN: the other's backlog is full. */
int connect_unix(const char *path);

/* Waits until `fd` is ready for `events` or the deadline has passed: -ETIMEDOUT. */
int wait_fd(int fd, short events, uint64_t deadline);

const char *run_directory(void);
uint64_t mount_namespace(const char *proc_entry);
