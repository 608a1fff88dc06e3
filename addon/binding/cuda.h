#pragma once
#include <napi.h>

Napi::Value CudaOpen(const Napi::CallbackInfo& info);
Napi::Value CudaInit(const Napi::CallbackInfo& info);
Napi::Value CudaDriverVersion(const Napi::CallbackInfo& info);
Napi::Value CudaErrorName(const Napi::CallbackInfo& info);
Napi::Value CudaDevices(const Napi::CallbackInfo& info);
Napi::Value CudaState(const Napi::CallbackInfo& info);
Napi::Value CudaRestoreThread(const Napi::CallbackInfo& info);
Napi::Value CudaLock(const Napi::CallbackInfo& info);
Napi::Value CudaCheckpoint(const Napi::CallbackInfo& info);
Napi::Value CudaRestore(const Napi::CallbackInfo& info);
Napi::Value CudaUnlock(const Napi::CallbackInfo& info);
Napi::Value NvmlQuery(const Napi::CallbackInfo& info);
