/*
 * A libcuda.so.1 that grants whatever is asked of memory that another process shares: imported, mapped, unmapped and released. Nothing is
 * there; what counts is what the interception library makes of the calls.
 */
#define CALL __attribute__((visibility("default"))) int

static unsigned long long last = 0x1000;

CALL cuInit(unsigned flags) { return (int)flags; }
CALL cuDriverGetVersion(int *version) { return *version = 12080, 0; }
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
