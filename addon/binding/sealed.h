#pragma once

#include <napi.h>

Napi::Value SealedCopy(const Napi::CallbackInfo& info);
