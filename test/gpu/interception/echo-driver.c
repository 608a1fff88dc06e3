/*
 * A libcuda.so.1 that does nothing but say what it was called with: every name of the interface, to show that the interception library
 * hands each call on, whole. Built with names.h of addon/gpu. Results are never 0, so nothing is taken for made.
 */
#include <stdint.h>
#include <string.h>

#include "names.h"

#define ARGUMENTS 16
#define RESULT_BASE 10000

struct echo {
  int index;
  uint64_t integer[ARGUMENTS];
  double real[2];
};
struct echo echo_last;

#define PARAMETERS \
  uint64_t a0, uint64_t a1, uint64_t a2, uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8, uint64_t a9, \
      uint64_t a10, uint64_t a11, uint64_t a12, uint64_t a13, uint64_t a14, uint64_t a15, double x, double y
#define BODY(at) \
  { \
    echo_last = (struct echo){at, {a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15}, {x, y}}; \
    return RESULT_BASE + at; \
  }
#define DEFINE(name, at) \
  __attribute__((weak)) int name(PARAMETERS) BODY(at)
NAMES(DEFINE)

/* What no list has, and what has another address than any export. */
static int brand_new(PARAMETERS) BODY(7001)
static int other_alloc(PARAMETERS) BODY(7002)

void *echo_special(const char *name);
void *echo_special(const char *name) {
  if (!strcmp(name, "cuBrandNew")) return (void *)(uintptr_t)brand_new;
  if (!strcmp(name, "cuMemAllocHost")) return (void *)(uintptr_t)other_alloc;
  return 0;
}
