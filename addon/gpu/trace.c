/*
 * The trace: each call with its time, duration and bytes, and per entry point the sums, in Chrome's trace event format.
 *
 * A thread writes into a ring of its own, without a lock; the control thread empties the rings every 200 ms, or when one is half full, into one
 * file of the process, below the directory that CEDANA_GPU_TRACE names. What finds no place in a ring is counted, not waited for; the sums are kept beside
 * the rings, and are whole.
 *
 * The file is a whole JSON document after each write: the end of the document is part of every write, and the next one begins by
 * overwriting it. A SIGKILL costs the events since the last write; one that hits within a write leaves a document without its end, which
 * `cedana gpu trace` mends. No descriptor stays open. The file is bounded: past half of CEDANA_GPU_TRACE_BYTES it becomes the older part
 * (`.old.json`, replacing the one before), and a new one begins.
 *
 *   {"displayTimeUnit":"ns","traceEvents":[
 *   {"name":"process_name","ph":"M","pid":7,"tid":7,"args":{"name":"train"}},
 *   {"name":"cuMemcpyHtoD_v2","ph":"X","ts":81.250,"dur":4.100,"pid":7,"tid":9,"args":{"bytes":4096}}
 *   ],"otherData":{"dropped":0,"calls":{"cuMemcpyHtoD_v2":{"calls":1,"bytes":4096,"ns":4100,"errors":0}}}}
 *
 * Times are of CLOCK_MONOTONIC, in microseconds; an event of a call that failed has the driver's error as `error`.
 */
#include "gpu.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define RING_EVENTS 4096u /* a power of two */
#define BUFFER_BYTES (256 * 1024)
#define EVENT_BYTES 384 /* more than one event takes */
#define DEFAULT_BYTES (64ull * 1024 * 1024)
#define LEAST_BYTES (1024ull * 1024)
#define PATH_BYTES 1024

struct event {
  uint64_t began_ns, ns, bytes;
  uint32_t index, error;
};

struct ring {
  uint32_t head __attribute__((aligned(64))); /* the thread's */
  uint32_t dropped;
  uint32_t tail __attribute__((aligned(64))); /* the reader's */
  struct event events[RING_EVENTS] __attribute__((aligned(64)));
};

static struct {
  char path[PATH_BYTES], old_path[PATH_BYTES];
  uint64_t limit;    /* of one of the two files */
  uint64_t position; /* where the next events go: the end of the document begins here */
  uint64_t end;      /* of the file */
  uint64_t lost;     /* events that could not be written */
  char *buffer;
  uint64_t calls; /* in the sums of the last write */
} trace;

void trace_call(struct call *call) {
  struct shard *shard = call->shard;
  uint64_t ns = now_ns() - call->began_ns;
  if (unlikely(!shard->ring)) {
    shard->totals = keep(ENTRY_COUNT * sizeof *shard->totals);
    struct ring *ring = shard->totals ? keep(sizeof *ring) : NULL;
    if (!ring) {
      __atomic_add_fetch(&trace.lost, 1, __ATOMIC_RELAXED);
      return;
    }
    __atomic_store_n(&shard->ring, ring, __ATOMIC_RELEASE);
  }
  struct ring *ring = shard->ring;
  uint64_t bytes = call->result == CUDA_SUCCESS ? bytes_moved(entries[call->index].rule, call) : 0;
  struct total *total = &shard->totals[call->index];
  total->calls++;
  total->ns += ns;
  total->bytes += bytes;
  total->errors += call->result != CUDA_SUCCESS;
  uint32_t head = ring->head, used = head - __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE);
  if (used == RING_EVENTS) {
    ring->dropped++;
    return;
  }
  if (used == RING_EVENTS / 2) control_wake();
  ring->events[head % RING_EVENTS] = (struct event){call->began_ns, ns, bytes, call->index, (uint32_t)call->result};
  __atomic_store_n(&ring->head, head + 1, __ATOMIC_RELEASE);
}

uint64_t trace_dropped(void) {
  uint64_t dropped = __atomic_load_n(&trace.lost, __ATOMIC_RELAXED);
  for (struct shard *shard = __atomic_load_n(&process->shards, __ATOMIC_ACQUIRE); shard; shard = shard->next) {
    struct ring *ring = __atomic_load_n(&shard->ring, __ATOMIC_ACQUIRE);
    if (ring) dropped += ring->dropped;
  }
  return dropped;
}

/* ---- text ---- */

static char *text(char *at, const char *words) {
  size_t length = strlen(words);
  memcpy(at, words, length);
  return at + length;
}

static char *number(char *at, uint64_t value, unsigned digits) {
  char reversed[24];
  unsigned length = 0;
  do reversed[length++] = (char)('0' + value % 10);
  while ((value /= 10) || length < digits);
  while (length) *at++ = reversed[--length];
  return at;
}

static char *microseconds(char *at, uint64_t ns) {
  at = number(at, ns / 1000, 1);
  *at++ = '.';
  return number(at, ns % 1000, 3);
}

/* A name may come from the program, by way of cuGetProcAddress. */
static char *safe(char *at, const char *name) {
  for (unsigned i = 0; name[i] && i < 128; i++) {
    char c = name[i];
    bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || strchr("_-.+ ", c);
    *at++ = plain ? c : '_';
  }
  return at;
}

static char *event_text(char *at, const struct event *event, uint32_t tid) {
  at = safe(text(at, ",\n{\"name\":\""), entries[event->index].name);
  at = microseconds(text(at, "\",\"ph\":\"X\",\"ts\":"), event->began_ns);
  at = microseconds(text(at, ",\"dur\":"), event->ns);
  at = number(text(at, ",\"pid\":"), process->pid, 1);
  at = number(text(at, ",\"tid\":"), tid, 1);
  if (event->bytes || event->error) {
    at = text(at, ",\"args\":{");
    if (event->bytes) at = number(text(at, "\"bytes\":"), event->bytes, 1);
    if (event->error) at = number(text(at, event->bytes ? ",\"error\":" : "\"error\":"), event->error, 1);
    *at++ = '}';
  }
  *at++ = '}';
  return at;
}

static char *head_text(char *at) {
  char name[17] = "";
  kernel(SYS_prctl, 16 /* PR_GET_NAME */, (long)name, 0, 0, 0, 0);
  long fd = kernel(SYS_open, (long)"/proc/self/comm", O_RDONLY | O_CLOEXEC, 0, 0, 0, 0); /* the process's, not this thread's */
  if (fd >= 0) {
    long length = kernel(SYS_read, fd, (long)name, 16, 0, 0, 0);
    kernel(SYS_close, fd, 0, 0, 0, 0, 0);
    name[length > 0 && name[length - 1] == '\n' ? length - 1 : length > 0 ? length : 0] = 0;
  }
  at = text(at, "{\"displayTimeUnit\":\"ns\",\"traceEvents\":[\n{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":");
  at = number(at, process->pid, 1);
  at = number(text(at, ",\"tid\":"), process->pid, 1);
  at = safe(text(at, ",\"args\":{\"name\":\""), name);
  return text(at, "\"}}");
}

/* The end of the document, with the sums over all threads. Its length is bounded by the number of entry points. */
#define END_BYTES (64 * 1024)

static char *end_text(char *at) {
  char *limit = at + END_BYTES - EVENT_BYTES;
  at = number(text(at, "\n],\"otherData\":{\"dropped\":"), trace_dropped(), 1);
  at = text(at, ",\"calls\":{");
  bool first = true;
  trace.calls = 0;
  for (uint32_t i = 0; i < ENTRY_COUNT && at < limit; i++) {
    struct total sum = {0};
    for (struct shard *shard = __atomic_load_n(&process->shards, __ATOMIC_ACQUIRE); shard; shard = shard->next) {
      if (!__atomic_load_n(&shard->ring, __ATOMIC_ACQUIRE)) continue;
      const struct total *one = &shard->totals[i];
      sum.calls += one->calls;
      sum.ns += one->ns;
      sum.bytes += one->bytes;
      sum.errors += one->errors;
    }
    if (sum.calls == 0) continue;
    trace.calls += sum.calls;
    at = safe(text(at, first ? "\"" : ",\""), entries[i].name);
    at = number(text(at, "\":{\"calls\":"), sum.calls, 1);
    at = number(text(at, ",\"bytes\":"), sum.bytes, 1);
    at = number(text(at, ",\"ns\":"), sum.ns, 1);
    at = number(text(at, ",\"errors\":"), sum.errors, 1);
    *at++ = '}';
    first = false;
  }
  return text(at, "}}}\n");
}

/* ---- the file ---- */

static void name_files(const char *directory) {
  char *at = number(text(text(trace.path, directory), "/gpu-"), process->pid, 1);
  at = number(text(at, "-"), now_ns() / 1000000, 1);
  *text(at, ".json") = 0;
  size_t stem = (size_t)(at - trace.path);
  memcpy(trace.old_path, trace.path, stem);
  *text(trace.old_path + stem, ".old.json") = 0;
  trace.position = trace.end = 0;
}

static const char *directory_wanted(void) {
  const char *directory = getenv("CEDANA_GPU_TRACE");
  return directory && *directory == '/' && strlen(directory) < PATH_BYTES - 64 ? directory : NULL;
}

/* The file as we left it, or a new one: a restore may have put us where there is none, or one that has gone on without us. */
static long open_file(void) {
  if (trace.end > 0) {
    long fd = kernel(SYS_open, (long)trace.path, O_WRONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0, 0, 0, 0);
    if (fd >= 0) {
      if (kernel(SYS_lseek, fd, 0, SEEK_END, 0, 0, 0) == (long)trace.end) return fd;
      kernel(SYS_close, fd, 0, 0, 0, 0, 0);
    }
    const char *directory = directory_wanted();
    if (!directory) return -ENOENT;
    name_files(directory);
  }
  return kernel(SYS_open, (long)trace.path, O_WRONLY | O_CLOEXEC | O_NOFOLLOW | O_CREAT | O_EXCL, 0600, 0, 0, 0);
}

static bool write_all(long fd, const char *from, size_t length, uint64_t at) {
  while (length) {
    long n = kernel(SYS_pwrite64, fd, (long)from, (long)length, (long)at, 0, 0);
    if (n == -EINTR) continue;
    if (n <= 0) return false;
    from += n, at += (uint64_t)n, length -= (size_t)n;
  }
  return true;
}

/* Writes what is in the buffer, and the end of the document behind it. */
static void write_out(size_t events, uint64_t count) {
  long fd = open_file();
  if (fd < 0) {
    trace.lost += count;
    return;
  }
  char *start = trace.buffer, *at = start + events;
  if (trace.position == 0) { /* a new file: its head goes first */
    char head[256];
    size_t length = (size_t)(head_text(head) - head);
    memmove(start + length, start, events);
    memcpy(start, head, length);
    events += length;
    at = start + events;
  }
  at = end_text(at);
  size_t length = (size_t)(at - start);
  if (write_all(fd, start, length, trace.position)) {
    trace.position += events;
    trace.end = trace.position + (length - events);
    kernel(SYS_ftruncate, fd, (long)trace.end, 0, 0, 0, 0);
  } else { /* a full disk: what was there stays a document, as far as that can be had */
    trace.lost += count;
    kernel(SYS_ftruncate, fd, (long)trace.position, 0, 0, 0, 0);
    size_t tail = (size_t)(end_text(start) - start);
    trace.end = write_all(fd, start, tail, trace.position) ? trace.position + tail : trace.position;
  }
  kernel(SYS_close, fd, 0, 0, 0, 0, 0);
  if (trace.position > trace.limit) {
    kernel(SYS_rename, (long)trace.path, (long)trace.old_path, 0, 0, 0, 0);
    trace.position = trace.end = 0;
  }
}

static void drain(void) {
  char *const limit = trace.buffer + BUFFER_BYTES - END_BYTES - EVENT_BYTES;
  char *at = trace.buffer;
  uint64_t count = 0;
  for (struct shard *shard = __atomic_load_n(&process->shards, __ATOMIC_ACQUIRE); shard; shard = shard->next) {
    struct ring *ring = __atomic_load_n(&shard->ring, __ATOMIC_ACQUIRE);
    if (!ring) continue;
    uint32_t tail = ring->tail, head = __atomic_load_n(&ring->head, __ATOMIC_ACQUIRE);
    for (; tail != head; tail++) {
      at = event_text(at, &ring->events[tail % RING_EVENTS], shard->tid);
      count++;
      if (at < limit) continue;
      __atomic_store_n(&ring->tail, tail + 1, __ATOMIC_RELEASE);
      write_out((size_t)(at - trace.buffer), count);
      at = trace.buffer;
      count = 0;
    }
    __atomic_store_n(&ring->tail, tail, __ATOMIC_RELEASE);
  }
  if (at > trace.buffer) write_out((size_t)(at - trace.buffer), count);
}

/* By the control thread, and once more by the thread that ends the process. */
void trace_drain(void) {
  lock(&process->lock_drain);
  drain();
  unlock(&process->lock_drain);
}

void trace_begin(void) {
  const char *directory = directory_wanted(), *bytes = getenv("CEDANA_GPU_TRACE_BYTES");
  if (!directory) return;
  uint64_t limit = 0;
  for (; bytes && *bytes >= '0' && *bytes <= '9' && limit < UINT64_MAX / 100; bytes++) limit = limit * 10 + (uint64_t)(*bytes - '0');
  if (limit == 0) limit = DEFAULT_BYTES;
  if (limit < LEAST_BYTES) limit = LEAST_BYTES;
  memset(&trace, 0, sizeof trace);
  trace.limit = limit / 2 - BUFFER_BYTES;
  trace.buffer = map_memory(BUFFER_BYTES + 4096);
  if (!trace.buffer) return;
  name_files(directory);
  process->tracing = 1;
}

__attribute__((destructor)) static void trace_end(void) {
  struct process *p = process;
  if (p && p->alive && p->tracing && p->pid == own_pid()) trace_drain();
}
