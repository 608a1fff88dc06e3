/* Inside the stand-in driver (test code; see RULES.md). */
#pragma once
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>
#include "../cuda-abi.h"

#define EXPORT __attribute__((visibility("default")))
#define MAX_DEVICES 8

/* ---- the gate (gate.c): every entry point but the checkpoint calls passes it; a lock closes it ---- */
void gate_enter(void);
void gate_leave(void);
void gate_close(void);
void gate_open(void);
int gate_inside(void);

/* An entry point. Its body is do_NAME, which may call other bodies but no entry point: those would wait at the gate for themselves. */
#define API(name, params, args)   \
  static CUresult do_##name params; \
  EXPORT CUresult name params {   \
    gate_enter();                 \
    CUresult result_ = do_##name args; \
    gate_leave();                 \
    return result_;               \
  }                               \
  static CUresult do_##name params

/* One that takes a stream, implicitly or not: also with the thread's own default stream, under the name with the suffix. */
extern __thread bool per_thread_default;
#define API_STREAM(name, suffix, params, args) \
  static CUresult do_##name params;            \
  EXPORT CUresult name params {                \
    gate_enter();                              \
    per_thread_default = false;                \
    CUresult result_ = do_##name args;         \
    gate_leave();                              \
    return result_;                            \
  }                                            \
  EXPORT CUresult name##suffix params;         \
  EXPORT CUresult name##suffix params {        \
    gate_enter();                              \
    per_thread_default = true;                 \
    CUresult result_ = do_##name args;         \
    per_thread_default = false;                \
    gate_leave();                              \
    return result_;                            \
  }                                            \
  static CUresult do_##name params

#define TRY(call)                             \
  do {                                        \
    CUresult try_ = (call);                   \
    if (try_ != CUDA_SUCCESS) return try_;    \
  } while (0)

/* ---- devices (device.c) ---- */
struct device {
  CUuuid uuid;
  char chip[64];
  uint64_t memory;
};
struct devices { int count; struct device at[MAX_DEVICES]; };
/* What is "plugged in" now, from the GPU directory. */
struct devices devices_now(void);
/* What this process saw at cuInit, and since a restore where each of them is. */
extern struct devices devices;
extern bool initialised;
const char *gpu_directory(void);
uint64_t device_used(const struct device *);
/* Holds a GPU by a descriptor that CRIU cannot dump, or lets it go. */
void device_hold(void);
void device_release(void);

/* ---- contexts (context.c) ---- */
struct CUctx_st {
  int device;
  unsigned flags;
  int retained;
  struct CUstream_st *null_stream;
  struct CUctx_st *next;
};
CUresult current_context(CUcontext *);

/* ---- memory (memory.c) ---- */
enum kind { KIND_DEVICE, KIND_MANAGED, KIND_HOST, KIND_PHYSICAL, KIND_RESERVED };
struct allocation {
  uint64_t address; /* 0: physical memory that isn't mapped */
  size_t size;      /* as asked for */
  size_t mapped;    /* whole pages */
  enum kind kind;
  int device;
  CUcontext context;
  bool shared; /* an IPC handle was given out */
  CUmemGenericAllocationHandle handle;
  char file[512]; /* in the GPU directory; empty for host memory */
  void *saved;    /* its bytes while the process is checkpointed */
  struct allocation *next;
};
CUresult memory_allocate(CUcontext, size_t, enum kind, CUdeviceptr *);
CUresult memory_free(CUdeviceptr);
/* Whether [address, +size) lies in memory of the device (or host memory that is registered). */
bool memory_contains(uint64_t address, size_t size, enum kind *kind);
/* Called by the restore thread alone, with every stream idle and the gate closed. */
CUresult memory_save(int fail_at);
CUresult memory_restore(const int *to_device, const struct devices *plugged);
bool memory_fits(const int *to_device, const struct devices *plugged);
const char *memory_blocker(void);
void memory_undo_save(void);

/* ---- streams (stream.c) ---- */
typedef void (*task_fn)(void *);
CUresult stream_resolve(CUstream given, struct CUstream_st **found);
/* Queues `run(argument)`; the stream frees the argument (malloc). */
CUresult stream_push(struct CUstream_st *, task_fn run, void *argument);
CUresult stream_drain(struct CUstream_st *);
CUresult streams_drain(CUcontext); /* NULL: all */
bool streams_idle(void);
struct CUstream_st *stream_new(CUcontext, unsigned flags);

/* ---- fault switches (faults.c) ---- */
/* Value of a switch for this process, e.g. fault("lock"); false when it isn't set. */
bool fault(const char *name, char *value, size_t size);
int driver_version(void);

/* ---- control (checkpoint.c) ---- */
CUresult control_start(void); /* mailbox and restore thread, at cuInit */

void *table_find(const char *name, int version, bool per_thread);
