// File operations that may never come back, each in a thread of its own: where the server behind a file system is gone (NFS) or doesn't mean to
// answer (FUSE, which any container may have), the thread stays in the kernel. In libuv's pool, four of them would stop every file operation
// of the process.

#include "apart.h"

#include <fcntl.h>
#include <linux/openat2.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "support.h"
#include "unique-fd.h"

namespace {

// It calls the kernel and little else. Memory is taken only for what is touched.
constexpr size_t kStackBytes = 128 * 1024;

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
    pthread_attr_setstacksize(&attributes, kStackBytes);
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
    // Closing: the environment has gone, and nobody waits.
    if (done.BlockingCall(job, [](Napi::Env env, Napi::Function, Apart* job) { job->Settle(env); }) != napi_ok) delete job;
    done.Release();
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

class Open : public Apart {
 public:
  Open(Napi::Env env, UniqueFd directory, std::string path, struct open_how how)
      : Apart(env), directory_(std::move(directory)), path_(std::move(path)), how_(how) {}

 private:
  void Execute() override {
    int from = directory_.valid() ? directory_.get() : AT_FDCWD;
    for (int attempt = 0; attempt < 16; attempt++) {
      fd_ = UniqueFd(static_cast<int>(syscall(SYS_openat2, from, path_.c_str(), &how_, sizeof(how_))));
      if (fd_.valid() || (errno != EAGAIN && errno != EINTR)) break;
    }
    if (!fd_.valid()) Fail("openat2", errno);
  }
  Napi::Value Result(Napi::Env env) override { return Napi::Number::New(env, fd_.release()); }

  UniqueFd directory_;
  std::string path_;
  struct open_how how_;
  UniqueFd fd_;
};

class Read : public Apart {
 public:
  Read(Napi::Env env, std::string path, size_t most) : Apart(env), path_(std::move(path)), most_(most) {}

 private:
  void Execute() override {
    // A FIFO that nobody writes to is opened at once, and refused.
    UniqueFd fd(static_cast<int>(RetryOnEintr([&] { return open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); })));
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
  int directory = IntArgument(info, 0, "directory", -1);
  std::string path = PathArgument(info, 1, "path");
  struct open_how how = {};
  how.flags = static_cast<unsigned>(IntArgument(info, 2, "flags")) | O_CLOEXEC;
  how.mode = static_cast<unsigned>(IntArgument(info, 3, "mode"));
  how.resolve = static_cast<unsigned>(IntArgument(info, 4, "resolve"));
  // A duplicate: who is tired of waiting closes his.
  UniqueFd own;
  if (directory >= 0) {
    own = UniqueFd(fcntl(directory, F_DUPFD_CLOEXEC, 0));
    if (!own.valid()) throw SystemError(env, "fcntl", errno);
  }
  return (new Open(env, std::move(own), std::move(path), how))->Start(env);
}

// readApart(path, most): a regular file, whole. EISDIR, EINVAL for what is no file, EFBIG.
Napi::Value ReadApart(const Napi::CallbackInfo& info) {
  return (new Read(info.Env(), PathArgument(info, 0, "path"), static_cast<size_t>(IntArgument(info, 1, "most"))))->Start(info.Env());
}

// statApart(path): stat(2).
Napi::Value StatApart(const Napi::CallbackInfo& info) { return (new Stat(info.Env(), PathArgument(info, 0, "path")))->Start(info.Env()); }

// fileSystemApart(path): f_type of statfs(2).
Napi::Value FileSystemApart(const Napi::CallbackInfo& info) {
  return (new FileSystem(info.Env(), PathArgument(info, 0, "path")))->Start(info.Env());
}
