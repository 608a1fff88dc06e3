#pragma once

#include <napi.h>

Napi::Value NetlinkDump(const Napi::CallbackInfo& info);
Napi::Value SocketOf(const Napi::CallbackInfo& info);
Napi::Value Kcmp(const Napi::CallbackInfo& info);
Napi::Value TryHandle(const Napi::CallbackInfo& info);
