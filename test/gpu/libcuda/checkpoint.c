/*
 * The six checkpoint calls. A process that has called cuInit has a mailbox (a memfd, found by its name among the fds of /proc/PID) and a
 * restore thread, which does what the mailbox says. So a call on a frozen process waits as long as that is frozen, a process of another pid
 * or mount namespace can be called, and all of it comes through CRIU.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "driver.h"

#define MAILBOX_NAME "cedana-test-gpu"
#define MAGIC 0x47505543u

enum operation { OP_LOCK = 1, OP_CHECKPOINT, OP_RESTORE, OP_UNLOCK };
static const char *const operation_name[] = {"", "lock", "checkpoint", "restore", "unlock"};

struct mailbox {
  uint32_t magic;
  int32_t tid; /* of the restore thread, in its own pid namespace */
  _Atomic int state;
  _Atomic uint32_t submitted, completed; /* futexes */
  uint32_t operation, timeout_ms, pairs;
  CUcheckpointGpuPair pair[MAX_DEVICES];
  int32_t result;
};

static struct mailbox *own;

static void pause_ms(long ms) { nanosleep(&(struct timespec){ms / 1000, (ms % 1000) * 1000000}, NULL); }

static long elapsed_ms(const struct timespec *since) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (now.tv_sec - since->tv_sec) * 1000 + (now.tv_nsec - since->tv_nsec) / 1000000;
}

/* ---- in the process: the restore thread ---- */

static CUresult run_lock(uint32_t timeout_ms) {
  if (own->state != CU_PROCESS_STATE_RUNNING) return CUDA_ERROR_ILLEGAL_STATE;
  char value[32];
  struct timespec since;
  clock_gettime(CLOCK_MONOTONIC, &since);
  gate_close();
  while ((fault("lock", value, sizeof value) && !strcmp(value, "never")) || gate_inside() > 0 || !streams_idle()) {
    if (timeout_ms && elapsed_ms(&since) >= (long)timeout_ms) {
      gate_open();
      return CUDA_ERROR_NOT_READY;
    }
    nanosleep(&(struct timespec){0, 200000}, NULL);
  }
  own->state = CU_PROCESS_STATE_LOCKED;
  return CUDA_SUCCESS;
}

static CUresult run_checkpoint(const char *switched) {
  if (own->state != CU_PROCESS_STATE_LOCKED) return CUDA_ERROR_ILLEGAL_STATE;
  if (!strcmp(switched, "broken") || memory_blocker()) {
    own->state = CU_PROCESS_STATE_FAILED;
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  TRY(memory_save(!strncmp(switched, "alloc:", 6) ? atoi(switched + 6) : 0));
  device_release();
  own->state = CU_PROCESS_STATE_CHECKPOINTED;
  return CUDA_SUCCESS;
}

static int index_of(const struct devices *all, const CUuuid *uuid) {
  for (int i = 0; i < all->count; i++)
    if (!memcmp(&all->at[i].uuid, uuid, sizeof *uuid)) return i;
  return -1;
}

static CUresult run_restore(void) {
  if (own->state != CU_PROCESS_STATE_CHECKPOINTED) return CUDA_ERROR_ILLEGAL_STATE;
  struct devices plugged = devices_now();
  int to[MAX_DEVICES];
  bool taken[MAX_DEVICES] = {false};
  for (int i = 0; i < devices.count; i++) {
    const CUuuid *wanted = own->pairs ? NULL : &devices.at[i].uuid;
    for (uint32_t p = 0; p < own->pairs; p++)
      if (!memcmp(&own->pair[p].oldUuid, &devices.at[i].uuid, sizeof(CUuuid))) wanted = &own->pair[p].newUuid;
    if (!wanted) return CUDA_ERROR_INVALID_VALUE; /* the pairs must name every GPU that the process saw */
    to[i] = index_of(&plugged, wanted);
    if (to[i] < 0) return own->pairs ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_DEVICE_UNAVAILABLE;
    if (taken[to[i]] || strcmp(plugged.at[to[i]].chip, devices.at[i].chip)) return CUDA_ERROR_INVALID_VALUE;
    taken[to[i]] = true;
  }
  if (!memory_fits(to, &plugged)) return CUDA_ERROR_OUT_OF_MEMORY;
  TRY(memory_restore(to, &plugged));
  struct devices seen = devices;
  for (int i = 0; i < devices.count; i++) seen.at[i] = plugged.at[to[i]];
  devices = seen; /* ordinals stay */
  device_hold();
  own->state = CU_PROCESS_STATE_LOCKED;
  return CUDA_SUCCESS;
}

static CUresult run_unlock(void) {
  if (own->state != CU_PROCESS_STATE_LOCKED) return CUDA_ERROR_ILLEGAL_STATE;
  own->state = CU_PROCESS_STATE_RUNNING;
  gate_open();
  return CUDA_SUCCESS;
}

/* For tests that want to know what is under way: a line in the file `calls`, where there is one. */
static void note(const char *name) {
  char path[600], line[64], comm[16] = "";
  snprintf(path, sizeof path, "%s/calls", gpu_directory());
  int fd = open(path, O_WRONLY | O_APPEND | O_CLOEXEC), own_name = open("/proc/self/comm", O_RDONLY | O_CLOEXEC);
  ssize_t n = own_name >= 0 ? read(own_name, comm, sizeof comm - 1) : 0;
  if (n > 0) comm[n - 1] = 0;
  int size = snprintf(line, sizeof line, "%s %s\n", name, comm);
  if (fd >= 0 && write(fd, line, (size_t)size) < 0) close(fd), fd = -1;
  if (fd >= 0) close(fd);
  if (own_name >= 0) close(own_name);
}

static CUresult run(enum operation operation) {
  char switched[64] = "";
  const char *name = operation_name[operation];
  note(name);
  while (fault(name, switched, sizeof switched) && !strcmp(switched, "hang")) pause_ms(5); /* until somebody takes the switch away */
  if (!strncmp(switched, "error:", 6)) return atoi(switched + 6);
  if (!strcmp(switched, "die")) kill(getpid(), SIGKILL);
  if (!strncmp(switched, "slow:", 5)) pause_ms(atoi(switched + 5));
  switch (operation) {
    case OP_LOCK: return run_lock(own->timeout_ms);
    case OP_CHECKPOINT: return run_checkpoint(switched);
    case OP_RESTORE: return run_restore();
    case OP_UNLOCK: return run_unlock();
  }
  return CUDA_ERROR_INVALID_VALUE;
}

static void *restore_thread(void *started) {
  own->tid = (int32_t)syscall(SYS_gettid);
  *(_Atomic int *)started = 1;
  for (;;) {
    uint32_t done = own->completed;
    if (own->submitted == done) {
      syscall(SYS_futex, &own->submitted, FUTEX_WAIT, done, NULL, NULL, 0);
      continue;
    }
    own->result = run((enum operation)own->operation);
    own->completed = done + 1;
    syscall(SYS_futex, &own->completed, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
  }
  return NULL;
}

CUresult control_start(void) {
  int fd = memfd_create(MAILBOX_NAME, MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, 4096)) return CUDA_ERROR_OUT_OF_MEMORY;
  own = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0); /* the descriptor stays: it is how we are found */
  if (own == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  static _Atomic int started;
  pthread_t thread;
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int error = pthread_create(&thread, NULL, restore_thread, &started);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (error) return CUDA_ERROR_OUT_OF_MEMORY;
  while (!started) sched_yield();
  own->magic = MAGIC;
  return CUDA_SUCCESS;
}

#ifndef WITHOUT_CHECKPOINT_API
/* ---- in the caller ---- */

struct peer {
  int fd;
  struct mailbox *box;
};

static CUresult peer_open(int pid, struct peer *peer) {
  char path[64], link[128];
  if (pid <= 0) return CUDA_ERROR_INVALID_VALUE;
  snprintf(path, sizeof path, "/proc/%d/fd", pid);
  DIR *directory = opendir(path);
  if (!directory) return CUDA_ERROR_INVALID_VALUE;
  CUresult result = CUDA_ERROR_NOT_INITIALIZED;
  for (struct dirent *entry; result && (entry = readdir(directory));) {
    ssize_t n = readlinkat(dirfd(directory), entry->d_name, link, sizeof link - 1);
    if (n <= 0) continue;
    link[n] = 0;
    if (strncmp(link, "/memfd:" MAILBOX_NAME, strlen("/memfd:" MAILBOX_NAME))) continue;
    int fd = openat(dirfd(directory), entry->d_name, O_RDWR | O_CLOEXEC); /* an open file of its own, so that flock(2) tells callers apart */
    void *at = fd >= 0 ? mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
    if (at != MAP_FAILED && ((struct mailbox *)at)->magic == MAGIC) {
      *peer = (struct peer){fd, at};
      result = CUDA_SUCCESS;
    } else if (fd >= 0) {
      close(fd);
    }
  }
  closedir(directory);
  return result;
}

static void peer_close(struct peer *peer) {
  munmap(peer->box, 4096);
  close(peer->fd); /* with its lock */
}

static CUresult wait_completed(int pid, struct mailbox *box, uint32_t target) {
  for (uint32_t seen; (int32_t)((seen = box->completed) - target) < 0;) {
    struct timespec look = {0, 50 * 1000000};
    syscall(SYS_futex, &box->submitted, FUTEX_WAKE, INT_MAX, NULL, NULL, 0); /* a caller may have died before its own */
    syscall(SYS_futex, &box->completed, FUTEX_WAIT, seen, &look, NULL, 0);
    char path[64], link[16];
    snprintf(path, sizeof path, "/proc/%d/exe", pid);
    if (readlink(path, link, sizeof link) < 0) return CUDA_ERROR_UNKNOWN; /* it has ended; a zombie has no executable either */
  }
  return CUDA_SUCCESS;
}

static bool is_zero(const void *from, size_t size) {
  for (size_t i = 0; i < size; i++)
    if (((const char *)from)[i]) return false;
  return true;
}

static CUresult call(int pid, enum operation operation, uint32_t timeout_ms, const CUcheckpointGpuPair *pairs, unsigned count) {
  struct peer peer;
  TRY(peer_open(pid, &peer));
  while (flock(peer.fd, LOCK_EX) && errno == EINTR) continue;
  CUresult result = wait_completed(pid, peer.box, peer.box->submitted); /* of a caller that has died */
  if (!result) {
    peer.box->operation = operation;
    peer.box->timeout_ms = timeout_ms;
    peer.box->pairs = count;
    if (count) memcpy(peer.box->pair, pairs, count * sizeof *pairs);
    uint32_t target = ++peer.box->submitted;
    syscall(SYS_futex, &peer.box->submitted, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    result = wait_completed(pid, peer.box, target);
    if (!result) result = peer.box->result;
  }
  peer_close(&peer);
  return result;
}

EXPORT CUresult cuCheckpointProcessGetState(int pid, CUprocessState *state) {
  char value[32];
  struct peer peer;
  if (!state) return CUDA_ERROR_INVALID_VALUE;
  if (fault("state", value, sizeof value) && !strncmp(value, "error:", 6)) return atoi(value + 6);
  while (fault("state", value, sizeof value) && !strcmp(value, "hang")) pause_ms(5);
  TRY(peer_open(pid, &peer));
  *state = (CUprocessState)peer.box->state;
  peer_close(&peer);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCheckpointProcessGetRestoreThreadId(int pid, int *tid) {
  struct peer peer;
  if (!tid) return CUDA_ERROR_INVALID_VALUE;
  TRY(peer_open(pid, &peer));
  int inside = peer.box->tid;
  peer_close(&peer);
  /* As the caller sees it: the last of NSpid is the thread's own. */
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/task", pid);
  DIR *directory = opendir(path);
  if (!directory) return CUDA_ERROR_INVALID_VALUE;
  CUresult result = CUDA_ERROR_UNKNOWN;
  for (struct dirent *entry; result && (entry = readdir(directory));) {
    char status[300], line[256];
    snprintf(status, sizeof status, "/proc/%d/task/%.20s/status", pid, entry->d_name);
    FILE *file = entry->d_name[0] == '.' ? NULL : fopen(status, "re");
    if (!file) continue;
    while (fgets(line, sizeof line, file)) {
      if (strncmp(line, "NSpid:", 6)) continue;
      char *last = strrchr(line, '\t');
      if (last && atoi(last + 1) == inside) {
        *tid = atoi(entry->d_name);
        result = CUDA_SUCCESS;
      }
    }
    fclose(file);
  }
  closedir(directory);
  return result;
}

EXPORT CUresult cuCheckpointProcessLock(int pid, CUcheckpointLockArgs *args) {
  if (args && (args->reserved0 || !is_zero(args->reserved1, sizeof args->reserved1))) return CUDA_ERROR_INVALID_VALUE;
  return call(pid, OP_LOCK, args ? args->timeoutMs : 0, NULL, 0);
}
EXPORT CUresult cuCheckpointProcessCheckpoint(int pid, CUcheckpointCheckpointArgs *args) {
  if (args && !is_zero(args, sizeof *args)) return CUDA_ERROR_INVALID_VALUE;
  return call(pid, OP_CHECKPOINT, 0, NULL, 0);
}
EXPORT CUresult cuCheckpointProcessRestore(int pid, CUcheckpointRestoreArgs *args) {
  if (args && driver_version() < 13000 && !is_zero(args, sizeof *args)) return CUDA_ERROR_INVALID_VALUE; /* all reserved then */
  if (args && (!is_zero(args->reserved, sizeof args->reserved) || args->gpuPairsCount > MAX_DEVICES || (args->gpuPairsCount && !args->gpuPairs)))
    return CUDA_ERROR_INVALID_VALUE;
  if (!initialised && fault("persistence", NULL, 0)) return CUDA_ERROR_DEVICE_UNAVAILABLE;
  return call(pid, OP_RESTORE, 0, args ? args->gpuPairs : NULL, args ? args->gpuPairsCount : 0);
}
EXPORT CUresult cuCheckpointProcessUnlock(int pid, CUcheckpointUnlockArgs *args) {
  if (args && !is_zero(args, sizeof *args)) return CUDA_ERROR_INVALID_VALUE;
  return call(pid, OP_UNLOCK, 0, NULL, 0);
}
#endif
