/* Prints the numbers and sizes of the interface, from our header or, with -DTOOLKIT, from a toolkit's. `make check-abi` compares. */
#include <stddef.h>
#include <stdio.h>
#ifdef TOOLKIT
#include <cuda.h>
#else
#include "../cuda-abi.h"
#endif
#define NUMBER(name) printf(#name " %d\n", (int)name);
#define SIZE(type) printf("sizeof " #type " %zu\n", sizeof(type));
#define OFFSET(type, member) printf("offset " #type "." #member " %zu\n", offsetof(type, member));
int main(void) {
  NUMBER(CUDA_ERROR_INVALID_VALUE) NUMBER(CUDA_ERROR_OUT_OF_MEMORY) NUMBER(CUDA_ERROR_NOT_INITIALIZED)
  NUMBER(CUDA_ERROR_DEVICE_UNAVAILABLE) NUMBER(CUDA_ERROR_NO_DEVICE) NUMBER(CUDA_ERROR_INVALID_DEVICE) NUMBER(CUDA_ERROR_INVALID_IMAGE)
  NUMBER(CUDA_ERROR_INVALID_CONTEXT) NUMBER(CUDA_ERROR_INVALID_HANDLE) NUMBER(CUDA_ERROR_ILLEGAL_STATE) NUMBER(CUDA_ERROR_NOT_FOUND)
  NUMBER(CUDA_ERROR_NOT_READY) NUMBER(CUDA_ERROR_NOT_SUPPORTED) NUMBER(CUDA_ERROR_UNKNOWN)
  NUMBER(CU_PROCESS_STATE_RUNNING) NUMBER(CU_PROCESS_STATE_LOCKED) NUMBER(CU_PROCESS_STATE_CHECKPOINTED) NUMBER(CU_PROCESS_STATE_FAILED)
  NUMBER(CU_STREAM_NON_BLOCKING)
  SIZE(CUdeviceptr) SIZE(CUuuid) SIZE(CUcheckpointLockArgs) SIZE(CUcheckpointCheckpointArgs) SIZE(CUcheckpointUnlockArgs)
  SIZE(CUcheckpointGpuPair) SIZE(CUcheckpointRestoreArgs) SIZE(CUlaunchConfig) SIZE(CUmemLocation) SIZE(CUmemAllocationProp)
  SIZE(CUmemAccessDesc) SIZE(CUipcMemHandle)
  OFFSET(CUcheckpointLockArgs, timeoutMs) OFFSET(CUcheckpointGpuPair, newUuid) OFFSET(CUcheckpointRestoreArgs, gpuPairs)
  OFFSET(CUcheckpointRestoreArgs, gpuPairsCount) OFFSET(CUlaunchConfig, hStream) OFFSET(CUmemAllocationProp, location)
  return 0;
}
