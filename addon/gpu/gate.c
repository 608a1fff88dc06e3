/*
 * The gate, and the way of each call through it.
 *
 * A thread says that it is in a call (its shard's `active`), then looks at the gate; who closes the gate does it in the other
 * order. Both by sequentially consistent operations, so that one sees the other: that exchange is the fast path's whole cost. No
 * memory that two threads write, no lock.
 */
#include "gpu.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>

struct process *process;
/* Counts the forks on the way to this process, so that a shard of the parent's is told from one of ours. */
static uint32_t generation;
_Thread_local struct shard *own_shard __attribute__((tls_model("initial-exec")));

struct entry entries[ENTRY_COUNT] = {
#define ENTRY(function, at) [at] = {.name = #function},
    NAMES(ENTRY)
#undef ENTRY
};

static struct process *process_page(void) {
  struct process *known = __atomic_load_n(&process, __ATOMIC_ACQUIRE);
  if (known) return known;
  struct process *page = map_memory(4096);
  if (!page) return NULL;
  kernel(SYS_madvise, (long)page, 4096, MADV_WIPEONFORK, 0, 0, 0); /* since Linux 4.14: older than any that CRIU works on */
  if (__atomic_compare_exchange_n(&process, &known, page, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return page;
  kernel(SYS_munmap, (long)page, 4096, 0, 0, 0, 0);
  return known;
}

/* The first call in a process, or in a child of a fork. Without memory for a page the program fares no better than we. */
static struct process *process_begin(void) {
  struct process *page = process_page();
  if (!page) __builtin_trap();
  uint32_t nobody = 0;
  if (__atomic_compare_exchange_n(&page->beginning, &nobody, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
    __atomic_add_fetch(&generation, 1, __ATOMIC_RELEASE);
    page->pid = own_pid();
    keep_reset();
    rules_assign();
    track_reset();
    trace_begin();
    if (driver_present()) control_begin();
    __atomic_store_n(&page->alive, 1, __ATOMIC_RELEASE);
    futex_wake(&page->alive, false);
  }
  while (!__atomic_load_n(&page->alive, __ATOMIC_ACQUIRE)) futex_wait(&page->alive, 0, 0, false);
  return page;
}

static bool thread_ended(uint32_t tid) {
  return kernel(SYS_tgkill, process->pid, tid, 0, 0, 0, 0) == -ESRCH;
}

/* A shard for the calling thread: its own from before, one of a thread that has ended, or a new one. */
static struct shard *shard_claim(void) {
  uint32_t tid = own_tid();
  struct shard *shard = __atomic_load_n(&process->shards, __ATOMIC_ACQUIRE);
  for (; shard; shard = shard->next) {
    uint32_t owner = __atomic_load_n(&shard->tid, __ATOMIC_RELAXED);
    if (owner != tid && !thread_ended(owner)) continue;
    if (__atomic_compare_exchange_n(&shard->tid, &owner, tid, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) break;
  }
  if (shard) {
    __atomic_store_n(&shard->active, 0, __ATOMIC_RELEASE);
    shard->depth = 0;
    shard->context = 0;
    shard->knows_context = false;
  } else {
    shard = keep(sizeof *shard);
    if (!shard) __builtin_trap();
    shard->tid = tid;
    shard->generation = __atomic_load_n(&generation, __ATOMIC_ACQUIRE);
    shard->next = __atomic_load_n(&process->shards, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(&process->shards, &shard->next, shard, true, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) {}
  }
  own_shard = shard;
  return shard;
}

struct shard *gate_thread(void) {
  struct process *p = __atomic_load_n(&process, __ATOMIC_ACQUIRE);
  if (unlikely(!p || !__atomic_load_n(&p->alive, __ATOMIC_ACQUIRE))) {
    driver_present(); /* the dynamic linker has locks: before anybody waits for us */
    process_begin();
  }
  struct shard *shard = own_shard;
  if (unlikely(!shard || shard->generation != generation)) shard = shard_claim();
  return shard;
}

void gate_enter(struct shard *shard, uint32_t index) {
  for (;;) {
    __atomic_exchange_n(&shard->active, index + 1, __ATOMIC_SEQ_CST);
    if (!unlikely(__atomic_load_n(&process->gate, __ATOMIC_SEQ_CST))) return;
    __atomic_store_n(&shard->active, 0, __ATOMIC_RELEASE);
    futex_wait(&process->gate, 1, 0, false);
  }
}

void gate_close(void) {
  __atomic_store_n(&process->gate, 1, __ATOMIC_SEQ_CST);
}

void gate_open(void) {
  __atomic_store_n(&process->gate, 0, __ATOMIC_SEQ_CST);
  futex_wake(&process->gate, false);
}

/* How many calls are under way, and the name of one. A thread that ended within a call (cancelled, or exited) is in none. */
unsigned gate_in_flight(const char **name) {
  unsigned count = 0;
  for (struct shard *shard = __atomic_load_n(&process->shards, __ATOMIC_ACQUIRE); shard; shard = shard->next) {
    uint32_t active = __atomic_load_n(&shard->active, __ATOMIC_SEQ_CST);
    if (active == 0 || thread_ended(__atomic_load_n(&shard->tid, __ATOMIC_RELAXED))) continue;
    count++;
    if (name && active <= ENTRY_COUNT) *name = entries[active - 1].name;
  }
  return count;
}

/* Before a call. Returns what to call, or 0 with the result that the caller gets. */
void *cedana_gpu_enter(struct call *call) {
  struct entry *entry = &entries[call->index];
  struct shard *shard = gate_thread();
  void *target = __atomic_load_n(&entry->target, __ATOMIC_ACQUIRE);
  if (unlikely(!target)) {
    target = driver_entry(call->index);
    if (!target) {
      call->result = driver_present() ? CUDA_ERROR_NOT_SUPPORTED : CUDA_ERROR_NO_DEVICE;
      return NULL;
    }
  }
  call->shard = shard;
  if (shard->depth++ == 0 && !entry->ungated) gate_enter(shard, call->index);
  if (entry->rule) track_before(entry->rule, call);
  call->began_ns = unlikely(process->tracing) ? now_ns() : 0;
  return target;
}

void cedana_gpu_leave(struct call *call) {
  struct shard *shard = call->shard;
  const struct rule *rule = entries[call->index].rule;
  call->result = (int32_t)call->result;
  if (unlikely(call->began_ns)) trace_call(call);
  if (rule) track_after(rule, call);
  if (--shard->depth == 0) __atomic_store_n(&shard->active, 0, __ATOMIC_RELEASE);
}
