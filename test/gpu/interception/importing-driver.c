#include <stddef.h>
#include <string.h>

/*
 * A libcuda.so.1 that grants whatever is asked of memory that another process shares: imported, mapped, unmapped and released; and that gives
 * out functions that no symbol has. Nothing is there; what counts is what the interception library makes of the calls.
 */
#define CALL __attribute__((visibility("default"))) int

static unsigned long long last = 0x1000;

CALL cuInit(unsigned flags) { return (int)flags; }
CALL cuDriverGetVersion(int *version) { return *version = 12080, 0; }
/* As drivers may have it: what is given out is another function than the symbol. */
static int other_version(int *version) { return *version = 12081, 0; }
static int other_count(int *count) { return *count = 1, 0; }
CALL cuGetProcAddress_v2(const char *symbol, void **function, int version, unsigned long long flags, int *status) {
  (void)version, (void)flags, (void)status;
  *function = !strcmp(symbol, "cuDriverGetVersion") ? (void *)other_version : !strcmp(symbol, "cuDeviceGetCount") ? (void *)other_count : NULL;
  return *function ? 0 : 500;
}
CALL cuMemImportFromShareableHandle(unsigned long long *handle, void *from, int type) {
  (void)from, (void)type;
  *handle = last++;
  return 0;
}
CALL cuMulticastCreate(unsigned long long *handle, const void *properties) {
  (void)properties;
  *handle = last++;
  return 0;
}
CALL cuMemMap(unsigned long long address, unsigned long size, unsigned long offset, unsigned long long handle, unsigned long long flags) {
  (void)address, (void)size, (void)offset, (void)handle, (void)flags;
  return 0;
}
CALL cuMemUnmap(unsigned long long address, unsigned long size) { return (void)address, (void)size, 0; }
CALL cuMemRelease(unsigned long long handle) { return (void)handle, 0; }
