/* The echo driver's cuGetProcAddress, in both forms: the plain name gives the second version where there is one, flag 2 the _ptsz form. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

void *echo_special(const char *name);

int cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
  static void *self;
  if (!self) {
    Dl_info info;
    dladdr((void *)(uintptr_t)cuGetProcAddress_v2, &info);
    self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }
  char name[128];
  void *found = echo_special(symbol);
  static const char *const forms[] = {"_v2_ptsz", "_v2_ptds", "_ptsz", "_ptds", "_v2", ""};
  for (unsigned i = flags == 2 ? 0 : 4; !found && i < 6; i++) {
    snprintf(name, sizeof name, "%s%s", symbol, forms[i]);
    found = dlsym(self, name);
  }
  *function = found;
  if (status) *status = found ? 0 : 1;
  return !found || version < 1 ? 500 : 0;
}

int cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags) {
  if (!strcmp(symbol, "cuGetProcAddress") && version < 12000) {
    *function = (void *)(uintptr_t)cuGetProcAddress;
    return 0;
  }
  return cuGetProcAddress_v2(symbol, function, version, flags, 0);
}

int cuGetExportTable(const void **table, const void *id) {
  *table = id;
  return 0;
}
