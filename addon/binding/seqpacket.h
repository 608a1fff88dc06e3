#pragma once
#include <napi.h>

Napi::Value SeqpacketPair(const Napi::CallbackInfo& info);
Napi::Value SeqpacketSend(const Napi::CallbackInfo& info);
Napi::Value SeqpacketReceive(const Napi::CallbackInfo& info);
Napi::Value WatchReadable(const Napi::CallbackInfo& info);
