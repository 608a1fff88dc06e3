// Calls of the GPU driver in a row, and how long one takes: "NAME NANOSECONDS" for each kind, the least of several turns (what a busy
// machine adds is never negative). Linked with libcuda.so.1, so what stands in front of it is measured with it.
//   gpu-calls CALLS TURNS
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

typedef struct context *CUcontext;
int cuInit(unsigned flags);
int cuDevicePrimaryCtxRetain(CUcontext *context, int device);
int cuCtxSetCurrent(CUcontext context);
int cuCtxGetCurrent(CUcontext *context);
int cuEventCreate(void **event, unsigned flags);
int cuEventDestroy_v2(void *event);

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

static void need(const char *what, int result) {
  if (result == 0) return;
  fprintf(stderr, "%s: %d\n", what, result);
  exit(1);
}

#define MEASURE(name, calls, call) \
  do { \
    double least = 1e18; \
    for (long turn = 0; turn < turns; turn++) { \
      double start = now(); \
      for (long i = 0; i < (calls); i++) call; \
      double each = (now() - start) / (double)(calls); \
      if (each < least) least = each; \
    } \
    printf("%s %.2f\n", name, least); \
  } while (0)

int main(int argc, char **argv) {
  long calls = argc > 1 ? atol(argv[1]) : 100000, turns = argc > 2 ? atol(argv[2]) : 10;
  CUcontext context, other;
  void *event;
  need("cuInit", cuInit(0));
  need("cuDevicePrimaryCtxRetain", cuDevicePrimaryCtxRetain(&context, 0));
  need("cuCtxSetCurrent", cuCtxSetCurrent(context));
  MEASURE("cuCtxGetCurrent", calls, cuCtxGetCurrent(&other)); // no rule
  MEASURE("cuCtxSetCurrent", calls, cuCtxSetCurrent(context)); // a rule that finds nothing new
  MEASURE("cuEventCreate+Destroy", calls / 10,
          (need("cuEventCreate", cuEventCreate(&event, 0)), need("cuEventDestroy", cuEventDestroy_v2(event)))); // tracked
  return 0;
}
