// The system calls that Node lacks, one thin binding each: check the arguments, make the call, throw an Error with
// `errno`, `code` and `syscall` as Node's own do. What they are for stands at their declarations in src/linux/addon.ts.
//
// Everything here returns at once; nothing waits, because it runs on the event loop. Descriptors that are made are
// close-on-exec and belong to the caller.

#include <errno.h>
#include <fcntl.h>
#include <napi.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

#include <string>
#include <vector>

#include "apart.h"
#include "cuda.h"
#include "files.h"
#include "sealed.h"
#include "seqpacket.h"
#include "sockets.h"
#include "support.h"
#include "threads.h"
#include "unique-fd.h"
#include "xxh128.h"

namespace {

// getsockopt(2), SO_PEERCRED
Napi::Value PeerCredentials(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int fd = IntArgument(info, 0, "fd");
  struct ucred peer = {};
  socklen_t size = sizeof(peer);
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == -1) throw SystemError(env, "getsockopt", errno);
  Napi::Object result = Napi::Object::New(env);
  result.Set("pid", Napi::Number::New(env, peer.pid));
  result.Set("uid", Napi::Number::New(env, peer.uid));
  result.Set("gid", Napi::Number::New(env, peer.gid));
  return result;
}

// fcntl(2), F_SETFD; FD_CLOEXEC is the only flag there is
Napi::Value SetCloexec(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int fd = IntArgument(info, 0, "fd");
  if (info.Length() < 2 || !info[1].IsBoolean()) throw Napi::TypeError::New(env, "on must be a boolean");
  if (fcntl(fd, F_SETFD, info[1].As<Napi::Boolean>().Value() ? FD_CLOEXEC : 0) == -1)
    throw SystemError(env, "fcntl", errno);
  return env.Undefined();
}

// pidfd_open(2); the kernel sets close-on-exec
Napi::Value PidfdOpen(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int pid = IntArgument(info, 0, "pid", 1);
  UniqueFd pidfd(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
  if (!pidfd.valid()) throw SystemError(env, "pidfd_open", errno);
  return Napi::Number::New(env, pidfd.release());
}

// pidfd_send_signal(2)
Napi::Value PidfdSendSignal(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int fd = IntArgument(info, 0, "fd");
  int signal = IntArgument(info, 1, "signal");
  if (syscall(SYS_pidfd_send_signal, fd, signal, nullptr, 0) == -1) throw SystemError(env, "pidfd_send_signal", errno);
  return env.Undefined();
}

// poll(2) without waiting; a pidfd becomes readable when its process has ended
Napi::Value PidfdPoll(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  struct pollfd watched = {IntArgument(info, 0, "fd"), POLLIN, 0};
  int ready = RetryOnEintr([&] { return poll(&watched, 1, 0); });
  if (ready == -1) throw SystemError(env, "poll", errno);
  if (watched.revents & POLLNVAL) throw SystemError(env, "poll", EBADF);
  return Napi::Boolean::New(env, (watched.revents & POLLIN) != 0);
}

// flock(2), always with LOCK_NB
Napi::Value Flock(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int fd = IntArgument(info, 0, "fd");
  int taken = TryLock(fd, LockArgument(info, 1));
  if (taken == -1) throw SystemError(env, "flock", errno);
  return Napi::Boolean::New(env, taken == 1);
}

// openat2(2)
Napi::Value Openat2(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  OpenRequest request(info, 0);
  UniqueFd fd = request.Open(request.directory);
  if (!fd.valid()) throw SystemError(env, "openat2", errno);
  return Napi::Number::New(env, fd.release());
}

// renameat2(2)
Napi::Value Renameat2(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int from = IntArgument(info, 0, "from directory");
  std::string from_path = PathArgument(info, 1, "from path");
  int to = IntArgument(info, 2, "to directory");
  std::string to_path = PathArgument(info, 3, "to path");
  unsigned flags = static_cast<unsigned>(IntArgument(info, 4, "flags"));
  if (syscall(SYS_renameat2, from, from_path.c_str(), to, to_path.c_str(), flags) == -1)
    throw SystemError(env, "renameat2", errno);
  return env.Undefined();
}

// lseek(2) with SEEK_DATA or SEEK_HOLE; -1 when there is no data behind the offset (ENXIO)
Napi::Value SeekTo(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int fd = IntArgument(info, 0, "fd");
  int64_t offset = Int64Argument(info, 1, "offset");
  int whence = IntArgument(info, 2, "whence");
  if (whence != SEEK_DATA && whence != SEEK_HOLE)
    throw Napi::TypeError::New(env, "whence must be SEEK_DATA or SEEK_HOLE");
  off_t found = lseek(fd, offset, whence);
  if (found == -1 && errno != ENXIO) throw SystemError(env, "lseek", errno);
  return Napi::Number::New(env, static_cast<double>(found));
}

// llistxattr(2): the names, each with its NUL. The list may grow between the two calls.
Napi::Value ListXattr(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  std::string path = PathArgument(info, 0, "path");
  for (;;) {
    ssize_t size = llistxattr(path.c_str(), nullptr, 0);
    if (size == -1) throw SystemError(env, "llistxattr", errno);
    std::vector<char> names(static_cast<size_t>(size) + 1);
    ssize_t filled = llistxattr(path.c_str(), names.data(), names.size());
    if (filled == -1 && errno == ERANGE) continue;
    if (filled == -1) throw SystemError(env, "llistxattr", errno);
    return Napi::Buffer<char>::Copy(env, names.data(), static_cast<size_t>(filled));
  }
}

// lgetxattr(2); undefined when there is none of that name
Napi::Value GetXattr(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  std::string path = PathArgument(info, 0, "path");
  std::string name = PathArgument(info, 1, "name");
  for (;;) {
    ssize_t size = lgetxattr(path.c_str(), name.c_str(), nullptr, 0);
    if (size == -1 && errno == ENODATA) return env.Undefined();
    if (size == -1) throw SystemError(env, "lgetxattr", errno);
    std::vector<char> value(static_cast<size_t>(size) + 1);
    ssize_t filled = lgetxattr(path.c_str(), name.c_str(), value.data(), value.size());
    if (filled == -1 && errno == ERANGE) continue;
    if (filled == -1) throw SystemError(env, "lgetxattr", errno);
    return Napi::Buffer<char>::Copy(env, value.data(), static_cast<size_t>(filled));
  }
}

// lsetxattr(2)
Napi::Value SetXattr(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  std::string path = PathArgument(info, 0, "path");
  std::string name = PathArgument(info, 1, "name");
  if (info.Length() < 3 || !info[2].IsBuffer()) throw Napi::TypeError::New(env, "value must be a Buffer");
  auto value = info[2].As<Napi::Buffer<char>>();
  if (lsetxattr(path.c_str(), name.c_str(), value.Data(), value.Length(), 0) == -1)
    throw SystemError(env, "lsetxattr", errno);
  return env.Undefined();
}

// lremovexattr(2)
Napi::Value RemoveXattr(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  std::string path = PathArgument(info, 0, "path");
  std::string name = PathArgument(info, 1, "name");
  if (lremovexattr(path.c_str(), name.c_str()) == -1) throw SystemError(env, "lremovexattr", errno);
  return env.Undefined();
}

// mknod(2)
Napi::Value Mknod(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  std::string path = PathArgument(info, 0, "path");
  mode_t mode = static_cast<mode_t>(IntArgument(info, 1, "mode"));
  dev_t device = makedev(static_cast<unsigned>(IntArgument(info, 2, "major")), static_cast<unsigned>(IntArgument(info, 3, "minor")));
  if (mknod(path.c_str(), mode, device) == -1) throw SystemError(env, "mknod", errno);
  return env.Undefined();
}

// utimensat(2) with AT_SYMLINK_NOFOLLOW: access and modification, to the nanosecond, which Node's doubles can't tell
Napi::Value Utimens(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  std::string path = PathArgument(info, 0, "path");
  struct timespec times[2] = {};
  for (size_t i = 0; i < 2; i++) {
    times[i].tv_sec = Int64Argument(info, 1 + 2 * i, "seconds");
    times[i].tv_nsec = IntArgument(info, 2 + 2 * i, "nanoseconds");
  }
  if (utimensat(AT_FDCWD, path.c_str(), times, AT_SYMLINK_NOFOLLOW) == -1) throw SystemError(env, "utimensat", errno);
  return env.Undefined();
}

Napi::Object Init(Napi::Env env, Napi::Object exports) {
  const struct {
    const char* name;
    Napi::Value (*function)(const Napi::CallbackInfo&);
  } bindings[] = {
      {"netlinkDump", NetlinkDump},
      {"sealedCopy", SealedCopy},
      {"socketOf", SocketOf},
      {"kcmp", Kcmp},
      {"tryHandle", TryHandle},
      {"peerCredentials", PeerCredentials},
      {"setCloexec", SetCloexec},
      {"pidfdOpen", PidfdOpen},
      {"pidfdSendSignal", PidfdSendSignal},
      {"pidfdPoll", PidfdPoll},
      {"flock", Flock},
      {"openat2", Openat2},
      {"openApart", OpenApart},
      {"flockApart", FlockApart},
      {"readApart", ReadApart},
      {"statApart", StatApart},
      {"fileSystemApart", FileSystemApart},
      {"seqpacketPair", SeqpacketPair},
      {"seqpacketSend", SeqpacketSend},
      {"seqpacketReceive", SeqpacketReceive},
      {"watchReadable", WatchReadable},
      {"renameat2", Renameat2},
      {"seekTo", SeekTo},
      {"listXattr", ListXattr},
      {"getXattr", GetXattr},
      {"setXattr", SetXattr},
      {"removeXattr", RemoveXattr},
      {"mknod", Mknod},
      {"utimens", Utimens},
      {"ptraceSeize", PtraceSeize},
      {"ptraceInterrupt", PtraceInterrupt},
      {"ptraceDetach", PtraceDetach},
      {"waitStopped", WaitStopped},
      {"cudaOpen", CudaOpen},
      {"cudaInit", CudaInit},
      {"cudaDriverVersion", CudaDriverVersion},
      {"cudaErrorName", CudaErrorName},
      {"cudaDevices", CudaDevices},
      {"cudaState", CudaState},
      {"cudaRestoreThread", CudaRestoreThread},
      {"cudaLock", CudaLock},
      {"cudaCheckpoint", CudaCheckpoint},
      {"cudaRestore", CudaRestore},
      {"cudaUnlock", CudaUnlock},
      {"nvmlQuery", NvmlQuery},
      {"xxh128Create", Xxh128Create},
      {"xxh128Update", Xxh128Update},
      {"xxh128ReadSync", Xxh128ReadSync},
      {"xxh128Read", Xxh128Read},
      {"xxh128Digest", Xxh128Digest},
      {"xxh128Files", Xxh128Files},
  };
  for (const auto& binding : bindings)
    exports.Set(binding.name, Napi::Function::New(env, binding.function, binding.name));
  return exports;
}

}  // namespace

NODE_API_MODULE(cedana, Init)
