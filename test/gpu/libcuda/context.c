#define _GNU_SOURCE
#include <stdlib.h>
#include "driver.h"

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static CUcontext contexts;
static CUcontext primary[MAX_DEVICES];

#define STACK 16
static __thread CUcontext stack[STACK];
static __thread int depth;

static CUcontext make(int device, unsigned flags) {
  CUcontext context = calloc(1, sizeof *context);
  if (!context) return NULL;
  context->device = device;
  context->flags = flags;
  context->null_stream = stream_new(context, 0);
  if (!context->null_stream) {
    free(context);
    return NULL;
  }
  pthread_mutex_lock(&mutex);
  device_hold(); /* who makes no context, but controls others, holds none */
  context->next = contexts;
  contexts = context;
  pthread_mutex_unlock(&mutex);
  return context;
}

static bool is_context(CUcontext wanted) {
  bool found = false;
  pthread_mutex_lock(&mutex);
  for (CUcontext c = contexts; c; c = c->next) found |= c == wanted;
  pthread_mutex_unlock(&mutex);
  return found;
}

CUresult current_context(CUcontext *context) {
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
  if (depth == 0 || !stack[depth - 1]) return CUDA_ERROR_INVALID_CONTEXT;
  *context = stack[depth - 1];
  return CUDA_SUCCESS;
}

static CUresult check_device(int device) {
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
  return device < 0 || device >= devices.count ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

API(cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device), (context, device)) {
  TRY(check_device(device));
  if (!context) return CUDA_ERROR_INVALID_VALUE;
  static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;
  pthread_mutex_lock(&making);
  if (!primary[device]) primary[device] = make(device, 0);
  if (primary[device]) primary[device]->retained++;
  *context = primary[device];
  pthread_mutex_unlock(&making);
  return *context ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
API(cuDevicePrimaryCtxRelease_v2, (CUdevice device), (device)) {
  TRY(check_device(device));
  if (!primary[device] || primary[device]->retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
  primary[device]->retained--;
  return CUDA_SUCCESS;
}
API(cuDevicePrimaryCtxGetState, (CUdevice device, unsigned *flags, int *active), (device, flags, active)) {
  TRY(check_device(device));
  if (flags) *flags = primary[device] ? primary[device]->flags : 0;
  if (active) *active = primary[device] && primary[device]->retained > 0;
  return CUDA_SUCCESS;
}
API(cuDevicePrimaryCtxSetFlags_v2, (CUdevice device, unsigned flags), (device, flags)) {
  TRY(check_device(device));
  if (primary[device]) primary[device]->flags = flags;
  return CUDA_SUCCESS;
}
API(cuDevicePrimaryCtxReset_v2, (CUdevice device), (device)) {
  TRY(check_device(device));
  if (primary[device]) primary[device]->retained = 0;
  return CUDA_SUCCESS;
}
API(cuCtxCreate_v2, (CUcontext * context, unsigned flags, CUdevice device), (context, flags, device)) {
  TRY(check_device(device));
  if (!context) return CUDA_ERROR_INVALID_VALUE;
  if (depth == STACK || !(*context = make(device, flags))) return CUDA_ERROR_OUT_OF_MEMORY;
  stack[depth++] = *context;
  return CUDA_SUCCESS;
}
API(cuCtxDestroy_v2, (CUcontext context), (context)) {
  if (!is_context(context)) return CUDA_ERROR_INVALID_CONTEXT;
  TRY(streams_drain(context));
  pthread_mutex_lock(&mutex);
  for (CUcontext *at = &contexts; *at; at = &(*at)->next)
    if (*at == context) {
      *at = context->next;
      break;
    }
  pthread_mutex_unlock(&mutex);
  if (depth > 0 && stack[depth - 1] == context) depth--;
  return CUDA_SUCCESS;
}
API(cuCtxSetCurrent, (CUcontext context), (context)) {
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
  if (context && !is_context(context)) return CUDA_ERROR_INVALID_CONTEXT;
  if (depth == 0) depth = 1;
  stack[depth - 1] = context;
  if (!context) depth--;
  return CUDA_SUCCESS;
}
API(cuCtxGetCurrent, (CUcontext * context), (context)) {
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
  if (!context) return CUDA_ERROR_INVALID_VALUE;
  *context = depth > 0 ? stack[depth - 1] : NULL;
  return CUDA_SUCCESS;
}
API(cuCtxPushCurrent_v2, (CUcontext context), (context)) {
  if (!is_context(context)) return CUDA_ERROR_INVALID_CONTEXT;
  if (depth == STACK) return CUDA_ERROR_OUT_OF_MEMORY;
  stack[depth++] = context;
  return CUDA_SUCCESS;
}
API(cuCtxPopCurrent_v2, (CUcontext * context), (context)) {
  if (depth == 0) return CUDA_ERROR_INVALID_CONTEXT;
  depth--;
  if (context) *context = stack[depth];
  return CUDA_SUCCESS;
}
API(cuCtxGetDevice, (CUdevice * device), (device)) {
  CUcontext context;
  TRY(current_context(&context));
  if (!device) return CUDA_ERROR_INVALID_VALUE;
  *device = context->device;
  return CUDA_SUCCESS;
}
API(cuCtxSynchronize, (void), ()) {
  CUcontext context;
  TRY(current_context(&context));
  return streams_drain(context);
}
