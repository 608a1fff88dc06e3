#pragma once
#include <napi.h>

Napi::Value Xxh128Create(const Napi::CallbackInfo& info);
Napi::Value Xxh128Update(const Napi::CallbackInfo& info);
Napi::Value Xxh128ReadSync(const Napi::CallbackInfo& info);
Napi::Value Xxh128Read(const Napi::CallbackInfo& info);
Napi::Value Xxh128Digest(const Napi::CallbackInfo& info);
Napi::Value Xxh128Files(const Napi::CallbackInfo& info);
