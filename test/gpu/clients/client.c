/*
 * A client of the driver API, on the stand-in and on a real GPU alike. Keeps a counter and a buffer on each device, and prints a line
 * "NAME COUNTER" for each step, in which it has looked that the buffers still hold their pattern.
 *
 *   --devices N    how many (default 1)         --bytes N       of each buffer (default 64 KiB)
 *   --buffers N    for each device (default 2)  --interval MS   between steps (default 10)
 *   --name NAME    of the process               --fork          a second process, NAME2, that does the same
 *   --spin MS      a kernel that runs so long in each step
 *   --managed      also allocates managed memory, --ipc gives a handle of a buffer out: neither can be checkpointed everywhere
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>
#include "../cuda-abi.h"
#include "kernels.h"

#define LINKED 0
#define DLSYM 1
#define PROCADDRESS 2

static const char *name = "client";

static void fail(const char *what, int code) {
  dprintf(1, "%s FAILED %s: %d\n", name, what, code);
  exit(1);
}

#if FIND == LINKED
#define DECLARE(call, symbol, version, parameters) extern CUresult symbol parameters;
CLIENT_CALLS(DECLARE)
#define NAMED(call, symbol, version, parameters) static CUresult(*const my_##call) parameters = symbol;
CLIENT_CALLS(NAMED)
static void find_calls(void) {}
#else
#define DECLARE(call, symbol, version, parameters) static CUresult(*my_##call) parameters;
CLIENT_CALLS(DECLARE)
static void find_calls(void) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW);
  if (!library) {
    dprintf(1, "%s FAILED %s\n", name, dlerror());
    exit(1);
  }
#if FIND == DLSYM
#define GET(call, symbol, version, parameters) \
  if (!(my_##call = dlsym(library, #symbol))) fail(#symbol, -1);
#else
  CUresult (*get)(const char *, void **, int, uint64_t, int *) = dlsym(library, "cuGetProcAddress_v2");
  if (!get) fail("cuGetProcAddress_v2", -1);
#define GET(call, symbol, version, parameters) \
  if (get(#call, (void **)&my_##call, version > 12000 ? version : 12000, 0, NULL)) fail(#call, -1);
#endif
  CLIENT_CALLS(GET)
}
#endif

#define CALL(call, ...)                             \
  do {                                              \
    CUresult code_ = my_##call(__VA_ARGS__);        \
    if (code_) fail(#call, code_);                  \
  } while (0)

struct device {
  CUcontext context;
  CUstream stream;
  CUevent event;
  CUfunction increment, fill, spin;
  CUdeviceptr counter, *buffers;
};

static size_t bytes = 64 << 10;
static int device_count = 1, buffer_count = 2, interval_ms = 10, spin_ms;
static int managed, ipc;

static unsigned pattern(int device, int buffer) { return 0xc0de0000u + (unsigned)(device << 8) + (unsigned)buffer; }

static void set_up(struct device *d, int index) {
  CUmodule module;
  CUdevice device;
  size_t size;
  CALL(cuDeviceGet, &device, index);
  CALL(cuDevicePrimaryCtxRetain, &d->context, device);
  CALL(cuCtxSetCurrent, d->context);
  CALL(cuStreamCreate, &d->stream, CU_STREAM_NON_BLOCKING);
  CALL(cuEventCreate, &d->event, 0);
  CALL(cuModuleLoadData, &module, kernels_ptx);
  CALL(cuModuleGetFunction, &d->increment, module, "increment");
  CALL(cuModuleGetFunction, &d->fill, module, "fill");
  CALL(cuModuleGetFunction, &d->spin, module, "spin");
  CALL(cuModuleGetGlobal, &d->counter, &size, module, "counter");
  d->buffers = calloc((size_t)buffer_count, sizeof *d->buffers);
  for (int b = 0; b < buffer_count; b++) {
    CALL(cuMemAlloc, &d->buffers[b], bytes);
    unsigned value = pattern(index, b), count = (unsigned)(bytes / 4);
    void *parameters[] = {&d->buffers[b], &value, &count};
    CALL(cuLaunchKernel, d->fill, (count + 255) / 256, 1, 1, 256, 1, 1, 0, d->stream, parameters, NULL);
  }
  if (managed) {
    CUdeviceptr address;
    CALL(cuMemAllocManaged, &address, 4096, 1);
  }
  if (ipc) {
    CUipcMemHandle handle;
    CALL(cuIpcGetMemHandle, &handle, d->buffers[0]);
  }
  CALL(cuStreamSynchronize, d->stream);
}

static unsigned step(struct device *d, int index) {
  unsigned counter;
  CALL(cuCtxSetCurrent, d->context);
  void *parameters[] = {&d->counter};
  CALL(cuLaunchKernel, d->increment, 1, 1, 1, 1, 1, 1, 0, d->stream, parameters, NULL);
  if (spin_ms) {
    void *spin[] = {&spin_ms};
    CALL(cuLaunchKernel, d->spin, 1, 1, 1, 1, 1, 1, 0, d->stream, spin, NULL);
  }
  CALL(cuEventRecord, d->event, d->stream);
  CALL(cuEventSynchronize, d->event);
  CALL(cuMemcpyDtoH, &counter, d->counter, sizeof counter);
  unsigned *copy = malloc(bytes);
  for (int b = 0; b < buffer_count; b++) {
    CALL(cuMemcpyDtoH, copy, d->buffers[b], bytes);
    for (size_t i = 0; i < bytes / 4; i++)
      if (copy[i] != pattern(index, b)) fail("buffer's pattern", (int)copy[i]);
  }
  free(copy);
  return counter;
}

int main(int argc, char **argv) {
  int two = 0;
  for (int i = 1; i < argc; i++) {
    const char *flag = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
    if (!strcmp(flag, "--managed")) managed = 1;
    else if (!strcmp(flag, "--ipc")) ipc = 1;
    else if (!strcmp(flag, "--fork")) two = 1;
    else {
      i++;
      if (!strcmp(flag, "--devices")) device_count = atoi(value);
      else if (!strcmp(flag, "--bytes")) bytes = strtoul(value, NULL, 10);
      else if (!strcmp(flag, "--buffers")) buffer_count = atoi(value);
      else if (!strcmp(flag, "--interval")) interval_ms = atoi(value);
      else if (!strcmp(flag, "--spin")) spin_ms = atoi(value);
      else if (!strcmp(flag, "--name")) name = value;
      else {
        fprintf(stderr, "unknown option %s\n", flag);
        return 2;
      }
    }
  }
  if (two && fork() == 0) { /* before cuInit: a fork after it would not be a client of its own */
    char *second;
    if (asprintf(&second, "%s2", name) < 0) return 1;
    name = second;
    prctl(PR_SET_PDEATHSIG, 9);
  }
  prctl(PR_SET_NAME, name);
  find_calls();
  CALL(cuInit, 0);
  int count;
  CALL(cuDeviceGetCount, &count);
  if (count < device_count) fail("device count", count);
  struct device *devices = calloc((size_t)device_count, sizeof *devices);
  for (int i = 0; i < device_count; i++) set_up(&devices[i], i);
  for (;;) {
    unsigned counter = step(&devices[0], 0);
    for (int i = 1; i < device_count; i++) {
      unsigned other = step(&devices[i], i);
      if (other != counter) fail("the devices' counters differ", (int)other);
    }
    dprintf(1, "%s %u\n", name, counter);
    nanosleep(&(struct timespec){interval_ms / 1000, (interval_ms % 1000) * 1000000L}, NULL);
  }
}
