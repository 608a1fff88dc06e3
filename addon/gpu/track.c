/*
 * What the program has made by the driver: memory by device and kind, contexts, streams, events, modules, graphs, and what a
 * checkpoint won't take. One table of rules says which argument of which function means what; the frame has kept them.
 *
 * The things lie in one hash table behind a lock: making and freeing them takes the driver microseconds. Calls that do neither
 * (launches, copies, queries) have no rule, or one that only says how many bytes they move, and take no lock.
 *
 * A thing is removed before the call that frees it, because the driver may give its address to another thread before that call
 * returns to us; when the call fails, it is put back.
 */
#include "gpu.h"

#include <string.h>
#include <sys/syscall.h>
#include <sys/mman.h>

enum thing_class { CLASS_NONE, CLASS_MEMORY, CLASS_OBJECT, CLASS_BLOCKER };

enum action {
  ACTION_NONE,        /* only bytes, or only ungated */
  ACTION_MAKE,        /* *arg[0] is a new thing, of arg[1] bytes where it is memory */
  ACTION_MAKE_HERE,   /* arg[0] itself is it, of arg[1] bytes: host memory that gets registered */
  ACTION_MAKE_PITCH,  /* *arg[0], of *arg[1] (pitch) * arg[3] (rows) bytes */
  ACTION_MAKE_CREATED,/* *arg[0], of arg[1] bytes, where arg[2]'s properties say */
  ACTION_MAKE_ARRAY,  /* *arg[0], as arg[1]'s description says */
  ACTION_FREE,        /* arg[0] goes */
  ACTION_RELEASE,     /* arg[0] goes: made by cuMemCreate, or imported */
  ACTION_MAP,         /* arg[1] bytes of such a one (arg[3]) get the address arg[0]: they outlive its release */
  ACTION_UNMAP,       /* and lose it */
  ACTION_COUNT,       /* for ever, without a handle */
  ACTION_CONTEXT,     /* *arg[0] is a context */
  ACTION_PRIMARY,     /* *arg[0] is the primary context of device arg[1] */
  ACTION_GREEN,       /* *arg[0] is one, of the green context arg[1] */
  ACTION_USE_CONTEXT, /* arg[0] is one */
  ACTION_END_CONTEXT, /* arg[0] goes, with what was made in it */
  ACTION_END_PRIMARY, /* the primary context of device arg[0], unless others hold it */
  ACTION_INIT,        /* the devices can be asked for */
};

struct rule {
  const char *base;
  uint8_t action, class, kind;
  int8_t bytes_arg;   /* how many bytes the call moves or makes: this argument; -1: none */
  uint8_t bytes_unit; /* times this many */
  bool looks;         /* the thread's context is looked at */
  bool ungated;
  bool not_plain;     /* the name without a version is an interface of 32 bits, with other arguments */
};

#define MEMORY(name, how, what, arg) \
  {.base = name, .action = how, .class = CLASS_MEMORY, .kind = what, .bytes_arg = arg, .bytes_unit = 1, .looks = true}
#define VERSIONED_MEMORY(name, how, what, arg) \
  {.base = name, .action = how, .class = CLASS_MEMORY, .kind = what, .bytes_arg = arg, .bytes_unit = 1, .looks = true, .not_plain = true}
#define OBJECT(name, how, what) {.base = name, .action = how, .class = CLASS_OBJECT, .kind = what, .bytes_arg = -1, .looks = true}
#define BLOCKER(name, how, what) {.base = name, .action = how, .class = CLASS_BLOCKER, .kind = what, .bytes_arg = -1}
#define CONTEXT(name, how) {.base = name, .action = how, .class = CLASS_OBJECT, .kind = OBJECT_CONTEXT, .bytes_arg = -1}
#define MOVES(name, arg, unit) {.base = name, .bytes_arg = arg, .bytes_unit = unit}
#define LOOKS(name) {.base = name, .bytes_arg = -1, .looks = true}
#define UNGATED(name) {.base = name, .bytes_arg = -1, .ungated = true}

static const struct rule rules[] = {
    VERSIONED_MEMORY("cuMemAlloc", ACTION_MAKE, MEMORY_DEVICE, 1),
    VERSIONED_MEMORY("cuMemAllocPitch", ACTION_MAKE_PITCH, MEMORY_DEVICE, -1),
    MEMORY("cuMemAllocManaged", ACTION_MAKE, MEMORY_MANAGED, 1),
    MEMORY("cuMemAllocAsync", ACTION_MAKE, MEMORY_POOL, 1),
    MEMORY("cuMemAllocFromPoolAsync", ACTION_MAKE, MEMORY_POOL, 1),
    MEMORY("cuMemHostAlloc", ACTION_MAKE, MEMORY_PINNED, 1),
    VERSIONED_MEMORY("cuMemAllocHost", ACTION_MAKE, MEMORY_PINNED, 1),
    MEMORY("cuMemHostRegister", ACTION_MAKE_HERE, MEMORY_REGISTERED, 1),
    MEMORY("cuMemCreate", ACTION_MAKE_CREATED, MEMORY_VIRTUAL, 1),
    VERSIONED_MEMORY("cuArrayCreate", ACTION_MAKE_ARRAY, MEMORY_ARRAY, -1),
    VERSIONED_MEMORY("cuArray3DCreate", ACTION_MAKE_ARRAY, MEMORY_ARRAY, -1),
    MEMORY("cuMipmappedArrayCreate", ACTION_MAKE_ARRAY, MEMORY_ARRAY, -1),
    VERSIONED_MEMORY("cuMemFree", ACTION_FREE, 0, -1),
    MEMORY("cuMemFreeAsync", ACTION_FREE, 0, -1),
    MEMORY("cuMemFreeHost", ACTION_FREE, 0, -1),
    MEMORY("cuMemHostUnregister", ACTION_FREE, 0, -1),
    MEMORY("cuMemRelease", ACTION_RELEASE, 0, -1),
    MEMORY("cuMemMap", ACTION_MAP, MEMORY_VIRTUAL, -1),
    MEMORY("cuMemUnmap", ACTION_UNMAP, MEMORY_VIRTUAL, -1),
    MEMORY("cuArrayDestroy", ACTION_FREE, 0, -1),
    MEMORY("cuMipmappedArrayDestroy", ACTION_FREE, 0, -1),

    OBJECT("cuStreamCreate", ACTION_MAKE, OBJECT_STREAM),
    OBJECT("cuStreamCreateWithPriority", ACTION_MAKE, OBJECT_STREAM),
    OBJECT("cuGreenCtxStreamCreate", ACTION_MAKE, OBJECT_STREAM),
    OBJECT("cuStreamDestroy", ACTION_FREE, OBJECT_STREAM),
    OBJECT("cuEventCreate", ACTION_MAKE, OBJECT_EVENT),
    OBJECT("cuEventDestroy", ACTION_FREE, OBJECT_EVENT),
    OBJECT("cuModuleLoad", ACTION_MAKE, OBJECT_MODULE),
    OBJECT("cuModuleLoadData", ACTION_MAKE, OBJECT_MODULE),
    OBJECT("cuModuleLoadDataEx", ACTION_MAKE, OBJECT_MODULE),
    OBJECT("cuModuleLoadFatBinary", ACTION_MAKE, OBJECT_MODULE),
    OBJECT("cuLibraryLoadData", ACTION_MAKE, OBJECT_MODULE),
    OBJECT("cuLibraryLoadFromFile", ACTION_MAKE, OBJECT_MODULE),
    OBJECT("cuModuleUnload", ACTION_FREE, OBJECT_MODULE),
    OBJECT("cuLibraryUnload", ACTION_FREE, OBJECT_MODULE),
    OBJECT("cuGraphCreate", ACTION_MAKE, OBJECT_GRAPH),
    OBJECT("cuGraphClone", ACTION_MAKE, OBJECT_GRAPH),
    OBJECT("cuGraphInstantiate", ACTION_MAKE, OBJECT_GRAPH),
    OBJECT("cuGraphInstantiateWithFlags", ACTION_MAKE, OBJECT_GRAPH),
    OBJECT("cuGraphInstantiateWithParams", ACTION_MAKE, OBJECT_GRAPH),
    OBJECT("cuGraphDestroy", ACTION_FREE, OBJECT_GRAPH),
    OBJECT("cuGraphExecDestroy", ACTION_FREE, OBJECT_GRAPH),

    CONTEXT("cuCtxCreate", ACTION_CONTEXT),
    CONTEXT("cuGLCtxCreate", ACTION_CONTEXT),
    CONTEXT("cuDevicePrimaryCtxRetain", ACTION_PRIMARY),
    CONTEXT("cuCtxFromGreenCtx", ACTION_GREEN),
    CONTEXT("cuCtxSetCurrent", ACTION_USE_CONTEXT),
    CONTEXT("cuCtxPushCurrent", ACTION_USE_CONTEXT),
    CONTEXT("cuCtxDestroy", ACTION_END_CONTEXT),
    CONTEXT("cuCtxDetach", ACTION_END_CONTEXT),
    CONTEXT("cuGreenCtxDestroy", ACTION_END_CONTEXT), /* with the context that was made of it */
    CONTEXT("cuDevicePrimaryCtxRelease", ACTION_END_PRIMARY),
    CONTEXT("cuDevicePrimaryCtxReset", ACTION_END_PRIMARY),

    BLOCKER("cuIpcOpenMemHandle", ACTION_MAKE, BLOCKER_IPC_MEMORY),
    BLOCKER("cuIpcCloseMemHandle", ACTION_FREE, BLOCKER_IPC_MEMORY),
    BLOCKER("cuIpcOpenEventHandle", ACTION_MAKE, BLOCKER_IPC_EVENT),
    BLOCKER("cuMemImportFromShareableHandle", ACTION_MAKE, BLOCKER_IPC_MEMORY),
    BLOCKER("cuImportExternalMemory", ACTION_MAKE, BLOCKER_EXTERNAL_MEMORY),
    BLOCKER("cuDestroyExternalMemory", ACTION_FREE, BLOCKER_EXTERNAL_MEMORY),
    BLOCKER("cuImportExternalSemaphore", ACTION_MAKE, BLOCKER_EXTERNAL_SEMAPHORE),
    BLOCKER("cuDestroyExternalSemaphore", ACTION_FREE, BLOCKER_EXTERNAL_SEMAPHORE),
    BLOCKER("cuGraphicsGLRegisterBuffer", ACTION_MAKE, BLOCKER_GRAPHICS),
    BLOCKER("cuGraphicsGLRegisterImage", ACTION_MAKE, BLOCKER_GRAPHICS),
    BLOCKER("cuGraphicsEGLRegisterImage", ACTION_MAKE, BLOCKER_GRAPHICS),
    BLOCKER("cuGraphicsVDPAURegisterVideoSurface", ACTION_MAKE, BLOCKER_GRAPHICS),
    BLOCKER("cuGraphicsVDPAURegisterOutputSurface", ACTION_MAKE, BLOCKER_GRAPHICS),
    BLOCKER("cuGraphicsUnregisterResource", ACTION_FREE, BLOCKER_GRAPHICS),
    BLOCKER("cuEGLStreamConsumerConnect", ACTION_MAKE, BLOCKER_GRAPHICS),
    BLOCKER("cuEGLStreamConsumerConnectWithFlags", ACTION_MAKE, BLOCKER_GRAPHICS),
    BLOCKER("cuEGLStreamProducerConnect", ACTION_MAKE, BLOCKER_GRAPHICS),
    BLOCKER("cuMulticastCreate", ACTION_MAKE, BLOCKER_MULTICAST),
    BLOCKER("cuIpcGetMemHandle", ACTION_COUNT, BLOCKER_EXPORTED_MEMORY),
    BLOCKER("cuMemExportToShareableHandle", ACTION_COUNT, BLOCKER_EXPORTED_MEMORY),
    BLOCKER("cuMemPoolExportToShareableHandle", ACTION_COUNT, BLOCKER_EXPORTED_MEMORY),
    BLOCKER("cuMemPoolExportPointer", ACTION_COUNT, BLOCKER_EXPORTED_MEMORY),
    BLOCKER("cuIpcGetEventHandle", ACTION_COUNT, BLOCKER_EXPORTED_EVENT),
    BLOCKER("cuMemPoolImportFromShareableHandle", ACTION_COUNT, BLOCKER_IMPORTED_POOL),

    MOVES("cuMemcpy", 2, 1),
    MOVES("cuMemcpyAsync", 2, 1),
    MOVES("cuMemcpyHtoD", 2, 1),
    MOVES("cuMemcpyHtoDAsync", 2, 1),
    MOVES("cuMemcpyDtoH", 2, 1),
    MOVES("cuMemcpyDtoHAsync", 2, 1),
    MOVES("cuMemcpyDtoD", 2, 1),
    MOVES("cuMemcpyDtoDAsync", 2, 1),
    MOVES("cuMemcpyDtoA", 3, 1),
    MOVES("cuMemcpyAtoD", 3, 1),
    MOVES("cuMemcpyHtoA", 3, 1),
    MOVES("cuMemcpyHtoAAsync", 3, 1),
    MOVES("cuMemcpyAtoH", 3, 1),
    MOVES("cuMemcpyAtoHAsync", 3, 1),
    MOVES("cuMemcpyPeer", 4, 1),
    MOVES("cuMemcpyPeerAsync", 4, 1),
    MOVES("cuMemsetD8", 2, 1),
    MOVES("cuMemsetD8Async", 2, 1),
    MOVES("cuMemsetD16", 2, 2),
    MOVES("cuMemsetD16Async", 2, 2),
    MOVES("cuMemsetD32", 2, 4),
    MOVES("cuMemsetD32Async", 2, 4),
    MOVES("cuMemPrefetchAsync", 1, 1),

    LOOKS("cuLaunchKernel"),
    LOOKS("cuLaunchKernelEx"),
    LOOKS("cuLaunchCooperativeKernel"),
    LOOKS("cuGraphLaunch"),
    LOOKS("cuLaunchHostFunc"),

    {.base = "cuInit", .action = ACTION_INIT, .bytes_arg = -1},

    /* What only asks, what another process is the object of, and what must be answered to a program that starts up. */
    UNGATED("cuGetErrorName"),
    UNGATED("cuGetErrorString"),
    UNGATED("cuDriverGetVersion"),
    UNGATED("cuGetProcAddress"),
    UNGATED("cuGetExportTable"),
    UNGATED("cuCheckpointProcessGetState"),
    UNGATED("cuCheckpointProcessGetRestoreThreadId"),
    UNGATED("cuCheckpointProcessLock"),
    UNGATED("cuCheckpointProcessCheckpoint"),
    UNGATED("cuCheckpointProcessRestore"),
    UNGATED("cuCheckpointProcessUnlock"),
};

static bool names_version(const char *name, const char *base) {
  return name[strlen(base)] == '_' && name[strlen(base) + 1] == 'v';
}

/* The forms of 64 bits came with 3.2. */
#define WIDE_SINCE 3020

/* For a name as the driver gives it out by cuGetProcAddress: without a version, in the form of the one that was asked for. */
const struct rule *rule_of(const char *name, int version) {
  for (size_t i = 0; i < countof(rules); i++)
    if (same_base(name, rules[i].base)) return rules[i].not_plain && version < WIDE_SINCE ? NULL : &rules[i];
  return NULL;
}

bool rule_is_ungated(const struct rule *rule) {
  return rule && rule->ungated;
}

/* For the exports. Once in the life of a library: names don't change at a fork. */
void rules_assign(void) {
  static bool done;
  if (done) return;
  for (size_t i = 0; i < countof(rules); i++)
    for (uint32_t at = 0; at < NAME_COUNT; at++) {
      const struct rule *rule = &rules[i];
      if (!same_base(entries[at].name, rule->base)) continue;
      if (rule->not_plain && !names_version(entries[at].name, rule->base)) continue;
      entries[at].rule = rule;
      entries[at].ungated = rule->ungated;
    }
  done = true;
}

/* ---- the table ---- */

static struct thing *things; /* open addressing; a power of two */
static uint64_t things_size, things_used; /* used: with the graves */
static uint32_t untracked;
static uint64_t counted[BLOCKER_KINDS];
/* Of a context, in `reserved`: the program has made it. Others are primary ones, which come and go by calls that we may not see. */
#define CONTEXT_CREATED 2
static const uint64_t grave = ~0ull; /* a handle that nobody has: something was here */

static uint8_t uuids[MAILBOX_DEVICES][16];
static uint32_t device_count, driver_version;

void track_reset(void) {
  /* After a fork: the parent's contexts are no good here. Its table stays mapped, and untouched. */
  things = NULL;
  things_size = things_used = 0;
  untracked = device_count = driver_version = 0;
  memset(counted, 0, sizeof counted);
}

static uint64_t hash(uint64_t handle, uint8_t class) {
  uint64_t h = (handle ^ (uint64_t)class << 56) * 0x9e3779b97f4a7c15ull;
  return h ^ h >> 32;
}

static struct thing *slot_of(struct thing *table, uint64_t size, uint64_t handle, uint8_t class) {
  for (uint64_t at = hash(handle, class);; at++) {
    struct thing *slot = &table[at & (size - 1)];
    if (slot->handle == 0 || (slot->handle == handle && slot->class == class)) return slot;
  }
}

static bool grow(void) {
  uint64_t live = 0;
  for (uint64_t i = 0; i < things_size; i++) live += things[i].handle != 0 && things[i].handle != grave;
  uint64_t size = 1024;
  while (size < 4 * live) size *= 2;
  struct thing *table = map_memory(size * sizeof *table);
  if (!table) return false;
  for (uint64_t i = 0; i < things_size; i++)
    if (things[i].handle != 0 && things[i].handle != grave) *slot_of(table, size, things[i].handle, things[i].class) = things[i];
  if (things) kernel(SYS_munmap, (long)things, (long)(things_size * sizeof *things), 0, 0, 0, 0);
  things = table;
  things_size = size;
  things_used = live;
  return true;
}

static void put_where(const struct thing *thing, bool replacing) {
  if (thing->handle == 0 || thing->handle == grave) return;
  lock(&process->lock_things);
  if (4 * (things_used + 1) > 3 * things_size && !grow()) untracked++;
  else {
    struct thing *slot = slot_of(things, things_size, thing->handle, thing->class);
    things_used += slot->handle == 0;
    if (slot->handle == 0 || replacing) *slot = *thing;
  }
  unlock(&process->lock_things);
}

/* A handle that is known is another thing now, or the same one again (a primary context that is retained twice). */
static void put(const struct thing *thing) {
  put_where(thing, true);
}

/* What is known of a thing stays. */
static void put_new(const struct thing *thing) {
  put_where(thing, false);
}

static struct thing take(uint64_t handle, uint8_t class) {
  struct thing taken = {0};
  lock(&process->lock_things);
  if (things_size && handle != 0 && handle != grave) {
    struct thing *slot = slot_of(things, things_size, handle, class);
    if (slot->handle) {
      taken = *slot;
      slot->handle = grave;
    }
  }
  unlock(&process->lock_things);
  return taken;
}

/* Memory that isn't the context's in which it was made. */
static bool outlives_context(uint8_t kind) {
  return kind >= MEMORY_DEVICE_KINDS || kind == MEMORY_VIRTUAL;
}

static void take_context(uint64_t context) {
  lock(&process->lock_things);
  for (uint64_t i = 0; i < things_size; i++) {
    struct thing *thing = &things[i];
    bool itself = thing->class == CLASS_OBJECT && thing->kind == OBJECT_CONTEXT && thing->handle == context;
    /* These have a handle in the context's place (map), or nothing. */
    bool outlives = thing->class == CLASS_BLOCKER || (thing->class == CLASS_MEMORY && outlives_context(thing->kind));
    bool within = thing->context == context && !outlives;
    if (thing->handle != 0 && thing->handle != grave && (itself || within)) thing->handle = grave;
  }
  unlock(&process->lock_things);
}

/* ---- what the driver says of the moment; calls past our own frame ---- */

static uint32_t index_named(const char *name) {
  for (uint32_t at = 0; at < NAME_COUNT; at++)
    if (!strcmp(entries[at].name, name)) return at;
  __builtin_trap();
}

/* Looked up by name once. */
static int driver_call(uint32_t *known, const char *name, void *a, void *b, void *c) {
  uint32_t index = __atomic_load_n(known, __ATOMIC_RELAXED);
  if (index == 0) __atomic_store_n(known, index = index_named(name) + 1, __ATOMIC_RELAXED);
  void *target = driver_entry(index - 1);
  if (!target) return CUDA_ERROR_NOT_SUPPORTED;
  int (*function)(void *, void *, void *);
  memcpy(&function, &target, sizeof function);
  return function(a, b, c);
}

#define DRIVER(name, a, b, c) \
  ({ \
    static uint32_t known; \
    driver_call(&known, name, (void *)(uintptr_t)(a), (void *)(uintptr_t)(b), (void *)(uintptr_t)(c)); \
  })

static void current(uint64_t *context, int16_t *device) {
  uint64_t handle = 0;
  int ordinal = -1;
  *context = DRIVER("cuCtxGetCurrent", &handle, 0, 0) == CUDA_SUCCESS ? handle : 0;
  *device = *context && DRIVER("cuCtxGetDevice", &ordinal, 0, 0) == CUDA_SUCCESS ? (int16_t)ordinal : -1;
}

/* A runtime library may make its contexts by private tables: what a thread works in shows at its first work. */
static void look(struct shard *shard) {
  struct thing context = {.class = CLASS_OBJECT, .kind = OBJECT_CONTEXT};
  current(&context.handle, &context.device);
  put_new(&context);
  shard->context = context.handle;
  shard->knows_context = context.handle != 0;
}

static void learn_devices(void) {
  int count = 0, version = 0;
  if (DRIVER("cuDriverGetVersion", &version, 0, 0) == CUDA_SUCCESS) driver_version = (uint32_t)version;
  if (DRIVER("cuDeviceGetCount", &count, 0, 0) != CUDA_SUCCESS) return;
  if (count > MAILBOX_DEVICES) count = MAILBOX_DEVICES;
  for (int i = 0; i < count; i++) {
    int device = i;
    if (DRIVER("cuDeviceGet", &device, i, 0) != CUDA_SUCCESS) continue;
    if (DRIVER("cuDeviceGetUuid_v2", uuids[i], device, 0) != CUDA_SUCCESS) DRIVER("cuDeviceGetUuid", uuids[i], device, 0);
  }
  __atomic_store_n(&device_count, (uint32_t)count, __ATOMIC_RELEASE);
}

/* ---- before and after ---- */

void track_before(const struct rule *rule, struct call *call) {
  call->taken.handle = 0;
  bool by_handle = rule->action == ACTION_RELEASE || rule->action == ACTION_UNMAP;
  if (rule->action == ACTION_FREE || by_handle) call->taken = take(call->arg[0], rule->class);
  if (by_handle && !call->taken.handle) call->taken = take(call->arg[0], CLASS_BLOCKER); /* imported, or a multicast object */
}

/*
 * Memory made by cuMemCreate counts once: by its addresses while it is mapped (its handle is usually released by then), else by its
 * handle. So does what was imported, which is a blocker. Returns what is mapped; none when its handle isn't known.
 */
static struct thing set_mapped(uint64_t handle, bool mapped) {
  static const uint8_t classes[] = {CLASS_MEMORY, CLASS_BLOCKER};
  struct thing found = {0};
  lock(&process->lock_things);
  for (unsigned i = 0; i < countof(classes) && things_size && handle && !found.handle; i++) {
    struct thing *slot = slot_of(things, things_size, handle, classes[i]);
    if (!slot->handle) continue;
    slot->reserved = mapped;
    found = *slot;
  }
  unlock(&process->lock_things);
  return found;
}

/* A mapping is what is mapped, at its address, and has the handle in the place of a context. */
static void map(struct call *call) {
  struct thing mapping = set_mapped(call->arg[3], true);
  if (!mapping.handle) mapping = (struct thing){.class = CLASS_MEMORY, .kind = MEMORY_VIRTUAL, .device = -1};
  mapping.handle = call->arg[0];
  mapping.bytes = call->arg[1];
  mapping.context = call->arg[3];
  mapping.reserved = 0;
  put(&mapping);
}

/* CUDA_ARRAY_DESCRIPTOR {width, height, format, channels}, CUDA_ARRAY3D_DESCRIPTOR {width, height, depth, format, channels, flags}. */
static uint64_t array_bytes(const struct rule *rule, const uint64_t *description) {
  bool flat = !strcmp(rule->base, "cuArrayCreate");
  const uint32_t *rest = (const uint32_t *)(description + (flat ? 2 : 3));
  uint64_t height = description[1] ? description[1] : 1, depth = !flat && description[2] ? description[2] : 1;
  uint64_t element = 0;
  switch (rest[0]) {
    case 0x01: case 0x08: element = 1; break; /* 8-bit integers */
    case 0x02: case 0x09: case 0x10: element = 2; break; /* 16-bit, half */
    case 0x03: case 0x0a: case 0x20: element = 4; break; /* 32-bit, float */
    default: break; /* compressed and planar formats: counted, without bytes */
  }
  return description[0] * height * depth * element * rest[1];
}

/* CUmemAllocationProp {type, handle types, {location type, id}, ...}: location type 1 is a device. */
static void place_created(struct thing *thing, const uint32_t *properties) {
  if (properties[2] == 1) thing->device = (int16_t)properties[3];
  else {
    thing->kind = MEMORY_PINNED;
    thing->device = -1;
  }
}

static void made(const struct rule *rule, struct call *call) {
  struct thing thing = {.class = rule->class, .kind = rule->kind, .device = -1};
  const uint64_t *out = (const uint64_t *)(uintptr_t)call->arg[0];
  thing.handle = rule->action == ACTION_MAKE_HERE ? call->arg[0] : out ? *out : 0;
  if (rule->class != CLASS_BLOCKER) current(&thing.context, &thing.device);
  if (rule->class == CLASS_MEMORY) thing.bytes = call->arg[1];
  const void *description = (const void *)(uintptr_t)call->arg[rule->action == ACTION_MAKE_ARRAY ? 1 : 2];
  if (rule->action == ACTION_MAKE_PITCH) thing.bytes = *(const uint64_t *)(uintptr_t)call->arg[1] * call->arg[3];
  if (rule->action == ACTION_MAKE_CREATED && description) place_created(&thing, description);
  if (rule->action == ACTION_MAKE_ARRAY && description) thing.bytes = array_bytes(rule, description);
  if (rule->class == CLASS_MEMORY && outlives_context(rule->kind)) thing.context = 0;
  put(&thing);
}

static void end_primary(int device) {
  unsigned flags = 0;
  int active = 1;
  uint64_t primary = 0;
  if (DRIVER("cuDevicePrimaryCtxGetState", device, &flags, &active) != CUDA_SUCCESS || active) return;
  lock(&process->lock_things);
  for (uint64_t i = 0; i < things_size && !primary; i++)
    if (things[i].handle != grave && things[i].class == CLASS_OBJECT && things[i].kind == OBJECT_CONTEXT &&
        things[i].device == device && things[i].reserved != CONTEXT_CREATED)
      primary = things[i].handle;
  unlock(&process->lock_things);
  if (primary) take_context(primary);
}

static void context_made(const struct rule *rule, const struct call *call) {
  const uint64_t *out = (const uint64_t *)(uintptr_t)call->arg[0];
  struct thing context = {.handle = out ? *out : 0, .class = CLASS_OBJECT, .kind = OBJECT_CONTEXT, .device = -1};
  if (rule->action == ACTION_PRIMARY) context.device = (int16_t)call->arg[1];
  else context.reserved = CONTEXT_CREATED;
  if (rule->action == ACTION_GREEN) context.context = call->arg[1];
  put(&context);
}

/* Programs do this before nearly every call: the one that the thread had before is not looked up again. */
static void context_used(struct shard *shard, uint64_t handle) {
  if (handle == shard->context) return;
  shard->context = handle;
  look(shard);
}

void track_after(const struct rule *rule, struct call *call) {
  if (call->result != CUDA_SUCCESS) {
    if (call->taken.handle) put(&call->taken);
    return;
  }
  if (rule->looks && unlikely(!call->shard->knows_context)) look(call->shard);
  switch (rule->action) {
    case ACTION_MAKE:
    case ACTION_MAKE_HERE:
    case ACTION_MAKE_PITCH:
    case ACTION_MAKE_CREATED:
    case ACTION_MAKE_ARRAY:
      made(rule, call);
      break;
    case ACTION_MAP:
      map(call);
      break;
    case ACTION_UNMAP:
      if (call->taken.handle) set_mapped(call->taken.context, false);
      break;
    case ACTION_COUNT:
      __atomic_add_fetch(&counted[rule->kind], 1, __ATOMIC_RELAXED);
      break;
    case ACTION_CONTEXT:
    case ACTION_PRIMARY:
    case ACTION_GREEN:
      context_made(rule, call);
      break;
    case ACTION_USE_CONTEXT:
      context_used(call->shard, call->arg[0]);
      break;
    case ACTION_END_CONTEXT:
      take_context(call->arg[0]);
      call->shard->knows_context = false;
      break;
    case ACTION_END_PRIMARY:
      end_primary((int)call->arg[0]);
      call->shard->knows_context = false;
      break;
    case ACTION_INIT:
      learn_devices();
      break;
    default:
      break;
  }
}

uint64_t bytes_moved(const struct rule *rule, const struct call *call) {
  return rule && rule->bytes_arg >= 0 ? call->arg[rule->bytes_arg] * rule->bytes_unit : 0;
}

/* ---- for the control thread ---- */

/* Those that the program has made. A handle of another one may be stale, and the driver is not to be asked about such. */
unsigned track_contexts(uint64_t *out, unsigned max) {
  unsigned count = 0;
  lock(&process->lock_things);
  for (uint64_t i = 0; i < things_size && count < max; i++)
    if (things[i].handle != 0 && things[i].handle != grave && things[i].class == CLASS_OBJECT && things[i].kind == OBJECT_CONTEXT &&
        things[i].reserved == CONTEXT_CREATED)
      out[count++] = things[i].handle;
  unlock(&process->lock_things);
  return count;
}

void track_report(struct mailbox *out) {
  memset(out->host, 0, sizeof out->host);
  memset(out->objects, 0, sizeof out->objects);
  memset(out->devices, 0, sizeof out->devices);
  out->device_count = __atomic_load_n(&device_count, __ATOMIC_ACQUIRE);
  out->driver_version = driver_version;
  for (uint32_t i = 0; i < out->device_count; i++) memcpy(out->devices[i].uuid, uuids[i], sizeof uuids[i]);
  for (unsigned kind = 0; kind < BLOCKER_KINDS; kind++) out->blockers[kind] = __atomic_load_n(&counted[kind], __ATOMIC_RELAXED);
  lock(&process->lock_things);
  out->untracked = untracked;
  for (uint64_t i = 0; i < things_size; i++) {
    const struct thing *thing = &things[i];
    if (thing->handle == 0 || thing->handle == grave) continue;
    if (thing->class == CLASS_OBJECT) out->objects[thing->kind]++;
    if (thing->class != CLASS_OBJECT && thing->reserved) continue;
    if (thing->class == CLASS_BLOCKER) out->blockers[thing->kind]++;
    if (thing->class != CLASS_MEMORY) continue;
    if (thing->kind == MEMORY_MANAGED) out->blockers[BLOCKER_MANAGED]++;
    struct mailbox_amount *amount = NULL;
    if (thing->kind >= MEMORY_DEVICE_KINDS) amount = &out->host[thing->kind - MEMORY_DEVICE_KINDS];
    else if (thing->device >= 0 && thing->device < MAILBOX_DEVICES) amount = &out->devices[thing->device].memory[thing->kind];
    if (!amount) {
      out->untracked++;
      continue;
    }
    amount->count++;
    amount->bytes += thing->bytes;
  }
  unlock(&process->lock_things);
}
