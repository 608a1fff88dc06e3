/*
 * Makes things of each kind by the driver, says "ready", and goes on at each line on stdin: frees half, frees all, ends.
 * In other modes:
 *   busy N     N threads that call all the time; each 10 ms a line with their number of rounds
 *   fork       a child of a process that has called the driver: "PARENT CHILD", after the child has called it, too
 *   close      closes every descriptor but stdout, then says "ready"
 *   none       calls nothing
 *   error      calls that fail
 *   imports    memory of others, by cuMemImportFromShareableHandle: at each line less of it
 *   given      calls cuDriverGetVersion and cuDeviceGetCount as cuGetProcAddress gives them: a line for each call that has returned
 *   impostor   a mailbox that is none: it can be cut off, or has another's pid
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "../cuda-abi.h"

CUresult cuInit(unsigned);
CUresult cuDriverGetVersion(int *);
CUresult cuDevicePrimaryCtxRetain(CUcontext *, CUdevice);
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice);
CUresult cuCtxSetCurrent(CUcontext);
CUresult cuCtxGetCurrent(CUcontext *);
CUresult cuCtxCreate_v2(CUcontext *, unsigned, CUdevice);
CUresult cuCtxDestroy_v2(CUcontext);
CUresult cuMemAlloc_v2(CUdeviceptr *, size_t);
CUresult cuMemFree_v2(CUdeviceptr);
CUresult cuMemAllocPitch_v2(CUdeviceptr *, size_t *, size_t, size_t, unsigned);
CUresult cuMemAllocAsync(CUdeviceptr *, size_t, CUstream);
CUresult cuMemFreeAsync(CUdeviceptr, CUstream);
CUresult cuMemAllocManaged(CUdeviceptr *, size_t, unsigned);
CUresult cuMemHostAlloc(void **, size_t, unsigned);
CUresult cuMemFreeHost(void *);
CUresult cuMemAddressReserve(CUdeviceptr *, size_t, size_t, CUdeviceptr, unsigned long long);
CUresult cuMemCreate(CUmemGenericAllocationHandle *, size_t, const CUmemAllocationProp *, unsigned long long);
CUresult cuMemMap(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long);
CUresult cuMemUnmap(CUdeviceptr, size_t);
CUresult cuMemRelease(CUmemGenericAllocationHandle);
CUresult cuStreamCreate(CUstream *, unsigned);
CUresult cuStreamDestroy_v2(CUstream);
CUresult cuEventCreate(CUevent *, unsigned);
CUresult cuEventDestroy_v2(CUevent);

static void need(const char *what, CUresult result) {
  if (result == CUDA_SUCCESS) return;
  printf("%s: %d\n", what, result);
  exit(1);
}
#define NEED(call) need(#call, call)

static void say(const char *words) {
  printf("%s\n", words);
  fflush(stdout);
}

static void wait_for_line(void) {
  if (getchar() == EOF) exit(0);
}

#define MIB (1024 * 1024)

static void things(void) {
  CUcontext primary, own;
  CUdeviceptr memory[2], pitched, pool, managed, reserved;
  CUmemGenericAllocationHandle handle;
  size_t pitch;
  void *pinned;
  CUstream stream[2];
  CUevent event[2];
  NEED(cuInit(0));
  NEED(cuDevicePrimaryCtxRetain(&primary, 0));
  NEED(cuCtxSetCurrent(primary));
  for (int i = 0; i < 2; i++) {
    NEED(cuMemAlloc_v2(&memory[i], 4096 * (i + 1)));
    NEED(cuStreamCreate(&stream[i], 0));
    NEED(cuEventCreate(&event[i], 0));
  }
  NEED(cuMemAllocPitch_v2(&pitched, &pitch, 100, 10, 4));
  NEED(cuMemAllocAsync(&pool, 8192, stream[0]));
  NEED(cuMemAllocManaged(&managed, 12288, 1));
  NEED(cuMemHostAlloc(&pinned, 16384, 0));
  CUmemAllocationProp properties = {.type = 1, .location = {.type = 1, .id = 1}};
  NEED(cuMemCreate(&handle, 2 * MIB, &properties, 0));
  NEED(cuMemAddressReserve(&reserved, 2 * MIB, 0, 0, 0));
  NEED(cuMemMap(reserved, 2 * MIB, 0, handle, 0));
  NEED(cuMemRelease(handle)); /* as frameworks do: the mapping keeps it */
  NEED(cuCtxCreate_v2(&own, 0, 1));
  CUdeviceptr other;
  NEED(cuMemAlloc_v2(&other, 65536)); /* in the new context, on the second device */
  printf("pitch %zu\n", pitch);
  say("ready");
  wait_for_line();
  NEED(cuCtxDestroy_v2(own)); /* takes its memory along */
  NEED(cuCtxSetCurrent(primary));
  NEED(cuMemFree_v2(memory[0]));
  NEED(cuStreamDestroy_v2(stream[1]));
  NEED(cuEventDestroy_v2(event[0]));
  NEED(cuMemFree_v2(managed));
  if (cuMemFree_v2(memory[1] + 1) == CUDA_SUCCESS) say("freed a wrong address");
  say("ready");
  wait_for_line();
  NEED(cuMemFree_v2(memory[1]));
  NEED(cuMemFree_v2(pitched));
  NEED(cuMemFreeAsync(pool, stream[0]));
  NEED(cuMemFreeHost(pinned));
  NEED(cuMemUnmap(reserved, 2 * MIB));
  NEED(cuStreamDestroy_v2(stream[0]));
  NEED(cuEventDestroy_v2(event[1]));
  NEED(cuDevicePrimaryCtxRelease_v2(0));
  say("ready");
  wait_for_line();
}

/* Not every driver has these: by dlsym. */
static int call(const char *name, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e) {
  int (*function)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
  void *found = dlsym(RTLD_DEFAULT, name);
  memcpy(&function, &found, sizeof function);
  return function ? function(a, b, c, d, e) : -1;
}
#define ADDRESS(index) (0x700000000000 + (index) * 2 * MIB)

static void imports(void) {
  CUmemGenericAllocationHandle handle[3], multicast;
  for (int i = 0; i < 3; i++) NEED(call("cuMemImportFromShareableHandle", (uint64_t)&handle[i], 3, 1, 0, 0));
  NEED(call("cuMulticastCreate", (uint64_t)&multicast, 0, 0, 0, 0));
  for (uint64_t i = 0; i < 2; i++) NEED(call("cuMemMap", ADDRESS(i), 2 * MIB, 0, handle[i], 0));
  say("ready"); /* two mapped, one not */
  wait_for_line();
  NEED(call("cuMemRelease", handle[0], 0, 0, 0, 0)); /* mapped still */
  NEED(call("cuMemUnmap", ADDRESS(1), 2 * MIB, 0, 0, 0)); /* a handle still */
  NEED(call("cuMemRelease", handle[2], 0, 0, 0, 0));
  NEED(call("cuMemRelease", multicast, 0, 0, 0, 0));
  say("ready");
  wait_for_line();
  NEED(call("cuMemUnmap", ADDRESS(0), 2 * MIB, 0, 0, 0));
  NEED(call("cuMemRelease", handle[1], 0, 0, 0, 0));
  say("ready");
  wait_for_line();
}

/* Each in a thread of its own. */
static void *given(void *argument) {
  const char *name = argument;
  int (*get)(const char *, void **, int, uint64_t, int *), (*function)(int *), value = 0;
  void *found = dlsym(RTLD_DEFAULT, "cuGetProcAddress_v2");
  memcpy(&get, &found, sizeof get);
  NEED(get(name, &found, 12080, 0, NULL));
  memcpy(&function, &found, sizeof function);
  for (;;) {
    NEED(function(&value));
    printf("%s %d\n", name, value);
    fflush(stdout);
    nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
  }
  return NULL;
}

static uint64_t rounds;

static void *busy(void *context) {
  NEED(cuCtxSetCurrent(context));
  for (;;) {
    CUcontext current;
    CUevent event;
    NEED(cuCtxGetCurrent(&current));
    if (current != context) say("another context");
    NEED(cuEventCreate(&event, 0));
    NEED(cuEventDestroy_v2(event));
    __atomic_add_fetch(&rounds, 1, __ATOMIC_RELAXED);
  }
  return NULL;
}

/* Threads that end and begin all the time leave their places to others. */
static void *short_lived(void *context) {
  CUevent event;
  NEED(cuCtxSetCurrent(context));
  NEED(cuEventCreate(&event, 0));
  NEED(cuEventDestroy_v2(event));
  return NULL;
}

int main(int argc, char **argv) {
  const char *mode = argc > 1 ? argv[1] : "things";
  CUcontext context;
  if (!strcmp(mode, "things")) {
    things();
    return 0;
  }
  if (!strcmp(mode, "none")) {
    say("ready");
    wait_for_line();
    return 0;
  }
  if (!strcmp(mode, "impostor")) {
    for (int sealed = 0; sealed < 2; sealed++) {
      struct {
        uint64_t magic;
        uint32_t version, pid;
      } head = {0x3155504741444543ull, 1, sealed ? 1 : (uint32_t)getpid()};
      int fd = memfd_create("cedana-gpu", MFD_ALLOW_SEALING);
      if (fd < 0 || ftruncate(fd, 16384) || pwrite(fd, &head, sizeof head, 0) != sizeof head) return 1;
      if (sealed && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)) return 1;
      if (mmap(NULL, 16384, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED) return 1;
    }
    say("ready");
    wait_for_line();
    return 0;
  }
  int result = cuInit(0);
  if (!strcmp(mode, "init")) {
    printf("cuInit %d\n", result);
    return 0;
  }
  NEED(result);
  if (!strcmp(mode, "imports")) {
    imports();
    return 0;
  }
  if (!strcmp(mode, "given")) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, given, "cuDeviceGetCount")) return 1;
    given("cuDriverGetVersion");
  }
  NEED(cuDevicePrimaryCtxRetain(&context, 0));
  if (!strcmp(mode, "busy")) {
    for (int i = atoi(argv[2]); i > 0; i--) {
      pthread_t thread;
      pthread_create(&thread, NULL, busy, context);
      pthread_detach(thread);
    }
    for (;;) {
      pthread_t thread;
      nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
      printf("%llu\n", (unsigned long long)__atomic_load_n(&rounds, __ATOMIC_RELAXED));
      fflush(stdout);
      if (pthread_create(&thread, NULL, short_lived, context) == 0) pthread_detach(thread);
    }
  }
  if (!strcmp(mode, "fork")) {
    int pipe_ends[2], version = 0;
    char byte;
    if (pipe(pipe_ends)) return 1;
    pid_t child = fork();
    if (child == 0) {
      wait_for_line();
      NEED(cuDriverGetVersion(&version));
      if (write(pipe_ends[1], "x", 1) != 1) return 1;
      wait_for_line();
      return 0;
    }
    printf("%d %d\n", (int)getpid(), (int)child);
    say("forked");
    if (read(pipe_ends[0], &byte, 1) != 1) return 1;
    say("ready");
    pause();
  }
  if (!strcmp(mode, "close")) {
    syscall(SYS_close_range, 3, ~0u, 0);
    say("ready");
    wait_for_line();
  }
  if (!strcmp(mode, "error")) {
    CUdeviceptr address;
    NEED(cuCtxSetCurrent(context));
    for (int i = 0; i < 3; i++) cuMemAlloc_v2(&address, 1ull << 50);
  }
  return 0;
}
