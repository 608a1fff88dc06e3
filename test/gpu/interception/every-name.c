/*
 * Calls every name of the interface, found by dlsym and by cuGetProcAddress, and compares what the echo driver was called with. Prints
 * what differs, and "N calls" at the end.
 *   every-name DRIVER
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "names.h"

#define RESULT_BASE 10000
typedef int function(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                     uint64_t, uint64_t, uint64_t, uint64_t, double, double);

static struct echo {
  int index;
  uint64_t integer[16];
  double real[2];
} *last;
static const char *library;
static int calls;

static void check(const char *name, void *address, int index) {
  Dl_info info;
  if (!address || !dladdr(address, &info) || strcmp(info.dli_fname, library)) {
    printf("%s is not the library's\n", name);
    return;
  }
  uint64_t a[16];
  for (unsigned i = 0; i < 16; i++) a[i] = 0x1111111111111111ull * (i + 1) ^ ((uint64_t)calls << 32);
  function *call = (function *)(uintptr_t)address;
  int result = call(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], calls + 0.25, -calls - 0.5);
  if (result != RESULT_BASE + index) printf("%s returned %d instead of %d\n", name, result, RESULT_BASE + index);
  if (last->index != index) printf("%s called number %d instead of %d\n", name, last->index, index);
  if (memcmp(last->integer, a, sizeof a)) printf("%s changed an argument\n", name);
  if (last->real[0] != calls + 0.25 || last->real[1] != -calls - 0.5) printf("%s changed a floating-point argument\n", name);
  calls++;
}

static const struct {
  const char *name;
  int index;
} names[] = {
#define NAME(name, at) {#name, at},
    NAMES(NAME)
#undef NAME
};

static int index_of(const char *name) {
  for (unsigned i = 0; i < NAME_COUNT; i++)
    if (!strcmp(names[i].name, name)) return names[i].index;
  return -1;
}

int main(int argc, char **argv) {
  (void)argc;
  void *found = dlopen("libcuda.so.1", RTLD_NOW), *driver = dlopen(argv[1], RTLD_NOW);
  last = dlsym(driver, "echo_last");
  Dl_info info;
  if (!found || !last || !dladdr(dlsym(found, "cuInit"), &info)) {
    printf("not found: %s\n", dlerror());
    return 1;
  }
  library = info.dli_fname;
  if (!dlsym(found, "cedana_gpu_interception")) printf("%s is not the library\n", library);
  for (unsigned i = 0; i < NAME_COUNT; i++) {
    if (!strncmp(names[i].name, "cuGetProcAddress", 16) || !strcmp(names[i].name, "cuGetExportTable")) continue;
    check(names[i].name, dlsym(found, names[i].name), names[i].index);
  }
  printf("%d by dlsym\n", calls);
  int (*get1)(const char *, void **, int, uint64_t) = (int (*)(const char *, void **, int, uint64_t))(uintptr_t)dlsym(found, "cuGetProcAddress");
  int (*get2)(const char *, void **, int, uint64_t, int *) =
      (int (*)(const char *, void **, int, uint64_t, int *))(uintptr_t)dlsym(found, "cuGetProcAddress_v2");
  void *address;
  int status = 7;
#define GET(name, flags, index) \
  address = 0; \
  if (get2(name, &address, 12000, flags, &status) || status) printf("%s: not given\n", name); \
  else check(name, address, index); \
  address = 0; \
  if (get1(name, &address, 12000, flags)) printf("%s: not given by the first form\n", name); \
  else check(name, address, index);
  GET("cuInit", 0, index_of("cuInit"))
  GET("cuMemAlloc", 0, index_of("cuMemAlloc_v2"))
  GET("cuMemcpyHtoDAsync", 0, index_of("cuMemcpyHtoDAsync_v2"))
  GET("cuMemcpyHtoDAsync", 2, index_of("cuMemcpyHtoDAsync_v2_ptsz"))
  GET("cuMemcpy", 2, index_of("cuMemcpy_ptds"))
  GET("cuLaunchKernel", 2, index_of("cuLaunchKernel_ptsz"))
  GET("cuBrandNew", 0, 7001)     /* a name that no list has */
  GET("cuMemAllocHost", 0, 7002) /* an address that no export has */
  /* Asked for by its own name: the form of the version. */
  if (get2("cuGetProcAddress", &address, 12000, 0, &status) || address != (void *)(uintptr_t)get2) printf("cuGetProcAddress 12.0\n");
  if (get1("cuGetProcAddress", &address, 11030, 0) || address != (void *)(uintptr_t)get1) printf("cuGetProcAddress 11.3\n");
  if (get2("cuNothing", &address, 12000, 0, &status) != 500 || status != 1) printf("cuNothing is given\n");
  /* Private tables are the driver's own. */
  if (get2("cuGetExportTable", &address, 12000, 0, &status) || address != dlsym(driver, "cuGetExportTable")) printf("cuGetExportTable\n");
  const void *table = 0;
  int (*export_table)(const void **, const void *) = (int (*)(const void **, const void *))(uintptr_t)dlsym(found, "cuGetExportTable");
  if (export_table(&table, argv) || table != argv) printf("cuGetExportTable's table\n");
  printf("%d calls\n", calls);
  return 0;
}
