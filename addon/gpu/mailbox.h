/*
 * The memory that the library and whoever controls it share; PROTOCOL.md says how it is used.
 *
 * A sealed memfd of MAILBOX_BYTES, mapped by the library alone, without a descriptor; its name in /proc/PID/maps is how it is found.
 * Little-endian, as the only architecture that we build for. Written by a process in a container: whoever reads it takes a copy
 * and believes no number in it.
 */
#ifndef CEDANA_GPU_MAILBOX_H
#define CEDANA_GPU_MAILBOX_H

#include <stdint.h>

#define MAILBOX_NAME "cedana-gpu"
#define MAILBOX_BYTES 16384
#define MAILBOX_MAGIC 0x3155504741444543ull /* "CEDAGPU1" */
#define MAILBOX_VERSION 1

/* Numbers from 16 on are kept for saving and reloading memory without the driver's help. */
enum mailbox_command { MAILBOX_REPORT = 1, MAILBOX_QUIESCE = 2, MAILBOX_RESUME = 3 };

enum mailbox_state { MAILBOX_RUNNING = 0, MAILBOX_QUIESCING = 1, MAILBOX_QUIESCED = 2 };

enum mailbox_status {
  MAILBOX_OK = 0,
  MAILBOX_UNKNOWN_COMMAND = 1,
  MAILBOX_CALLS_IN_FLIGHT = 2, /* at the deadline a call had not returned: `call` names it */
  MAILBOX_WORK_IN_FLIGHT = 3,  /* at the deadline the devices were still at work */
  MAILBOX_DRIVER_ERROR = 4,    /* waiting for a context failed: `detail` is the driver's error */
  MAILBOX_NO_THREAD = 5,       /* the thread that waits could not be started: `detail` is errno */
};

/* Where memory lies and how it was asked for. The first five are a device's, the rest the host's. */
enum memory_kind {
  MEMORY_DEVICE,  /* cuMemAlloc, cuMemAllocPitch */
  MEMORY_POOL,    /* cuMemAllocAsync, cuMemAllocFromPoolAsync */
  MEMORY_MANAGED, /* cuMemAllocManaged */
  MEMORY_VIRTUAL, /* cuMemCreate */
  MEMORY_ARRAY,   /* cuArrayCreate, cuArray3DCreate, cuMipmappedArrayCreate */
  MEMORY_DEVICE_KINDS,
  MEMORY_PINNED = MEMORY_DEVICE_KINDS, /* cuMemHostAlloc, cuMemAllocHost, cuMemCreate on the host */
  MEMORY_REGISTERED,                   /* cuMemHostRegister */
  MEMORY_KINDS
};

enum object_kind { OBJECT_CONTEXT, OBJECT_STREAM, OBJECT_EVENT, OBJECT_MODULE, OBJECT_GRAPH, OBJECT_KINDS };

/* What the driver's checkpoint is known not to take, or not with every driver. Counted while it exists, the last three for ever. */
enum blocker_kind {
  BLOCKER_MANAGED,
  BLOCKER_IPC_MEMORY,
  BLOCKER_IPC_EVENT,
  BLOCKER_EXTERNAL_MEMORY,
  BLOCKER_EXTERNAL_SEMAPHORE,
  BLOCKER_GRAPHICS,
  BLOCKER_MULTICAST,
  BLOCKER_EXPORTED_MEMORY, /* cuIpcGetMemHandle, cuMemExportToShareableHandle, cuMemPoolExport... */
  BLOCKER_EXPORTED_EVENT,
  BLOCKER_IMPORTED_POOL,
  BLOCKER_KINDS
};

#define MAILBOX_DEVICES 32
#define MAILBOX_CALL_BYTES 64

struct mailbox_amount {
  uint64_t count, bytes;
};

struct mailbox_device {
  uint8_t uuid[16];
  struct mailbox_amount memory[MEMORY_DEVICE_KINDS];
};

struct mailbox {
  /*   0 */ uint64_t magic;
  /*   8 */ uint32_t version;
  /*  12 */ uint32_t pid; /* as the process itself has it: another number is a mailbox that a fork left behind */
  /*  16 */ uint32_t request; /* number of the last request: written last; a futex */
  /*  20 */ uint32_t command;
  /*  24 */ uint32_t deadline_ms;
  /*  28 */ uint32_t lease_ms; /* a quiesced process goes on by itself after so long; 0: never */
  /*  32 */ uint32_t answered; /* number of the last request that was answered: written last; a futex */
  /*  36 */ uint32_t status;
  /*  40 */ uint32_t state;
  /*  44 */ uint32_t detail;
  /*  48 */ char call[MAILBOX_CALL_BYTES];
  /* 112 */ uint32_t device_count;
  /* 116 */ uint32_t driver_version; /* as cuDriverGetVersion has it: 13000; 0 before cuInit */
  /* 120 */ uint32_t calls_in_flight;
  /* 124 */ uint32_t untracked; /* things that found no place in the tables: then the amounts are too small */
  /* 128 */ uint64_t trace_dropped; /* events of the trace that found no place */
  /* 136 */ struct mailbox_amount host[MEMORY_KINDS - MEMORY_DEVICE_KINDS];
  /* 168 */ uint64_t objects[OBJECT_KINDS];
  /* 208 */ uint64_t blockers[BLOCKER_KINDS];
  /* 288 */ struct mailbox_device devices[MAILBOX_DEVICES];
};

_Static_assert(sizeof(struct mailbox) <= MAILBOX_BYTES, "the mailbox has its size");

#endif
