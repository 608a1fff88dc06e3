// A copy of a program in a memfd that nobody can change any more, the kind that runc and crun take for their own protection.
//
//  1. The file is opened, and looked at through the descriptor: what is copied is what the identity names.
//  2. memfd_create(2) with MFD_EXEC (where `vm.memfd_noexec` asks for a decision; kernels before 6.3 don't know the flag).
//  3. sendfile(2): from page cache to page cache.
//  4. Write, shrink, grow and further seals are sealed: exactly these four, which the engines compare with.

#include "sealed.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

#include <string>

#include "support.h"
#include "unique-fd.h"

#ifndef MFD_EXEC
#define MFD_EXEC 0x0010U
#endif

namespace {

constexpr int kSeals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;

class SealedCopyWorker : public Napi::AsyncWorker {
 public:
  SealedCopyWorker(Napi::Env env, std::string path, std::string name, int64_t most)
      : Napi::AsyncWorker(env),
        deferred_(Napi::Promise::Deferred::New(env)),
        path_(std::move(path)),
        name_(std::move(name)),
        most_(most) {}

  Napi::Promise Promise() { return deferred_.Promise(); }

  void Execute() override {
    UniqueFd file(open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
    if (!file.valid()) return Fail("open");
    if (fstat(file.get(), &stat_) == -1) return Fail("fstat");
    if (!S_ISREG(stat_.st_mode) || stat_.st_size > most_) {
      errno = EFBIG;
      return Fail("fstat");
    }
    copy_ = UniqueFd(memfd_create(name_.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_EXEC));
    if (!copy_.valid() && errno == EINVAL) copy_ = UniqueFd(memfd_create(name_.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (!copy_.valid()) return Fail("memfd_create");
    off_t done = 0;
    while (done < stat_.st_size) {
      ssize_t sent = sendfile(copy_.get(), file.get(), &done, static_cast<size_t>(stat_.st_size - done));
      if (sent == -1 && errno == EINTR) continue;
      if (sent == 0) errno = EIO;  // it has become shorter meanwhile
      if (sent <= 0) return Fail("sendfile");
    }
    if (fchmod(copy_.get(), 0555) == -1) return Fail("fchmod");
    if (fcntl(copy_.get(), F_ADD_SEALS, kSeals) == -1) return Fail("fcntl");
  }

  void OnOK() override {
    Napi::Env env = Env();
    Napi::HandleScope scope(env);
    if (failed_) {
      deferred_.Reject(SystemError(env, failed_, error_).Value());
      return;
    }
    Napi::Object result = Napi::Object::New(env);
    result.Set("fd", Napi::Number::New(env, copy_.release()));
    result.Set("of", Napi::String::New(env, Identity()));
    deferred_.Resolve(result);
  }
  void OnError(const Napi::Error& error) override { deferred_.Reject(error.Value()); }

 private:
  void Fail(const char* syscall) {
    failed_ = syscall;
    error_ = errno;
  }

  // As addon/keeper/spawn.c writes it.
  std::string Identity() const {
    auto ns = [](const struct timespec& time) { return std::to_string(time.tv_sec * 1000000000LL + time.tv_nsec); };
    return std::to_string(stat_.st_dev) + ":" + std::to_string(stat_.st_ino) + ":" + std::to_string(stat_.st_size) + ":" +
           ns(stat_.st_mtim) + ":" + ns(stat_.st_ctim);
  }

  Napi::Promise::Deferred deferred_;
  std::string path_;
  std::string name_;
  int64_t most_;
  struct stat stat_ = {};
  UniqueFd copy_;
  const char* failed_ = nullptr;
  int error_ = 0;
};

}  // namespace

Napi::Value SealedCopy(const Napi::CallbackInfo& info) {
  auto* worker = new SealedCopyWorker(info.Env(), PathArgument(info, 0, "path"), PathArgument(info, 1, "name"),
                                      Int64Argument(info, 2, "most"));
  Napi::Promise promise = worker->Promise();
  worker->Queue();
  return promise;
}
