#pragma once
#include <napi.h>
#include <pthread.h>
#include <signal.h>

#include "support.h"

Napi::Value OpenApart(const Napi::CallbackInfo& info);
Napi::Value FlockApart(const Napi::CallbackInfo& info);
Napi::Value ReadApart(const Napi::CallbackInfo& info);
Napi::Value StatApart(const Napi::CallbackInfo& info);
Napi::Value FileSystemApart(const Napi::CallbackInfo& info);

// A call in a thread of its own, whose outcome a promise tells.
class Apart {
 public:
  explicit Apart(Napi::Env env)
      : deferred_(Napi::Promise::Deferred::New(env)),
        done_(Napi::ThreadSafeFunction::New(env, Napi::Function::New(env, [](const Napi::CallbackInfo&) {}), "cedana-apart", 1, 1)) {}
  virtual ~Apart() = default;

  // Owns itself from here on, and ends with the promise.
  Napi::Promise Start(Napi::Env env) {
    Napi::Promise promise = deferred_.Promise();
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    // It calls the kernel and little else. Memory is taken only for what is touched.
    pthread_attr_setstacksize(&attributes, 128 * 1024);
    // Signals are for the threads that expect them.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    int error = pthread_create(&thread, &attributes, Run, this);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    if (error != 0) {
      done_.Release();
      deferred_.Reject(SystemError(env, "pthread_create", error).Value());
      delete this;
    }
    return promise;
  }

 protected:
  virtual void Execute() = 0;
  virtual Napi::Value Result(Napi::Env env) = 0;

  void Fail(const char* syscall, int error) {
    failed_ = syscall;
    error_ = error;
  }

 private:
  static void* Run(void* self) {
    auto* job = static_cast<Apart*>(self);
    job->Execute();
    Napi::ThreadSafeFunction done = job->done_;
    if (done.BlockingCall(job, [](Napi::Env env, Napi::Function, Apart* job) { job->Settle(env); }) == napi_ok)
      done.Release();
    else
      delete job; // closing: the environment has gone, and nobody waits. That answer was our release
    return nullptr;
  }

  void Settle(Napi::Env env) {
    if (env != nullptr) {
      Napi::HandleScope scope(env);
      if (failed_)
        deferred_.Reject(SystemError(env, failed_, error_).Value());
      else
        deferred_.Resolve(Result(env));
    }
    delete this;
  }

  Napi::Promise::Deferred deferred_;
  Napi::ThreadSafeFunction done_;
  const char* failed_ = nullptr;
  int error_ = 0;
};
