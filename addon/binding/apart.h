#pragma once
#include <napi.h>

Napi::Value OpenApart(const Napi::CallbackInfo& info);
Napi::Value ReadApart(const Napi::CallbackInfo& info);
Napi::Value StatApart(const Napi::CallbackInfo& info);
Napi::Value FileSystemApart(const Napi::CallbackInfo& info);
