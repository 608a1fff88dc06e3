/*
 * Memory. What is "on a GPU" is a file in the GPU directory, mapped shared: a test wipes the directory between dump and restore, so that
 * what comes back can only have come back through the checkpoint. Addresses are kept: while a process is checkpointed they are mapped
 * without any access, and its bytes are in ordinary memory of the process, which CRIU dumps.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>
#include "driver.h"

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct allocation *allocations;
static CUmemGenericAllocationHandle last_handle = 0x1000;

static size_t pages(size_t size) { return (size + 4095) & ~(size_t)4095; }

/* Makes the file of an allocation on a device. @return an open descriptor, or -1 */
static int make_file(struct allocation *a, const struct device *device) {
  unsigned char *u = (unsigned char *)device->uuid.bytes;
  unsigned id[2];
  char directory[400];
  snprintf(directory, sizeof directory, "%s/mem-%02x%02x%02x%02x", gpu_directory(), u[0], u[1], u[2], u[15]);
  mkdir(gpu_directory(), 0777);
  mkdir(directory, 0777);
  if (getrandom(id, sizeof id, 0) != sizeof id) return -1;
  snprintf(a->file, sizeof a->file, "%s/%08x%08x", directory, id[0], id[1]);
  int fd = open(a->file, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd >= 0 && ftruncate(fd, (off_t)a->mapped)) {
    close(fd);
    unlink(a->file);
    return -1;
  }
  return fd;
}

static bool map_file(struct allocation *a, int fd) {
  int fixed = a->address ? MAP_FIXED : 0;
  void *at = mmap((void *)a->address, a->mapped, PROT_READ | PROT_WRITE, MAP_SHARED | fixed, fd, 0);
  if (at == MAP_FAILED) return false;
  a->address = (uint64_t)at;
  return true;
}

static void add(struct allocation *a) {
  pthread_mutex_lock(&mutex);
  a->next = allocations;
  allocations = a;
  pthread_mutex_unlock(&mutex);
}

/* Also inside of it. NULL when there is none. */
static struct allocation *find(uint64_t address) {
  for (struct allocation *a = allocations; a; a = a->next)
    if (a->address && a->kind != KIND_RESERVED && address >= a->address && address < a->address + a->size) return a;
  return NULL;
}

CUresult memory_allocate(CUcontext context, size_t size, enum kind kind, CUdeviceptr *address) {
  if (!address || !size) return CUDA_ERROR_INVALID_VALUE;
  struct allocation *a = calloc(1, sizeof *a);
  if (!a) return CUDA_ERROR_OUT_OF_MEMORY;
  *a = (struct allocation){.size = size, .mapped = pages(size), .kind = kind, .context = context, .device = context->device};
  if (kind == KIND_HOST) {
    void *at = mmap(NULL, a->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) goto full;
    a->address = (uint64_t)at;
  } else {
    const struct device *device = &devices.at[a->device];
    if (device_used(device) + a->mapped > device->memory) goto full;
    int fd = make_file(a, device);
    bool mapped = fd >= 0 && map_file(a, fd);
    if (fd >= 0) close(fd);
    if (!mapped) goto full;
  }
  add(a);
  *address = a->address;
  return CUDA_SUCCESS;
full:
  if (*a->file) unlink(a->file);
  free(a);
  return CUDA_ERROR_OUT_OF_MEMORY;
}

static void forget(struct allocation *a) {
  for (struct allocation **at = &allocations; *at; at = &(*at)->next)
    if (*at == a) {
      *at = a->next;
      break;
    }
  if (*a->file) unlink(a->file);
  free(a);
}

CUresult memory_free(CUdeviceptr address) {
  pthread_mutex_lock(&mutex);
  struct allocation *a = find(address);
  CUresult result = a && a->address == address ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
  if (!result) {
    munmap((void *)a->address, a->mapped);
    forget(a);
  }
  pthread_mutex_unlock(&mutex);
  return result;
}

bool memory_contains(uint64_t address, size_t size, enum kind *kind) {
  pthread_mutex_lock(&mutex);
  struct allocation *a = find(address);
  bool contains = a && address + size <= a->address + a->size;
  if (contains && kind) *kind = a->kind;
  pthread_mutex_unlock(&mutex);
  return contains;
}

/* ---- checkpoint ---- */

static bool on_gpu(const struct allocation *a) { return *a->file != 0; }

const char *memory_blocker(void) {
  for (struct allocation *a = allocations; a; a = a->next) {
    if (a->kind == KIND_MANAGED) return "managed memory";
    if (a->shared && driver_version() < 13020) return "memory shared by IPC"; /* r610 */
  }
  return NULL;
}

static bool read_file(struct allocation *a) {
  a->saved = mmap(NULL, a->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (a->saved == MAP_FAILED) {
    a->saved = NULL;
    return false;
  }
  int fd = open(a->file, O_RDONLY | O_CLOEXEC);
  bool whole = fd >= 0;
  for (size_t at = 0; whole && at < a->mapped;) {
    ssize_t n = pread(fd, (char *)a->saved + at, a->mapped - at, (off_t)at);
    if (n <= 0) whole = false;
    else at += (size_t)n;
  }
  if (fd >= 0) close(fd);
  return whole;
}

/* Two passes: what fails, fails before anything is given up. @param fail_at  fails at this allocation, counted from 1 */
CUresult memory_save(int fail_at) {
  int count = 0;
  for (struct allocation *a = allocations; a; a = a->next) {
    if (!on_gpu(a)) continue;
    if (++count == fail_at || !read_file(a)) {
      memory_undo_save();
      return CUDA_ERROR_OUT_OF_MEMORY;
    }
  }
  for (struct allocation *a = allocations; a; a = a->next) {
    if (!on_gpu(a)) continue;
    if (a->address) mmap((void *)a->address, a->mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    unlink(a->file);
  }
  return CUDA_SUCCESS;
}

void memory_undo_save(void) {
  for (struct allocation *a = allocations; a; a = a->next) {
    if (a->saved) munmap(a->saved, a->mapped);
    a->saved = NULL;
  }
}

bool memory_fits(const int *to_device, const struct devices *plugged) {
  uint64_t need[MAX_DEVICES] = {0};
  for (struct allocation *a = allocations; a; a = a->next)
    if (on_gpu(a)) need[to_device[a->device]] += a->mapped;
  for (int i = 0; i < plugged->count; i++)
    if (need[i] && device_used(&plugged->at[i]) + need[i] > plugged->at[i].memory) return false;
  return true;
}

CUresult memory_restore(const int *to_device, const struct devices *plugged) {
  for (struct allocation *a = allocations; a; a = a->next) {
    if (!on_gpu(a)) continue;
    int fd = make_file(a, &plugged->at[to_device[a->device]]);
    if (fd < 0) return CUDA_ERROR_OUT_OF_MEMORY;
    bool whole = true;
    for (size_t at = 0; whole && at < a->mapped;) {
      ssize_t n = pwrite(fd, (char *)a->saved + at, a->mapped - at, (off_t)at);
      if (n <= 0) whole = false;
      else at += (size_t)n;
    }
    whole = whole && (!a->address || map_file(a, fd));
    close(fd);
    if (!whole) return CUDA_ERROR_OUT_OF_MEMORY;
  }
  memory_undo_save(); /* the copies */
  return CUDA_SUCCESS;
}

/* ---- entry points ---- */

API(cuMemAlloc_v2, (CUdeviceptr * address, size_t size), (address, size)) {
  CUcontext context;
  TRY(current_context(&context));
  return memory_allocate(context, size, KIND_DEVICE, address);
}
API(cuMemFree_v2, (CUdeviceptr address), (address)) {
  CUcontext context;
  TRY(current_context(&context));
  if (!address) return CUDA_SUCCESS;
  TRY(streams_drain(context));
  return memory_free(address);
}
API(cuMemAllocPitch_v2, (CUdeviceptr * address, size_t *pitch, size_t width, size_t height, unsigned element),
    (address, pitch, width, height, element)) {
  CUcontext context;
  (void)element;
  TRY(current_context(&context));
  if (!pitch) return CUDA_ERROR_INVALID_VALUE;
  *pitch = (width + 511) & ~(size_t)511;
  return memory_allocate(context, *pitch * height, KIND_DEVICE, address);
}
API(cuMemGetInfo_v2, (size_t * available, size_t *total), (available, total)) {
  CUcontext context;
  TRY(current_context(&context));
  if (!available || !total) return CUDA_ERROR_INVALID_VALUE;
  const struct device *device = &devices.at[context->device];
  uint64_t used = device_used(device);
  *total = device->memory;
  *available = used < device->memory ? device->memory - used : 0;
  return CUDA_SUCCESS;
}
API(cuMemGetAddressRange_v2, (CUdeviceptr * base, size_t *size, CUdeviceptr address), (base, size, address)) {
  CUresult result = CUDA_ERROR_NOT_FOUND;
  pthread_mutex_lock(&mutex);
  struct allocation *a = find(address);
  if (a && a->kind != KIND_HOST) {
    if (base) *base = a->address;
    if (size) *size = a->size;
    result = CUDA_SUCCESS;
  }
  pthread_mutex_unlock(&mutex);
  return result;
}
API(cuMemHostAlloc, (void **address, size_t size, unsigned flags), (address, size, flags)) {
  CUcontext context;
  CUdeviceptr found;
  (void)flags;
  TRY(current_context(&context));
  if (!address) return CUDA_ERROR_INVALID_VALUE;
  TRY(memory_allocate(context, size, KIND_HOST, &found));
  *address = (void *)found;
  return CUDA_SUCCESS;
}
API(cuMemFreeHost, (void *address), (address)) { return memory_free((CUdeviceptr)address); }
API(cuMemAllocManaged, (CUdeviceptr * address, size_t size, unsigned flags), (address, size, flags)) {
  CUcontext context;
  TRY(current_context(&context));
  if (flags != 1 && flags != 2) return CUDA_ERROR_INVALID_VALUE;
  return memory_allocate(context, size, KIND_MANAGED, address);
}
API(cuPointerGetAttribute, (void *value, int attribute, CUdeviceptr address), (value, attribute, address)) {
  CUresult result = CUDA_SUCCESS;
  if (!value) return CUDA_ERROR_INVALID_VALUE;
  pthread_mutex_lock(&mutex);
  struct allocation *a = find(address);
  if (!a) result = CUDA_ERROR_INVALID_VALUE;
  else if (attribute == 1) *(CUcontext *)value = a->context;
  else if (attribute == 2) *(unsigned *)value = a->kind == KIND_HOST ? 1 : 2;
  else if (attribute == 3 || attribute == 4) *(uint64_t *)value = address;
  else if (attribute == 8) *(unsigned *)value = a->kind == KIND_MANAGED;
  else if (attribute == 9) *(int *)value = a->device;
  else result = CUDA_ERROR_INVALID_VALUE;
  pthread_mutex_unlock(&mutex);
  return result;
}
API(cuIpcGetMemHandle, (CUipcMemHandle * handle, CUdeviceptr address), (handle, address)) {
  CUresult result = CUDA_ERROR_INVALID_VALUE;
  pthread_mutex_lock(&mutex);
  struct allocation *a = find(address);
  if (a) {
    a->shared = true;
    snprintf(handle->reserved, sizeof handle->reserved, "%s", strrchr(a->file, '/'));
    result = CUDA_SUCCESS;
  }
  pthread_mutex_unlock(&mutex);
  return result;
}

/* Copies and fills. A pointer that isn't the driver's is the host's. */
struct copy {
  void *to;
  const void *from;
  size_t size;
};
static void run_copy(void *argument) {
  struct copy *copy = argument;
  memmove(copy->to, copy->from, copy->size);
}
static CUresult copy_on(CUstream given, uint64_t to, uint64_t from, size_t size, bool wait) {
  struct CUstream_st *stream;
  TRY(stream_resolve(given, &stream));
  struct copy *copy = malloc(sizeof *copy);
  if (!copy) return CUDA_ERROR_OUT_OF_MEMORY;
  *copy = (struct copy){(void *)to, (const void *)from, size};
  TRY(stream_push(stream, run_copy, copy));
  return wait ? stream_drain(stream) : CUDA_SUCCESS;
}
#define ON_GPU(address, size)                                              \
  do {                                                                     \
    CUcontext on_;                                                         \
    TRY(current_context(&on_));                                            \
    if (!memory_contains((address), (size), NULL)) return CUDA_ERROR_INVALID_VALUE; \
  } while (0)

API_STREAM(cuMemcpyHtoD_v2, _ptds, (CUdeviceptr to, const void *from, size_t size), (to, from, size)) {
  ON_GPU(to, size);
  return copy_on(NULL, to, (uint64_t)from, size, true);
}
API_STREAM(cuMemcpyDtoH_v2, _ptds, (void *to, CUdeviceptr from, size_t size), (to, from, size)) {
  ON_GPU(from, size);
  return copy_on(NULL, (uint64_t)to, from, size, true);
}
API_STREAM(cuMemcpyDtoD_v2, _ptds, (CUdeviceptr to, CUdeviceptr from, size_t size), (to, from, size)) {
  ON_GPU(to, size);
  ON_GPU(from, size);
  return copy_on(NULL, to, from, size, true);
}
API_STREAM(cuMemcpy, _ptds, (CUdeviceptr to, CUdeviceptr from, size_t size), (to, from, size)) {
  return copy_on(NULL, to, from, size, true);
}
API_STREAM(cuMemcpyHtoDAsync_v2, _ptsz, (CUdeviceptr to, const void *from, size_t size, CUstream stream), (to, from, size, stream)) {
  ON_GPU(to, size);
  return copy_on(stream, to, (uint64_t)from, size, false);
}
API_STREAM(cuMemcpyDtoHAsync_v2, _ptsz, (void *to, CUdeviceptr from, size_t size, CUstream stream), (to, from, size, stream)) {
  ON_GPU(from, size);
  return copy_on(stream, (uint64_t)to, from, size, false);
}
API_STREAM(cuMemcpyDtoDAsync_v2, _ptsz, (CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream), (to, from, size, stream)) {
  ON_GPU(to, size);
  ON_GPU(from, size);
  return copy_on(stream, to, from, size, false);
}
API_STREAM(cuMemcpyAsync, _ptsz, (CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream), (to, from, size, stream)) {
  return copy_on(stream, to, from, size, false);
}

struct fill {
  char *to;
  uint32_t value;
  size_t count, width;
};
static void run_fill(void *argument) {
  struct fill *fill = argument;
  for (size_t i = 0; i < fill->count; i++) memcpy(fill->to + i * fill->width, &fill->value, fill->width);
}
static CUresult fill_on(CUstream given, uint64_t to, uint32_t value, size_t count, size_t width, bool wait) {
  struct CUstream_st *stream;
  TRY(stream_resolve(given, &stream));
  if (!memory_contains(to, count * width, NULL)) return CUDA_ERROR_INVALID_VALUE;
  struct fill *fill = malloc(sizeof *fill);
  if (!fill) return CUDA_ERROR_OUT_OF_MEMORY;
  *fill = (struct fill){(char *)to, value, count, width};
  TRY(stream_push(stream, run_fill, fill));
  return wait ? stream_drain(stream) : CUDA_SUCCESS;
}
API_STREAM(cuMemsetD8_v2, _ptds, (CUdeviceptr to, unsigned char value, size_t count), (to, value, count)) {
  return fill_on(NULL, to, value, count, 1, true);
}
API_STREAM(cuMemsetD32_v2, _ptds, (CUdeviceptr to, unsigned value, size_t count), (to, value, count)) {
  return fill_on(NULL, to, value, count, 4, true);
}
API_STREAM(cuMemsetD8Async, _ptsz, (CUdeviceptr to, unsigned char value, size_t count, CUstream stream), (to, value, count, stream)) {
  return fill_on(stream, to, value, count, 1, false);
}
API_STREAM(cuMemsetD32Async, _ptsz, (CUdeviceptr to, unsigned value, size_t count, CUstream stream), (to, value, count, stream)) {
  return fill_on(stream, to, value, count, 4, false);
}
API_STREAM(cuMemAllocAsync, _ptsz, (CUdeviceptr * address, size_t size, CUstream given), (address, size, given)) {
  struct CUstream_st *stream;
  CUcontext context;
  TRY(current_context(&context));
  TRY(stream_resolve(given, &stream));
  return memory_allocate(context, size, KIND_DEVICE, address);
}
static void run_free(void *argument) { memory_free(*(CUdeviceptr *)argument); }
API_STREAM(cuMemFreeAsync, _ptsz, (CUdeviceptr address, CUstream given), (address, given)) {
  struct CUstream_st *stream;
  TRY(stream_resolve(given, &stream));
  if (!memory_contains(address, 1, NULL)) return CUDA_ERROR_INVALID_VALUE;
  CUdeviceptr *copy = malloc(sizeof *copy);
  if (!copy) return CUDA_ERROR_OUT_OF_MEMORY;
  *copy = address;
  return stream_push(stream, run_free, copy);
}

/* ---- virtual memory: addresses, physical memory, and the mapping of one to the other ---- */

API(cuMemGetAllocationGranularity, (size_t * granularity, const CUmemAllocationProp *prop, unsigned option), (granularity, prop, option)) {
  (void)option;
  if (!granularity || !prop) return CUDA_ERROR_INVALID_VALUE;
  *granularity = 2 << 20;
  return CUDA_SUCCESS;
}
API(cuMemAddressReserve, (CUdeviceptr * address, size_t size, size_t alignment, CUdeviceptr wish, unsigned long long flags),
    (address, size, alignment, wish, flags)) {
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
  if (!address || !size || size % (2 << 20) || flags) return CUDA_ERROR_INVALID_VALUE;
  (void)alignment;
  void *at = mmap((void *)wish, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  struct allocation *a = calloc(1, sizeof *a);
  if (at == MAP_FAILED || !a) return CUDA_ERROR_OUT_OF_MEMORY;
  *a = (struct allocation){.address = (uint64_t)at, .size = size, .mapped = size, .kind = KIND_RESERVED};
  add(a);
  *address = a->address;
  return CUDA_SUCCESS;
}
API(cuMemAddressFree, (CUdeviceptr address, size_t size), (address, size)) {
  CUresult result = CUDA_ERROR_INVALID_VALUE;
  pthread_mutex_lock(&mutex);
  for (struct allocation *a = allocations; a; a = a->next)
    if (a->kind == KIND_RESERVED && a->address == address && a->size == size) {
      munmap((void *)address, size);
      forget(a);
      result = CUDA_SUCCESS;
      break;
    }
  pthread_mutex_unlock(&mutex);
  return result;
}
API(cuMemCreate, (CUmemGenericAllocationHandle * handle, size_t size, const CUmemAllocationProp *prop, unsigned long long flags),
    (handle, size, prop, flags)) {
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
  if (!handle || !prop || flags || !size || size % (2 << 20)) return CUDA_ERROR_INVALID_VALUE;
  if (prop->location.type != 1 || prop->location.id < 0 || prop->location.id >= devices.count) return CUDA_ERROR_INVALID_DEVICE;
  const struct device *device = &devices.at[prop->location.id];
  if (device_used(device) + size > device->memory) return CUDA_ERROR_OUT_OF_MEMORY;
  struct allocation *a = calloc(1, sizeof *a);
  if (!a) return CUDA_ERROR_OUT_OF_MEMORY;
  *a = (struct allocation){.size = size, .mapped = size, .kind = KIND_PHYSICAL, .device = prop->location.id};
  int fd = make_file(a, device);
  if (fd < 0) {
    free(a);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  close(fd);
  pthread_mutex_lock(&mutex);
  *handle = a->handle = ++last_handle;
  pthread_mutex_unlock(&mutex);
  add(a);
  return CUDA_SUCCESS;
}
static struct allocation *by_handle(CUmemGenericAllocationHandle handle) {
  for (struct allocation *a = allocations; a; a = a->next)
    if (a->kind == KIND_PHYSICAL && handle && a->handle == handle) return a;
  return NULL;
}
API(cuMemMap, (CUdeviceptr address, size_t size, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags),
    (address, size, offset, handle, flags)) {
  CUresult result = CUDA_ERROR_INVALID_VALUE;
  pthread_mutex_lock(&mutex);
  struct allocation *a = by_handle(handle);
  if (a && !a->address && !offset && !flags && size == a->size) {
    a->address = address;
    int fd = open(a->file, O_RDWR | O_CLOEXEC);
    result = fd >= 0 && map_file(a, fd) ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    if (fd >= 0) close(fd);
  }
  pthread_mutex_unlock(&mutex);
  return result;
}
API(cuMemSetAccess, (CUdeviceptr address, size_t size, const CUmemAccessDesc *access, size_t count), (address, size, access, count)) {
  return access && count && memory_contains(address, size, NULL) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
API(cuMemUnmap, (CUdeviceptr address, size_t size), (address, size)) {
  CUresult result = CUDA_ERROR_INVALID_VALUE;
  streams_drain(NULL);
  pthread_mutex_lock(&mutex);
  struct allocation *a = find(address);
  if (a && a->kind == KIND_PHYSICAL && a->address == address && a->size == size) {
    mmap((void *)address, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    a->address = 0;
    if (!a->handle) forget(a);
    result = CUDA_SUCCESS;
  }
  pthread_mutex_unlock(&mutex);
  return result;
}
API(cuMemRelease, (CUmemGenericAllocationHandle handle), (handle)) {
  CUresult result = CUDA_ERROR_INVALID_VALUE;
  pthread_mutex_lock(&mutex);
  struct allocation *a = by_handle(handle);
  if (a) {
    if (a->address) a->handle = 0; /* what is mapped lives until it is unmapped */
    else forget(a);
    result = CUDA_SUCCESS;
  }
  pthread_mutex_unlock(&mutex);
  return result;
}
