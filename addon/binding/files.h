#pragma once
// What the calls on files share, whether they return at once or have a thread of their own.

#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <string>

#include "support.h"
#include "unique-fd.h"

// openat2(2), asked for as (directory, path, flags, mode, resolve).
struct OpenRequest {
  int directory;
  std::string path;
  struct open_how how = {};

  OpenRequest(const Napi::CallbackInfo& info, int least_directory)
      : directory(IntArgument(info, 0, "directory", least_directory)), path(PathArgument(info, 1, "path")) {
    how.flags = static_cast<unsigned>(IntArgument(info, 2, "flags")) | O_CLOEXEC;
    how.mode = static_cast<unsigned>(IntArgument(info, 3, "mode"));
    how.resolve = static_cast<unsigned>(IntArgument(info, 4, "resolve"));
  }

  // EAGAIN: a rename raced with the kernel's check of the path; the man page asks for a retry. Not valid: errno.
  UniqueFd Open(int from) {
    UniqueFd fd;
    for (int attempt = 0; attempt < 16; attempt++) {
      fd = UniqueFd(static_cast<int>(syscall(SYS_openat2, from, path.c_str(), &how, sizeof(how))));
      if (fd.valid() || (errno != EAGAIN && errno != EINTR)) break;
    }
    return fd;
  }
};

inline int LockArgument(const Napi::CallbackInfo& info, size_t at) {
  int operation = IntArgument(info, at, "operation");
  if (operation != LOCK_SH && operation != LOCK_EX && operation != LOCK_UN)
    throw Napi::TypeError::New(info.Env(), "operation must be LOCK_SH, LOCK_EX or LOCK_UN");
  return operation;
}

// flock(2) without waiting for others. 1: it is had, 0: somebody else has it, -1: errno.
inline int TryLock(int fd, int operation) {
  if (RetryOnEintr([&] { return flock(fd, operation | LOCK_NB); }) == 0) return 1;
  return errno == EWOULDBLOCK ? 0 : -1;
}
