/*
 * Code: images are PTX text, of which the entries' parameters and the globals' first values are read. What a kernel does comes from a table
 * by its name; one that isn't in it can't be had.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "driver.h"

#define MAX_PARAMETERS 16

struct CUfunc_st {
  char name[64];
  int count;
  size_t offset[MAX_PARAMETERS], size[MAX_PARAMETERS], total;
  void (*run)(const unsigned char *parameters, unsigned threads);
  struct CUmod_st *module;
  struct CUfunc_st *next;
};
struct global {
  char name[64];
  CUdeviceptr address;
  size_t size;
  struct global *next;
};
struct CUmod_st {
  struct CUfunc_st *functions;
  struct global *globals;
};
struct CUlib_st {
  struct CUmod_st *module;
  char *image;
};

/* ---- what the kernels do; parameters are laid out as PTX does, each aligned to its size ---- */
static void run_increment(const unsigned char *p, unsigned threads) {
  uint64_t at;
  (void)threads;
  memcpy(&at, p, 8);
  ++*(volatile uint32_t *)at;
}
static void run_fill(const unsigned char *p, unsigned threads) {
  uint64_t at;
  uint32_t value, count;
  memcpy(&at, p, 8);
  memcpy(&value, p + 8, 4);
  memcpy(&count, p + 12, 4);
  for (uint32_t i = 0; i < count && i < threads; i++) ((volatile uint32_t *)at)[i] = value;
}
static void run_saxpy(const unsigned char *p, unsigned threads) {
  uint64_t x, y;
  float a;
  uint32_t count;
  memcpy(&x, p, 8);
  memcpy(&y, p + 8, 8);
  memcpy(&a, p + 16, 4);
  memcpy(&count, p + 20, 4);
  for (uint32_t i = 0; i < count && i < threads; i++) ((float *)y)[i] += a * ((float *)x)[i];
}
static void run_spin(const unsigned char *p, unsigned threads) {
  uint32_t ms;
  (void)threads;
  memcpy(&ms, p, 4);
  struct timespec now, until;
  clock_gettime(CLOCK_MONOTONIC, &until);
  until.tv_sec += ms / 1000;
  until.tv_nsec += (long)(ms % 1000) * 1000000;
  for (;;) {
    clock_gettime(CLOCK_MONOTONIC, &now);
    long left = (until.tv_sec - now.tv_sec) * 1000 + (until.tv_nsec - now.tv_nsec) / 1000000;
    if (left <= 0) return;
    nanosleep(&(struct timespec){0, 1000000}, NULL);
  }
}
static const struct {
  const char *name;
  void (*run)(const unsigned char *, unsigned);
  size_t parameters;
} kernels[] = {{"increment", run_increment, 8}, {"fill", run_fill, 16}, {"saxpy", run_saxpy, 24}, {"spin", run_spin, 4}};

/* ---- PTX ---- */
static size_t type_size(const char *type) {
  size_t bits = strtoul(type + 2, NULL, 10); /* .u32 */
  return bits / 8;
}
static const char *word(const char *at, char *to, size_t size) {
  while (isspace((unsigned char)*at)) at++;
  size_t n = 0;
  while (*at && !isspace((unsigned char)*at) && !strchr(",()[];={}", *at)) {
    if (n + 1 < size) to[n++] = *at;
    at++;
  }
  to[n] = 0;
  return at;
}

static struct CUfunc_st *parse_entry(const char *at, struct CUmod_st *module) {
  struct CUfunc_st *f = calloc(1, sizeof *f);
  if (!f) return NULL;
  f->module = module;
  at = word(at, f->name, sizeof f->name);
  const char *end = strchr(at, ')'), *open = strchr(at, '('), *body = strchr(at, '{');
  if (open && end && (!body || open < body))
    while ((at = strstr(at, ".param")) && at < end && f->count < MAX_PARAMETERS) {
      char type[32];
      at = word(at + 6, type, sizeof type);
      size_t size = type_size(type);
      f->total = (f->total + size - 1) & ~(size - 1);
      f->offset[f->count] = f->total;
      f->size[f->count++] = size;
      f->total += size;
    }
  return f;
}

static CUresult parse_global(const char *at, CUcontext context, struct CUmod_st *module) {
  struct global *g = calloc(1, sizeof *g);
  char type[32];
  if (!g) return CUDA_ERROR_OUT_OF_MEMORY;
  do at = word(at, type, sizeof type);
  while (!strcmp(type, ".align") || !strcmp(type, ".visible") || isdigit((unsigned char)*type));
  at = word(at, g->name, sizeof g->name);
  size_t width = type_size(type), count = 1;
  if (*at == '[') {
    count = strtoul(at + 1, NULL, 10);
    at = strchr(at, ']') + 1;
  }
  g->size = width * count;
  CUresult result = memory_allocate(context, g->size, KIND_DEVICE, &g->address);
  if (result) {
    free(g);
    return result;
  }
  while (isspace((unsigned char)*at)) at++;
  if (*at == '=') {
    at++;
    for (size_t i = 0; i < count && *at && *at != ';'; i++) {
      while (isspace((unsigned char)*at) || *at == '{' || *at == ',') at++;
      char *end;
      unsigned long long value = strtoull(at, &end, 0);
      if (end == at) break;
      memcpy((char *)g->address + i * width, &value, width);
      at = end;
    }
  }
  g->next = module->globals;
  module->globals = g;
  return CUDA_SUCCESS;
}

static CUresult load(struct CUmod_st **module, const void *image) {
  CUcontext context;
  TRY(current_context(&context));
  if (!module || !image) return CUDA_ERROR_INVALID_VALUE;
  const char *text = image;
  if (!strstr(text, ".version")) return CUDA_ERROR_INVALID_IMAGE;
  struct CUmod_st *m = calloc(1, sizeof *m);
  if (!m) return CUDA_ERROR_OUT_OF_MEMORY;
  for (const char *at = text; (at = strstr(at, ".entry ")); at++) {
    struct CUfunc_st *f = parse_entry(at + 7, m);
    if (!f) return CUDA_ERROR_OUT_OF_MEMORY;
    f->next = m->functions;
    m->functions = f;
  }
  for (const char *at = text; (at = strstr(at, ".global ")); at++) {
    const char *line = at;
    while (line > text && line[-1] != '\n') line--;
    /* A declaration, not the state space of an instruction (ld.global.u32 has no blank behind it). */
    TRY(parse_global(at + 8, context, m));
  }
  *module = m;
  return CUDA_SUCCESS;
}

API(cuModuleLoadData, (CUmodule * module, const void *image), (module, image)) { return load(module, image); }
API(cuModuleLoadDataEx, (CUmodule * module, const void *image, unsigned count, int *options, void **values),
    (module, image, count, options, values)) {
  (void)count, (void)options, (void)values;
  return load(module, image);
}
API(cuModuleLoadFatBinary, (CUmodule * module, const void *image), (module, image)) {
  (void)module, (void)image;
  return CUDA_ERROR_INVALID_IMAGE; /* code for real processors */
}
API(cuModuleUnload, (CUmodule module), (module)) {
  if (!module) return CUDA_ERROR_INVALID_HANDLE;
  TRY(streams_drain(NULL));
  for (struct global *g = module->globals; g; g = g->next) memory_free(g->address);
  module->globals = NULL;
  module->functions = NULL;
  return CUDA_SUCCESS;
}
static CUresult find_function(CUfunction *function, CUmodule module, const char *name) {
  if (!function || !module || !name) return CUDA_ERROR_INVALID_VALUE;
  for (struct CUfunc_st *f = module->functions; f; f = f->next) {
    if (strcmp(f->name, name)) continue;
    for (size_t k = 0; k < sizeof kernels / sizeof *kernels; k++)
      if (!strcmp(kernels[k].name, name) && kernels[k].parameters == f->total) {
        f->run = kernels[k].run;
        *function = f;
        return CUDA_SUCCESS;
      }
  }
  return CUDA_ERROR_NOT_FOUND;
}
static CUresult find_global(CUdeviceptr *address, size_t *size, CUmodule module, const char *name) {
  if (!module || !name) return CUDA_ERROR_INVALID_VALUE;
  for (struct global *g = module->globals; g; g = g->next)
    if (!strcmp(g->name, name)) {
      if (address) *address = g->address;
      if (size) *size = g->size;
      return CUDA_SUCCESS;
    }
  return CUDA_ERROR_NOT_FOUND;
}
API(cuModuleGetFunction, (CUfunction * function, CUmodule module, const char *name), (function, module, name)) {
  return find_function(function, module, name);
}
API(cuModuleGetGlobal_v2, (CUdeviceptr * address, size_t *size, CUmodule module, const char *name), (address, size, module, name)) {
  return find_global(address, size, module, name);
}
API(cuLibraryLoadData,
    (CUlibrary * library, const void *code, int *options, void **values, unsigned count, int *libraryOptions, void **libraryValues,
     unsigned libraryCount),
    (library, code, options, values, count, libraryOptions, libraryValues, libraryCount)) {
  (void)options, (void)values, (void)count, (void)libraryOptions, (void)libraryValues, (void)libraryCount;
  if (!library || !code) return CUDA_ERROR_INVALID_VALUE;
  struct CUlib_st *made = calloc(1, sizeof *made);
  if (!made) return CUDA_ERROR_OUT_OF_MEMORY;
  CUresult result = load(&made->module, code);
  if (result) free(made);
  else *library = made;
  return result;
}
API(cuLibraryGetKernel, (CUkernel * kernel, CUlibrary library, const char *name), (kernel, library, name)) {
  return library ? find_function((CUfunction *)kernel, library->module, name) : CUDA_ERROR_INVALID_HANDLE;
}
API(cuLibraryGetModule, (CUmodule * module, CUlibrary library), (module, library)) {
  if (!module || !library) return CUDA_ERROR_INVALID_VALUE;
  *module = library->module;
  return CUDA_SUCCESS;
}
API(cuLibraryGetGlobal, (CUdeviceptr * address, size_t *size, CUlibrary library, const char *name), (address, size, library, name)) {
  return library ? find_global(address, size, library->module, name) : CUDA_ERROR_INVALID_HANDLE;
}
API(cuLibraryUnload, (CUlibrary library), (library)) {
  return library ? do_cuModuleUnload(library->module) : CUDA_ERROR_INVALID_HANDLE;
}
API(cuKernelGetFunction, (CUfunction * function, CUkernel kernel), (function, kernel)) {
  if (!function || !kernel) return CUDA_ERROR_INVALID_VALUE;
  *function = (CUfunction)kernel; /* the same thing here */
  return CUDA_SUCCESS;
}
API(cuFuncGetParamInfo, (CUfunction function, size_t index, size_t *offset, size_t *size), (function, index, offset, size)) {
  if (!function || !offset || index >= (size_t)function->count) return CUDA_ERROR_INVALID_VALUE;
  *offset = function->offset[index];
  if (size) *size = function->size[index];
  return CUDA_SUCCESS;
}

struct launch {
  CUfunction function;
  unsigned threads;
  unsigned char parameters[MAX_PARAMETERS * 8];
};
static void run_launch(void *argument) {
  struct launch *launch = argument;
  launch->function->run(launch->parameters, launch->threads);
}
static CUresult launch_on(CUstream given, CUfunction function, unsigned threads, void **parameters, void **extra) {
  struct CUstream_st *stream;
  TRY(stream_resolve(given, &stream));
  if (!function || !function->run) return CUDA_ERROR_INVALID_HANDLE;
  struct launch *launch = calloc(1, sizeof *launch);
  if (!launch) return CUDA_ERROR_OUT_OF_MEMORY;
  launch->function = function;
  launch->threads = threads;
  if (parameters)
    for (int i = 0; i < function->count; i++) memcpy(launch->parameters + function->offset[i], parameters[i], function->size[i]);
  else if (extra) {
    const void *buffer = NULL;
    size_t size = 0;
    for (; *extra != CU_LAUNCH_PARAM_END; extra += 2) {
      if (*extra == CU_LAUNCH_PARAM_BUFFER_POINTER) buffer = extra[1];
      if (*extra == CU_LAUNCH_PARAM_BUFFER_SIZE) size = *(size_t *)extra[1];
    }
    if (!buffer || size < function->total) {
      free(launch);
      return CUDA_ERROR_INVALID_VALUE;
    }
    memcpy(launch->parameters, buffer, function->total);
  } else if (function->count) {
    free(launch);
    return CUDA_ERROR_INVALID_VALUE;
  }
  /* An address that isn't on the GPU would be an illegal access there. */
  uint64_t first;
  memcpy(&first, launch->parameters, 8);
  if (function->count && function->size[0] == 8 && !memory_contains(first, 1, NULL)) {
    free(launch);
    return CUDA_ERROR_INVALID_VALUE;
  }
  return stream_push(stream, run_launch, launch);
}
API_STREAM(cuLaunchKernel, _ptsz,
           (CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, CUstream stream,
            void **parameters, void **extra),
           (f, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra)) {
  (void)shared;
  if (!gx || !gy || !gz || !bx || !by || !bz || bx * by * bz > 1024) return CUDA_ERROR_INVALID_VALUE;
  return launch_on(stream, f, gx * gy * gz * bx * by * bz, parameters, extra);
}
API_STREAM(cuLaunchKernelEx, _ptsz, (const CUlaunchConfig *config, CUfunction f, void **parameters, void **extra),
           (config, f, parameters, extra)) {
  if (!config) return CUDA_ERROR_INVALID_VALUE;
  return do_cuLaunchKernel(f, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY,
                           config->blockDimZ, config->sharedMemBytes, config->hStream, parameters, extra);
}
