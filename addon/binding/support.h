#pragma once
// What every binding needs: errors that look like Node's own, and checked arguments.

#include <errno.h>
#include <napi.h>
#include <string.h>

#include <cmath>
#include <string>

// Name of an errno as Node spells it. glibc 2.32 has strerrorname_np; musl has not.
inline std::string ErrnoName(int error) {
#if defined(__GLIBC__) && (__GLIBC__ > 2 || (__GLIBC__ == 2 && __GLIBC_MINOR__ >= 32))
  if (const char* name = strerrorname_np(error)) return name;
#endif
  return "E" + std::to_string(error);
}

// As Node's errors from libuv: the number is negative.
inline Napi::Error SystemError(Napi::Env env, const char* syscall, int error) {
  std::string code = ErrnoName(error);
  Napi::Error result = Napi::Error::New(env, code + ": " + strerror(error) + ", " + syscall);
  result.Value().Set("errno", Napi::Number::New(env, -error));
  result.Value().Set("code", Napi::String::New(env, code));
  result.Value().Set("syscall", Napi::String::New(env, syscall));
  return result;
}

template <typename Call>
auto RetryOnEintr(Call call) {
  decltype(call()) result;
  do result = call();
  while (result == -1 && errno == EINTR);
  return result;
}

// An integer from `least` to INT_MAX; anything else is a mistake in our own code, so a TypeError names it.
inline int IntArgument(const Napi::CallbackInfo& info, size_t at, const char* name, int least = 0) {
  double value = at < info.Length() && info[at].IsNumber() ? info[at].As<Napi::Number>().DoubleValue() : NAN;
  if (!(value >= least && value <= 2147483647.0) || value != std::floor(value))
    throw Napi::TypeError::New(info.Env(), std::string(name) + " must be an integer of at least " + std::to_string(least));
  return static_cast<int>(value);
}

inline std::string PathArgument(const Napi::CallbackInfo& info, size_t at, const char* name) {
  if (at >= info.Length() || !info[at].IsString())
    throw Napi::TypeError::New(info.Env(), std::string(name) + " must be a string");
  std::string value = info[at].As<Napi::String>().Utf8Value();
  if (value.find('\0') != std::string::npos)
    throw Napi::TypeError::New(info.Env(), std::string(name) + " must not contain a NUL");
  return value;
}
