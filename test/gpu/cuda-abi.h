/*
 * The part of NVIDIA's driver API (libcuda.so.1) that the stand-in driver and the test clients use, declared in own words: names,
 * numbers and sizes are the interface's, so that the same client binaries run on the stand-in and on a real driver.
 * Source: CUDA driver API reference, 13.0. `make -C test/gpu check-abi` compares it with a toolkit's cuda.h where there is one.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUlib_st *CUlibrary;
typedef struct CUkern_st *CUkernel;
typedef struct { char bytes[16]; } CUuuid;
typedef unsigned long long CUmemGenericAllocationHandle;
typedef void (*CUhostFn)(void *);

enum {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_INVALID_VALUE = 1,
  CUDA_ERROR_OUT_OF_MEMORY = 2,
  CUDA_ERROR_NOT_INITIALIZED = 3,
  CUDA_ERROR_DEVICE_UNAVAILABLE = 46,
  CUDA_ERROR_NO_DEVICE = 100,
  CUDA_ERROR_INVALID_DEVICE = 101,
  CUDA_ERROR_INVALID_IMAGE = 200,
  CUDA_ERROR_INVALID_CONTEXT = 201,
  CUDA_ERROR_INVALID_HANDLE = 400,
  CUDA_ERROR_ILLEGAL_STATE = 401,
  CUDA_ERROR_NOT_FOUND = 500,
  CUDA_ERROR_NOT_READY = 600,
  CUDA_ERROR_NOT_SUPPORTED = 801,
  CUDA_ERROR_UNKNOWN = 999,
};

typedef enum {
  CU_PROCESS_STATE_RUNNING = 0,
  CU_PROCESS_STATE_LOCKED = 1,
  CU_PROCESS_STATE_CHECKPOINTED = 2,
  CU_PROCESS_STATE_FAILED = 3,
} CUprocessState;

/* Each 64 bytes; what isn't named is zero. */
typedef struct { unsigned timeoutMs; unsigned reserved0; uint64_t reserved1[7]; } CUcheckpointLockArgs;
typedef struct { uint64_t reserved[8]; } CUcheckpointCheckpointArgs;
typedef struct { uint64_t reserved[8]; } CUcheckpointUnlockArgs;
typedef struct { CUuuid oldUuid, newUuid; } CUcheckpointGpuPair;
typedef struct { CUcheckpointGpuPair *gpuPairs; unsigned gpuPairsCount; char reserved[52]; } CUcheckpointRestoreArgs;

typedef struct {
  unsigned gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes;
  CUstream hStream;
  void *attrs;
  unsigned numAttrs;
} CUlaunchConfig;

typedef struct { unsigned type; int id; } CUmemLocation;
typedef struct {
  unsigned type, requestedHandleTypes;
  CUmemLocation location;
  void *win32HandleMetaData;
  struct { unsigned char compressionType, gpuDirectRDMACapable; unsigned short usage; unsigned char reserved[4]; } allocFlags;
} CUmemAllocationProp;
typedef struct { CUmemLocation location; unsigned flags; } CUmemAccessDesc;
typedef struct { char reserved[64]; } CUipcMemHandle;

#define CU_STREAM_LEGACY ((CUstream)0x1)
#define CU_STREAM_PER_THREAD ((CUstream)0x2)
#define CU_STREAM_NON_BLOCKING 1u
#define CU_LAUNCH_PARAM_END ((void *)0)
#define CU_LAUNCH_PARAM_BUFFER_POINTER ((void *)1)
#define CU_LAUNCH_PARAM_BUFFER_SIZE ((void *)2)

_Static_assert(sizeof(CUcheckpointLockArgs) == 64 && sizeof(CUcheckpointCheckpointArgs) == 64 && sizeof(CUcheckpointRestoreArgs) == 64 &&
                   sizeof(CUcheckpointUnlockArgs) == 64 && sizeof(CUcheckpointGpuPair) == 32,
               "the checkpoint calls' structs have fixed sizes");

/*
 * Every entry point that the clients call: name as in the documentation, symbol, the driver version that brought this form, parameters.
 */
#define CLIENT_CALLS(X) \
  X(cuInit, cuInit, 2000, (unsigned)) \
  X(cuDriverGetVersion, cuDriverGetVersion, 2020, (int *)) \
  X(cuDeviceGetCount, cuDeviceGetCount, 2000, (int *)) \
  X(cuDeviceGet, cuDeviceGet, 2000, (CUdevice *, int)) \
  X(cuDeviceGetUuid, cuDeviceGetUuid_v2, 11040, (CUuuid *, CUdevice)) \
  X(cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, 7000, (CUcontext *, CUdevice)) \
  X(cuCtxSetCurrent, cuCtxSetCurrent, 4000, (CUcontext)) \
  X(cuCtxSynchronize, cuCtxSynchronize, 2000, (void)) \
  X(cuMemAlloc, cuMemAlloc_v2, 3020, (CUdeviceptr *, size_t)) \
  X(cuMemFree, cuMemFree_v2, 3020, (CUdeviceptr)) \
  X(cuMemAllocManaged, cuMemAllocManaged, 6000, (CUdeviceptr *, size_t, unsigned)) \
  X(cuMemcpyHtoD, cuMemcpyHtoD_v2, 3020, (CUdeviceptr, const void *, size_t)) \
  X(cuMemcpyDtoH, cuMemcpyDtoH_v2, 3020, (void *, CUdeviceptr, size_t)) \
  X(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2, 3020, (CUdeviceptr, const void *, size_t, CUstream)) \
  X(cuIpcGetMemHandle, cuIpcGetMemHandle, 4010, (CUipcMemHandle *, CUdeviceptr)) \
  X(cuStreamCreate, cuStreamCreate, 2000, (CUstream *, unsigned)) \
  X(cuStreamSynchronize, cuStreamSynchronize, 2000, (CUstream)) \
  X(cuEventCreate, cuEventCreate, 2000, (CUevent *, unsigned)) \
  X(cuEventRecord, cuEventRecord, 2000, (CUevent, CUstream)) \
  X(cuEventSynchronize, cuEventSynchronize, 2000, (CUevent)) \
  X(cuModuleLoadData, cuModuleLoadData, 2000, (CUmodule *, const void *)) \
  X(cuModuleGetFunction, cuModuleGetFunction, 2000, (CUfunction *, CUmodule, const char *)) \
  X(cuModuleGetGlobal, cuModuleGetGlobal_v2, 3020, (CUdeviceptr *, size_t *, CUmodule, const char *)) \
  X(cuLaunchKernel, cuLaunchKernel, 4000, (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **, void **))
