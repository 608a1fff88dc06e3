#pragma once
#include <napi.h>

Napi::Value PtraceSeize(const Napi::CallbackInfo& info);
Napi::Value PtraceInterrupt(const Napi::CallbackInfo& info);
Napi::Value PtraceDetach(const Napi::CallbackInfo& info);
Napi::Value WaitStopped(const Napi::CallbackInfo& info);
