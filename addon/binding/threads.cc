// Threads of another process, held by ptrace(2) one by one. The tracer is the thread that calls, which is the one that runs JavaScript; when
// it ends, the kernel lets go of all that it holds.

#include "threads.h"

#include <errno.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

#include "support.h"

namespace {

Napi::Value Trace(const Napi::CallbackInfo& info, int request, const char* name) {
  Napi::Env env = info.Env();
  int tid = IntArgument(info, 0, "tid", 1);
  if (ptrace(static_cast<__ptrace_request>(request), tid, nullptr, nullptr) == -1) throw SystemError(env, name, errno);
  return env.Undefined();
}

}  // namespace

// PTRACE_SEIZE: becomes the tracer without stopping it. Works on a frozen thread.
Napi::Value PtraceSeize(const Napi::CallbackInfo& info) { return Trace(info, PTRACE_SEIZE, "ptrace(SEIZE)"); }

// PTRACE_INTERRUPT: it stops as soon as it can, before it runs any of its own code.
Napi::Value PtraceInterrupt(const Napi::CallbackInfo& info) { return Trace(info, PTRACE_INTERRUPT, "ptrace(INTERRUPT)"); }

// PTRACE_DETACH: of a stopped thread; it goes on
Napi::Value PtraceDetach(const Napi::CallbackInfo& info) { return Trace(info, PTRACE_DETACH, "ptrace(DETACH)"); }

// waitpid(2) for one traced thread, without waiting: whether it has stopped. ESRCH when it has ended, which includes its exit status's reading.
Napi::Value WaitStopped(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int tid = IntArgument(info, 0, "tid", 1);
  int status = 0;
  pid_t found = RetryOnEintr([&] { return waitpid(tid, &status, __WALL | WNOHANG); });
  if (found == -1) throw SystemError(env, "waitpid", errno == ECHILD ? ESRCH : errno);
  if (found == tid && !WIFSTOPPED(status)) throw SystemError(env, "waitpid", ESRCH);
  return Napi::Boolean::New(env, found == tid);
}
