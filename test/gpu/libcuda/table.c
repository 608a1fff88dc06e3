/* The names under which cuGetProcAddress gives the entry points, and from which version of the caller on each form. */
#define _GNU_SOURCE
#include <string.h>
#include "driver.h"

#define PLAIN(X) \
  X(cuInit, cuInit, 2000) X(cuDriverGetVersion, cuDriverGetVersion, 2020) X(cuGetErrorName, cuGetErrorName, 6000) \
  X(cuGetErrorString, cuGetErrorString, 6000) X(cuGetExportTable, cuGetExportTable, 3000) \
  X(cuGetProcAddress, cuGetProcAddress, 11030) X(cuGetProcAddress, cuGetProcAddress_v2, 12000) \
  X(cuDeviceGetCount, cuDeviceGetCount, 2000) X(cuDeviceGet, cuDeviceGet, 2000) X(cuDeviceGetName, cuDeviceGetName, 2000) \
  X(cuDeviceTotalMem, cuDeviceTotalMem_v2, 3020) X(cuDeviceGetAttribute, cuDeviceGetAttribute, 2000) \
  X(cuDeviceGetUuid, cuDeviceGetUuid, 9020) X(cuDeviceGetUuid, cuDeviceGetUuid_v2, 11040) X(cuDeviceGetPCIBusId, cuDeviceGetPCIBusId, 4010) \
  X(cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, 7000) X(cuDevicePrimaryCtxRelease, cuDevicePrimaryCtxRelease_v2, 11000) \
  X(cuDevicePrimaryCtxGetState, cuDevicePrimaryCtxGetState, 7000) X(cuDevicePrimaryCtxSetFlags, cuDevicePrimaryCtxSetFlags_v2, 11000) \
  X(cuDevicePrimaryCtxReset, cuDevicePrimaryCtxReset_v2, 11000) X(cuCtxCreate, cuCtxCreate_v2, 3020) X(cuCtxDestroy, cuCtxDestroy_v2, 4000) \
  X(cuCtxSetCurrent, cuCtxSetCurrent, 4000) X(cuCtxGetCurrent, cuCtxGetCurrent, 4000) X(cuCtxPushCurrent, cuCtxPushCurrent_v2, 4000) \
  X(cuCtxPopCurrent, cuCtxPopCurrent_v2, 4000) X(cuCtxGetDevice, cuCtxGetDevice, 2000) X(cuCtxSynchronize, cuCtxSynchronize, 2000) \
  X(cuMemAlloc, cuMemAlloc_v2, 3020) X(cuMemFree, cuMemFree_v2, 3020) X(cuMemAllocPitch, cuMemAllocPitch_v2, 3020) \
  X(cuMemGetInfo, cuMemGetInfo_v2, 3020) X(cuMemGetAddressRange, cuMemGetAddressRange_v2, 3020) X(cuMemHostAlloc, cuMemHostAlloc, 2020) \
  X(cuMemFreeHost, cuMemFreeHost, 2000) X(cuMemAllocManaged, cuMemAllocManaged, 6000) X(cuPointerGetAttribute, cuPointerGetAttribute, 4000) \
  X(cuIpcGetMemHandle, cuIpcGetMemHandle, 4010) X(cuMemGetAllocationGranularity, cuMemGetAllocationGranularity, 10020) \
  X(cuMemAddressReserve, cuMemAddressReserve, 10020) X(cuMemAddressFree, cuMemAddressFree, 10020) X(cuMemCreate, cuMemCreate, 10020) \
  X(cuMemMap, cuMemMap, 10020) X(cuMemSetAccess, cuMemSetAccess, 10020) X(cuMemUnmap, cuMemUnmap, 10020) X(cuMemRelease, cuMemRelease, 10020) \
  X(cuStreamCreate, cuStreamCreate, 2000) X(cuStreamCreateWithPriority, cuStreamCreateWithPriority, 5050) \
  X(cuStreamDestroy, cuStreamDestroy_v2, 4000) X(cuEventCreate, cuEventCreate, 2000) X(cuEventDestroy, cuEventDestroy_v2, 4000) \
  X(cuEventSynchronize, cuEventSynchronize, 2000) X(cuEventQuery, cuEventQuery, 2000) X(cuEventElapsedTime, cuEventElapsedTime, 2000) \
  X(cuEventElapsedTime, cuEventElapsedTime_v2, 12080) X(cuModuleLoadData, cuModuleLoadData, 2000) \
  X(cuModuleLoadDataEx, cuModuleLoadDataEx, 2010) X(cuModuleLoadFatBinary, cuModuleLoadFatBinary, 2000) X(cuModuleUnload, cuModuleUnload, 2000) \
  X(cuModuleGetFunction, cuModuleGetFunction, 2000) X(cuModuleGetGlobal, cuModuleGetGlobal_v2, 3020) \
  X(cuLibraryLoadData, cuLibraryLoadData, 12000) X(cuLibraryGetKernel, cuLibraryGetKernel, 12000) \
  X(cuLibraryGetModule, cuLibraryGetModule, 12000) X(cuLibraryGetGlobal, cuLibraryGetGlobal, 12000) X(cuLibraryUnload, cuLibraryUnload, 12000) \
  X(cuKernelGetFunction, cuKernelGetFunction, 12000) X(cuFuncGetParamInfo, cuFuncGetParamInfo, 12040)

#define CHECKPOINT(X) \
  X(cuCheckpointProcessGetState, cuCheckpointProcessGetState, 12080) \
  X(cuCheckpointProcessGetRestoreThreadId, cuCheckpointProcessGetRestoreThreadId, 12080) \
  X(cuCheckpointProcessLock, cuCheckpointProcessLock, 12080) X(cuCheckpointProcessCheckpoint, cuCheckpointProcessCheckpoint, 12080) \
  X(cuCheckpointProcessRestore, cuCheckpointProcessRestore, 12080) X(cuCheckpointProcessUnlock, cuCheckpointProcessUnlock, 12080)

/* With a form for the thread's own default stream, which came with 7.0. */
#define STREAMED(X) \
  X(cuMemcpy, cuMemcpy, 4000, _ptds) X(cuMemcpyHtoD, cuMemcpyHtoD_v2, 3020, _ptds) X(cuMemcpyDtoH, cuMemcpyDtoH_v2, 3020, _ptds) \
  X(cuMemcpyDtoD, cuMemcpyDtoD_v2, 3020, _ptds) X(cuMemsetD8, cuMemsetD8_v2, 3020, _ptds) X(cuMemsetD32, cuMemsetD32_v2, 3020, _ptds) \
  X(cuMemcpyAsync, cuMemcpyAsync, 4000, _ptsz) X(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2, 3020, _ptsz) \
  X(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, 3020, _ptsz) X(cuMemcpyDtoDAsync, cuMemcpyDtoDAsync_v2, 3020, _ptsz) \
  X(cuMemsetD8Async, cuMemsetD8Async, 3020, _ptsz) X(cuMemsetD32Async, cuMemsetD32Async, 3020, _ptsz) \
  X(cuMemAllocAsync, cuMemAllocAsync, 11020, _ptsz) X(cuMemFreeAsync, cuMemFreeAsync, 11020, _ptsz) \
  X(cuStreamSynchronize, cuStreamSynchronize, 2000, _ptsz) X(cuStreamQuery, cuStreamQuery, 2000, _ptsz) \
  X(cuStreamWaitEvent, cuStreamWaitEvent, 3020, _ptsz) X(cuLaunchHostFunc, cuLaunchHostFunc, 10000, _ptsz) \
  X(cuEventRecord, cuEventRecord, 2000, _ptsz) X(cuLaunchKernel, cuLaunchKernel, 4000, _ptsz) X(cuLaunchKernelEx, cuLaunchKernelEx, 11060, _ptsz)

/* Only passed on, so their types don't matter here: each is declared as an array of bytes at its address. */
#define DECLARE(name, symbol, version) extern const char address_##symbol[] __asm__(#symbol);
#define DECLARE_STREAMED(name, symbol, version, suffix) \
  DECLARE(name, symbol, version) extern const char address_##symbol##suffix[] __asm__(#symbol #suffix);
PLAIN(DECLARE)
CHECKPOINT(DECLARE)
STREAMED(DECLARE_STREAMED)

struct entry {
  const char *name;
  const char *function;
  const char *per_thread;
  int version;
};
#define ROW(name, symbol, version) {#name, address_##symbol, NULL, version},
#define ROW_STREAMED(name, symbol, version, suffix) {#name, address_##symbol, address_##symbol##suffix, version},
static const struct entry table[] = {PLAIN(ROW) STREAMED(ROW_STREAMED)
#ifndef WITHOUT_CHECKPOINT_API
                                         CHECKPOINT(ROW)
#endif
};

/* The newest form that the caller's version knows. */
void *table_find(const char *name, int version, bool per_thread) {
  const struct entry *best = NULL;
  for (size_t i = 0; i < sizeof table / sizeof *table; i++)
    if (!strcmp(table[i].name, name) && table[i].version <= version && (!best || table[i].version > best->version)) best = &table[i];
  if (!best) return NULL;
  return (void *)(per_thread && best->per_thread && version >= 7000 ? best->per_thread : best->function);
}

static bool known(const char *name) {
  for (size_t i = 0; i < sizeof table / sizeof *table; i++)
    if (!strcmp(table[i].name, name)) return true;
  return false;
}

/* status: 0 found, 1 not known, 2 the caller's version is too low */
EXPORT CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
  if (!name || !function || flags > 2) return CUDA_ERROR_INVALID_VALUE;
  *function = version <= driver_version() ? table_find(name, version, flags == 2) : NULL;
  if (status) *status = *function ? 0 : known(name) ? 2 : 1;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
EXPORT CUresult cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
