// File operations that may never come back, each in a thread of its own: where the server behind a file system is gone (NFS) or doesn't mean to
// answer (FUSE, which any container may have), the thread stays in the kernel. In libuv's pool, four of them would stop every file operation
// of the process.

#include "apart.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "files.h"
#include "support.h"
#include "unique-fd.h"

namespace {

class Open : public Apart {
 public:
  Open(Napi::Env env, UniqueFd directory, OpenRequest request)
      : Apart(env), directory_(std::move(directory)), request_(std::move(request)) {}

 private:
  void Execute() override {
    fd_ = request_.Open(directory_.valid() ? directory_.get() : AT_FDCWD);
    if (!fd_.valid()) Fail("openat2", errno);
  }
  Napi::Value Result(Napi::Env env) override { return Napi::Number::New(env, fd_.release()); }

  UniqueFd directory_;
  OpenRequest request_;
  UniqueFd fd_;
};

class Read : public Apart {
 public:
  Read(Napi::Env env, std::string path, size_t most, int flags) : Apart(env), path_(std::move(path)), most_(most), flags_(flags) {}

 private:
  void Execute() override {
    // A FIFO that nobody writes to is opened at once, and refused.
    UniqueFd fd(static_cast<int>(RetryOnEintr([&] { return open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | flags_); })));
    if (!fd.valid()) return Fail("open", errno);
    struct stat found;
    if (fstat(fd.get(), &found) == -1) return Fail("fstat", errno);
    if (S_ISDIR(found.st_mode)) return Fail("read", EISDIR);
    if (!S_ISREG(found.st_mode)) return Fail("read", EINVAL);
    size_t step = found.st_size > 0 ? static_cast<size_t>(found.st_size) + 1 : 4096; // files of procfs say 0
    for (;;) {
      if (step > most_ + 1) step = most_ + 1;
      size_t length = bytes_.size();
      bytes_.resize(length + step);
      ssize_t count = RetryOnEintr([&] { return read(fd.get(), bytes_.data() + length, step); });
      if (count == -1) return Fail("read", errno);
      bytes_.resize(length + static_cast<size_t>(count));
      if (bytes_.size() > most_) return Fail("read", EFBIG);
      if (count == 0) return;
      step = 4096;
    }
  }
  Napi::Value Result(Napi::Env env) override { return Napi::Buffer<char>::Copy(env, bytes_.data(), bytes_.size()); }

  std::string path_;
  size_t most_;
  int flags_;
  std::vector<char> bytes_;
};

class Stat : public Apart {
 public:
  Stat(Napi::Env env, std::string path) : Apart(env), path_(std::move(path)) {}

 private:
  void Execute() override {
    if (stat(path_.c_str(), &found_) == -1) Fail("stat", errno);
  }
  // mode, rdev, nlink, size, blocks
  Napi::Value Result(Napi::Env env) override {
    Napi::Array result = Napi::Array::New(env, 5);
    const double numbers[] = {static_cast<double>(found_.st_mode), static_cast<double>(found_.st_rdev),
                              static_cast<double>(found_.st_nlink), static_cast<double>(found_.st_size),
                              static_cast<double>(found_.st_blocks)};
    for (uint32_t at = 0; at < 5; at++) result.Set(at, Napi::Number::New(env, numbers[at]));
    return result;
  }

  std::string path_;
  struct stat found_ = {};
};

class Lock : public Apart {
 public:
  Lock(Napi::Env env, UniqueFd fd, int operation) : Apart(env), fd_(std::move(fd)), operation_(operation) {}

 private:
  void Execute() override {
    int taken = TryLock(fd_.get(), operation_);
    if (taken == -1) return Fail("flock", errno);
    taken_ = taken == 1;
  }
  Napi::Value Result(Napi::Env env) override { return Napi::Boolean::New(env, taken_); }

  UniqueFd fd_;
  int operation_;
  bool taken_ = false;
};

// statfs(2) is what every server is asked for each time, whatever is cached. Of what isn't there yet, the nearest directory above it is.
class FileSystem : public Apart {
 public:
  FileSystem(Napi::Env env, std::string path) : Apart(env), path_(std::move(path)) {}

 private:
  void Execute() override {
    for (;;) {
      if (RetryOnEintr([&] { return statfs(path_.c_str(), &found_); }) == 0) return;
      size_t slash = path_.find_last_of('/');
      if (errno != ENOENT || slash == std::string::npos || path_ == "/") return Fail("statfs", errno);
      path_.resize(slash == 0 ? 1 : slash);
    }
  }
  Napi::Value Result(Napi::Env env) override {
    return Napi::Number::New(env, static_cast<double>(static_cast<uint32_t>(found_.f_type)));
  }

  std::string path_;
  struct statfs found_ = {};
};

}  // namespace

// openApart(directory, path, flags, mode, resolve): openat2(2); directory -1: none, the path is absolute.
Napi::Value OpenApart(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  OpenRequest request(info, -1);
  // A duplicate: who is tired of waiting closes his.
  UniqueFd own;
  if (request.directory >= 0) {
    own = UniqueFd(fcntl(request.directory, F_DUPFD_CLOEXEC, 0));
    if (!own.valid()) throw SystemError(env, "fcntl", errno);
  }
  return (new Open(env, std::move(own), std::move(request)))->Start(env);
}

// flockApart(fd, operation): flock(2) without waiting for others; false when somebody else has it.
Napi::Value FlockApart(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int operation = LockArgument(info, 1);
  // The lock is the open file's, whichever descriptor stands for it.
  UniqueFd own(fcntl(IntArgument(info, 0, "fd"), F_DUPFD_CLOEXEC, 0));
  if (!own.valid()) throw SystemError(env, "fcntl", errno);
  return (new Lock(env, std::move(own), operation))->Start(env);
}

// readApart(path, most, follow): a regular file, whole. EISDIR, EINVAL for what is no file, EFBIG; ELOOP for a link, unless it is to be followed.
Napi::Value ReadApart(const Napi::CallbackInfo& info) {
  auto most = static_cast<size_t>(IntArgument(info, 1, "most"));
  int flags = info[2].ToBoolean() ? 0 : O_NOFOLLOW;
  return (new Read(info.Env(), PathArgument(info, 0, "path"), most, flags))->Start(info.Env());
}

// statApart(path): stat(2).
Napi::Value StatApart(const Napi::CallbackInfo& info) { return (new Stat(info.Env(), PathArgument(info, 0, "path")))->Start(info.Env()); }

// fileSystemApart(path): f_type of statfs(2).
Napi::Value FileSystemApart(const Napi::CallbackInfo& info) {
  return (new FileSystem(info.Env(), PathArgument(info, 0, "path")))->Start(info.Env());
}
