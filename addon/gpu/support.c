#include "gpu.h"

#include <dlfcn.h>
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>

/*
 * Before glibc 2.34 these are in libdl and libpthread, which a program may not have. Then the libraries are asked for, by what libc has for
 * its own use. musl has them all.
 */
#pragma weak dlopen
#pragma weak dlsym
#pragma weak dlclose
#pragma weak pthread_create
#pragma weak pthread_detach
void *__libc_dlopen_mode(const char *name, int mode) __attribute__((weak));
void *__libc_dlsym(void *handle, const char *name) __attribute__((weak));
#define RTLD_OF_LIBC 0x80000000 /* __RTLD_DLOPEN, without which it asserts */

static void *from_library(const char *library, const char *name) {
  void *handle = __libc_dlopen_mode && __libc_dlsym ? __libc_dlopen_mode(library, (int)(RTLD_NOW | RTLD_OF_LIBC)) : NULL;
  return handle ? __libc_dlsym(handle, name) : NULL;
}

void *library_open(const char *path) {
  void *(*function)(const char *, int) = dlopen;
  if (!function) {
    void *found = from_library("libdl.so.2", "dlopen");
    memcpy(&function, &found, sizeof function);
  }
  return function ? function(path, RTLD_NOW | RTLD_LOCAL) : NULL;
}

void *library_symbol(void *handle, const char *name) {
  void *(*function)(void *, const char *) = dlsym;
  if (!function) {
    void *found = from_library("libdl.so.2", "dlsym");
    memcpy(&function, &found, sizeof function);
  }
  return function ? function(handle, name) : NULL;
}

void library_close(void *handle) {
  if (dlclose) dlclose(handle); /* without it, a library that isn't the driver stays */
}

/* Straight to the kernel: the caller's errno is the caller's. Returns -errno. */
long kernel(long number, long a, long b, long c, long d, long e, long f) {
  register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
  long result;
  __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
  return result;
}

void *map_memory(size_t bytes) {
  long at = kernel(SYS_mmap, 0, (long)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return at < 0 && at > -4096 ? NULL : (void *)at;
}

/* Rest of the block that `keep` takes from. What a child of a fork finds here is a private copy, and good. */
static char *block;
static size_t block_left;
#define BLOCK_BYTES (256 * 1024)

/* In a child of a fork: the other threads' allocations may have been cut in the middle. */
void keep_reset(void) {
  block_left = 0;
}

void *keep(size_t bytes) {
  bytes = (bytes + 127) & ~(size_t)127;
  if (bytes > BLOCK_BYTES / 4) return map_memory(bytes);
  lock(&process->lock_keep);
  if (bytes > block_left) {
    char *next = map_memory(BLOCK_BYTES);
    if (next) block = next, block_left = BLOCK_BYTES;
  }
  void *got = NULL;
  if (bytes <= block_left) got = block, block += bytes, block_left -= bytes;
  unlock(&process->lock_keep);
  return got;
}

/* 0 free, 1 held, 2 held and waited for. */
void lock(uint32_t *word) {
  uint32_t free_ = 0;
  if (__atomic_compare_exchange_n(word, &free_, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) return;
  while (__atomic_exchange_n(word, 2, __ATOMIC_ACQUIRE) != 0) futex_wait(word, 2, 0, false);
}

void unlock(uint32_t *word) {
  if (__atomic_exchange_n(word, 0, __ATOMIC_RELEASE) == 2) futex_wake(word, false);
}

/* @param timeout_ns  0: for ever */
void futex_wait(uint32_t *word, uint32_t value, uint64_t timeout_ns, bool shared) {
  struct timespec timeout = {.tv_sec = (time_t)(timeout_ns / 1000000000), .tv_nsec = (long)(timeout_ns % 1000000000)};
  kernel(SYS_futex, (long)word, shared ? FUTEX_WAIT : FUTEX_WAIT_PRIVATE, value, timeout_ns ? (long)&timeout : 0, 0, 0);
}

void futex_wake(uint32_t *word, bool shared) {
  kernel(SYS_futex, (long)word, shared ? FUTEX_WAKE : FUTEX_WAKE_PRIVATE, INT32_MAX, 0, 0, 0);
}

/* By way of the vDSO: 20 to 40 ns, where the kernel would take hundreds. */
uint64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

void sleep_ns(uint64_t ns) {
  struct timespec time = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
  kernel(SYS_nanosleep, (long)&time, 0, 0, 0, 0, 0);
}

uint32_t own_pid(void) {
  return (uint32_t)kernel(SYS_getpid, 0, 0, 0, 0, 0, 0);
}

uint32_t own_tid(void) {
  return (uint32_t)kernel(SYS_gettid, 0, 0, 0, 0, 0, 0);
}

int start_thread(void *(*body)(void *), void *argument) {
  uint64_t all = ~0ull, before;
  /* The kernel's mask: the program's signals are for the program's threads. Inherited by the new one. */
  kernel(SYS_rt_sigprocmask, SIG_SETMASK, (long)&all, (long)&before, 8, 0, 0);
  pthread_t thread;
  int (*create)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) = pthread_create;
  int (*detach)(pthread_t) = pthread_detach;
  if (!create || !detach) {
    void *found[] = {from_library("libpthread.so.0", "pthread_create"), from_library("libpthread.so.0", "pthread_detach")};
    memcpy(&create, &found[0], sizeof create);
    memcpy(&detach, &found[1], sizeof detach);
  }
  int failed = create && detach ? create(&thread, NULL, body, argument) : ENOSYS;
  if (!failed) detach(thread);
  kernel(SYS_rt_sigprocmask, SIG_SETMASK, (long)&before, 0, 8, 0, 0);
  return failed;
}
