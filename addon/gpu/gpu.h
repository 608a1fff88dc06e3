/*
 * The interception library: libcuda.so.1 in front of the driver's libcuda.so.1.
 *
 * The contract. It is preloaded (LD_PRELOAD) into every program of a container, and does nothing at all before the first call of a
 * CUDA function: no constructor, no thread, no file. Its SONAME is libcuda.so.1, so that the dynamic linker takes it for that
 * library whenever a program links with it or opens it by name (frame.S, driver.c). Every public name is exported; each goes
 * through one frame, which (gate.c) counts the thread in, waits while the gate is closed, notes what the call makes or frees (track.c)
 * and how long it took (trace.c), and calls the driver with the caller's arguments untouched. A thread of ours, started with the
 * first call, does what is asked of it through shared memory (control.c).
 *
 * It needs no library by name, and of the libc that is there only what every glibc since 2.17 and musl have, without versions of symbols: so
 * one binary works in every container. It opens no descriptor that stays, so a program may close all it has. It writes nothing to stderr.
 *
 * Forks: everything that must not be believed in a child lies on one page that the kernel wipes there (MADV_WIPEONFORK); a child that
 * calls the driver begins anew. No lock of ours is ever held over a call of the driver or of the dynamic linker.
 */
#ifndef CEDANA_GPU_H
#define CEDANA_GPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "mailbox.h"
#include "names.h" /* made from names.list: NAME_COUNT, NAMES(X) */

#define EXPORT __attribute__((visibility("default")))
#define unlikely(x) __builtin_expect(!!(x), 0)
#define countof(array) (sizeof(array) / sizeof *(array))

/* Entry points that the driver gave a program by cuGetProcAddress and that the list hasn't: newer names, or other addresses. */
#define SPARE_COUNT 512
#define ENTRY_COUNT (NAME_COUNT + SPARE_COUNT)

/* Results of the driver that we give ourselves. */
enum { CUDA_SUCCESS = 0, CUDA_ERROR_NO_DEVICE = 100, CUDA_ERROR_NOT_FOUND = 500, CUDA_ERROR_NOT_SUPPORTED = 801 };

/* A thing that the program has made by the driver. */
struct thing {
  uint64_t handle; /* address or handle; 0: no thing */
  uint64_t context;
  uint64_t bytes;
  uint8_t class; /* enum thing_class */
  uint8_t kind;  /* within the class */
  int16_t device;
  uint32_t reserved; /* a context: CONTEXT_CREATED; memory of cuMemCreate: 1 while it is mapped, and counted there */
};

/* One call under way. frame.S fills in the first part and knows its offsets. */
struct call {
  /*   0 */ uint64_t arg[6];
  /*  48 */ double real[2];
  /*  64 */ uint64_t *stack; /* the seventh argument and what follows */
  /*  72 */ uint32_t index;
  /*  76 */ uint32_t unused;
  /*  80 */ int64_t result;
  /*  88 */ struct shard *shard;
  /*  96 */ uint64_t began_ns; /* 0: not traced */
  /* 104 */ struct thing taken; /* removed before a call that frees it: put back when that fails */
};

#define CALL_BYTES 144
_Static_assert(sizeof(struct call) <= CALL_BYTES, "frame.S reserves CALL_BYTES");
_Static_assert(offsetof(struct call, index) == 72 && offsetof(struct call, result) == 80, "frame.S knows these offsets");

struct rule;

struct entry {
  void *target; /* the driver's function; 0: not looked for yet */
  const struct rule *rule;
  const char *name;
  uint32_t ungated;
  uint32_t missing; /* the driver hasn't this one */
};

extern struct entry entries[ENTRY_COUNT];

/* What a thread counts. Never freed: a thread that has ended leaves its own to the next one. */
struct total {
  uint64_t calls, ns, bytes, errors;
};

struct shard {
  uint32_t active; /* 1 + index of the call that the thread is in; 0: in none */
  uint32_t depth;  /* calls within calls aren't gated: the outer one would wait for ever */
  uint32_t generation;
  uint32_t tid;
  struct shard *next;
  struct ring *ring;
  struct total *totals; /* by index; only with tracing */
  uint64_t context;     /* that the thread made current last */
  bool knows_context;   /* the thread's context has been looked at */
} __attribute__((aligned(128)));

/* What a forked child must not believe: wiped there by the kernel. */
struct process {
  uint32_t alive;
  uint32_t gate; /* 1: calls wait; a futex */
  uint32_t tracing;
  uint32_t beginning;
  uint32_t lock_keep, lock_things, lock_spare, lock_drain;
  uint32_t pid;
  struct mailbox *mailbox;
  struct shard *shards;
};

/* gate.c */
extern struct process *process;
extern _Thread_local struct shard *own_shard;
struct shard *gate_thread(void); /* the calling thread's; begins the process where that is to be done */
void gate_enter(struct shard *shard, uint32_t index);
void gate_close(void);
void gate_open(void);
unsigned gate_in_flight(const char **name);
void *cedana_gpu_enter(struct call *call);
void cedana_gpu_leave(struct call *call);

/* driver.c */
void *driver_entry(uint32_t index); /* the driver's function, or 0 */
void *driver_symbol(const char *name);
bool driver_present(void);
void *export_of(uint32_t index);
bool same_base(const char *name, const char *base); /* cuMemAlloc_v2 and cuMemAlloc_ptsz are cuMemAlloc */

/* track.c */
const struct rule *rule_of(const char *name, int version);
bool rule_is_ungated(const struct rule *rule);
void rules_assign(void);
void track_before(const struct rule *rule, struct call *call);
void track_after(const struct rule *rule, struct call *call);
uint64_t bytes_moved(const struct rule *rule, const struct call *call);
void track_thread(struct shard *shard);
void track_reset(void);
void track_report(struct mailbox *out);
unsigned track_contexts(uint64_t *out, unsigned max);

/* trace.c */
void trace_begin(void);
void trace_call(struct call *call);
void trace_drain(void);
uint64_t trace_dropped(void);

/* control.c */
void control_begin(void);
void control_wake(void);

/* support.c */
void *library_open(const char *path);
void *library_symbol(void *handle, const char *name);
void library_close(void *handle);

/* support.c: no errno, nothing of libc where the kernel will do */
long kernel(long number, long a, long b, long c, long d, long e, long f);
void *keep(size_t bytes); /* zeroed memory that is never given back; 0 when there is none */
void keep_reset(void);
void *map_memory(size_t bytes);
void lock(uint32_t *word);
void unlock(uint32_t *word);
void futex_wait(uint32_t *word, uint32_t value, uint64_t timeout_ns, bool shared);
void futex_wake(uint32_t *word, bool shared);
uint64_t now_ns(void);
void sleep_ns(uint64_t ns);
uint32_t own_pid(void);
uint32_t own_tid(void);
int start_thread(void *(*body)(void *), void *argument); /* with all signals blocked; errno, or 0 */

#endif
