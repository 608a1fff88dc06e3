// Looking at the sockets of other processes and of other network namespaces.
//
// The network namespace of a thread of Node's is never changed, for the thread goes on to other work: a thread of its own
// enters the namespace, makes the socket there and ends. A socket stays in the namespace that it was made in.

#include "sockets.h"

#include "apart.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "support.h"
#include "unique-fd.h"

#ifndef SIOCGSKNS
#define SIOCGSKNS 0x894C  // linux/sockios.h, which can't be included beside the C library's headers everywhere
#endif

namespace {

// The kernel answers at once; this is for a kernel that doesn't, so that a thread of the pool is not lost.
constexpr struct timeval kPatience = {5, 0};
// A host may have a hundred thousand sockets; a megabyte for each thousand of them is what they take here.
constexpr size_t kMaxAnswerBytes = 256u << 20;

struct Failure {
  int error = 0;
  const char* syscall = "";
};

UniqueFd NetlinkSocketIn(int namespace_fd, int protocol, Failure* failure) {
  int made = -1;
  auto make = [&] {
    if (namespace_fd >= 0 && setns(namespace_fd, CLONE_NEWNET) == -1) {
      *failure = {errno, "setns"};
      return;
    }
    made = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol);
    if (made == -1) *failure = {errno, "socket"};
  };
  if (namespace_fd < 0) {
    make();
  } else {
    try {
      std::thread(make).join();
    } catch (const std::system_error& error) {
      *failure = {error.code().value(), "clone"};
    }
  }
  return UniqueFd(made);
}

// One dump: sends a request and collects the payload of everything up to NLMSG_DONE, headers included.
// Returns an errno that the kernel answered (ENOENT: it has no handler for that family).
int Dump(int fd, const std::vector<uint8_t>& request, std::vector<uint8_t>* answer, Failure* failure) {
  if (send(fd, request.data(), request.size(), 0) == -1) {
    *failure = {errno, "send"};
    return 0;
  }
  std::vector<uint8_t> buffer(64 * 1024);
  for (;;) {
    ssize_t length = RetryOnEintr([&] { return recv(fd, buffer.data(), buffer.size(), MSG_TRUNC); });
    if (length == -1) {
      *failure = {errno == EAGAIN ? ETIMEDOUT : errno, "recv"};
      return 0;
    }
    if (static_cast<size_t>(length) > buffer.size()) {
      *failure = {EMSGSIZE, "recv"};
      return 0;
    }
    auto* header = reinterpret_cast<struct nlmsghdr*>(buffer.data());
    for (int left = static_cast<int>(length); NLMSG_OK(header, static_cast<unsigned>(left)); header = NLMSG_NEXT(header, left)) {
      if (header->nlmsg_type == NLMSG_DONE) {
        int error = header->nlmsg_len >= NLMSG_LENGTH(sizeof(int)) ? -*static_cast<int*>(NLMSG_DATA(header)) : 0;
        return error > 0 ? error : 0;
      }
      if (header->nlmsg_type == NLMSG_ERROR) {
        int error = -static_cast<struct nlmsgerr*>(NLMSG_DATA(header))->error;
        return error > 0 ? error : EPROTO;
      }
      if (answer->size() + header->nlmsg_len > kMaxAnswerBytes) {
        *failure = {EMSGSIZE, "recv"};
        return 0;
      }
      auto* bytes = reinterpret_cast<uint8_t*>(header);
      answer->insert(answer->end(), bytes, bytes + NLMSG_ALIGN(header->nlmsg_len));
    }
  }
}

class DumpWorker : public Napi::AsyncWorker {
 public:
  DumpWorker(Napi::Env env, UniqueFd namespace_fd, int protocol, std::vector<std::vector<uint8_t>> requests)
      : Napi::AsyncWorker(env),
        deferred_(Napi::Promise::Deferred::New(env)),
        namespace_fd_(std::move(namespace_fd)),
        protocol_(protocol),
        requests_(std::move(requests)) {}

  Napi::Promise Promise() { return deferred_.Promise(); }

  void Execute() override {
    UniqueFd fd = NetlinkSocketIn(namespace_fd_.get(), protocol_, &failure_);
    if (failure_.error) return;
    if (setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &kPatience, sizeof(kPatience)) == -1) {
      failure_ = {errno, "setsockopt"};
      return;
    }
    for (const auto& request : requests_) {
      std::vector<uint8_t> answer;
      int error = Dump(fd.get(), request, &answer, &failure_);
      if (failure_.error) return;
      errors_.push_back(error);
      answers_.push_back(std::move(answer));
    }
  }

  void OnOK() override {
    Napi::Env env = Env();
    Napi::HandleScope scope(env);
    if (failure_.error) {
      deferred_.Reject(SystemError(env, failure_.syscall, failure_.error).Value());
      return;
    }
    Napi::Array result = Napi::Array::New(env, answers_.size());
    for (uint32_t i = 0; i < answers_.size(); i++) {
      if (errors_[i])
        result.Set(i, Napi::Number::New(env, errors_[i]));
      else
        result.Set(i, Napi::Buffer<uint8_t>::Copy(env, answers_[i].data(), answers_[i].size()));
    }
    deferred_.Resolve(result);
  }

  void OnError(const Napi::Error& error) override { deferred_.Reject(error.Value()); }

 private:
  Napi::Promise::Deferred deferred_;
  UniqueFd namespace_fd_;
  int protocol_;
  std::vector<std::vector<uint8_t>> requests_;
  std::vector<std::vector<uint8_t>> answers_;
  std::vector<int> errors_;
  Failure failure_;
};

}  // namespace

// netlinkDump(namespaceFd, protocol, requests): the descriptor is duplicated, so the caller may close its own at once.
Napi::Value NetlinkDump(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int namespace_fd = IntArgument(info, 0, "namespaceFd", -1);
  int protocol = IntArgument(info, 1, "protocol", 0);
  if (info.Length() < 3 || !info[2].IsArray()) throw Napi::TypeError::New(env, "requests must be an array");
  Napi::Array list = info[2].As<Napi::Array>();
  std::vector<std::vector<uint8_t>> requests;
  for (uint32_t i = 0; i < list.Length(); i++) {
    Napi::Value item = list.Get(i);
    if (!item.IsBuffer()) throw Napi::TypeError::New(env, "requests must be buffers");
    auto buffer = item.As<Napi::Buffer<uint8_t>>();
    requests.emplace_back(buffer.Data(), buffer.Data() + buffer.Length());
  }
  UniqueFd own;
  if (namespace_fd >= 0) {
    own = UniqueFd(fcntl(namespace_fd, F_DUPFD_CLOEXEC, 0));
    if (!own.valid()) throw SystemError(env, "fcntl", errno);
  }
  auto* worker = new DumpWorker(env, std::move(own), protocol, std::move(requests));
  Napi::Promise promise = worker->Promise();
  worker->Queue();  // deletes itself when it is done
  return promise;
}

// socketOf(pid, fd): pidfd_open(2), pidfd_getfd(2), getsockopt(2), ioctl(SIOCGSKNS). Nothing of the socket changes.
Napi::Value SocketOf(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int pid = IntArgument(info, 0, "pid", 1);
  int number = IntArgument(info, 1, "fd", 0);
  UniqueFd process(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
  if (!process.valid()) throw SystemError(env, "pidfd_open", errno);
  UniqueFd fd(static_cast<int>(syscall(SYS_pidfd_getfd, process.get(), number, 0)));
  if (!fd.valid()) throw SystemError(env, "pidfd_getfd", errno);
  Napi::Object result = Napi::Object::New(env);
  int family = 0, protocol = 0;
  const struct {
    const char* name;
    int option;
    int* keep;
  } options[] = {{"family", SO_DOMAIN, &family},
                 {"type", SO_TYPE, nullptr},
                 {"protocol", SO_PROTOCOL, &protocol},
                 {"listening", SO_ACCEPTCONN, nullptr},
                 {"passCredentials", SO_PASSCRED, nullptr}};
  for (const auto& option : options) {
    int value = 0;
    socklen_t size = sizeof(value);
    if (getsockopt(fd.get(), SOL_SOCKET, option.option, &value, &size) == -1) {
      // Not every family knows these two (SO_PASSCRED: unix and netlink only, from Linux 6.16 on).
      if (option.option != SO_ACCEPTCONN && option.option != SO_PASSCRED) throw SystemError(env, "getsockopt", errno);
      value = 0;
    }
    if (option.keep) *option.keep = value;
    result.Set(option.name, Napi::Number::New(env, value));
  }
  struct sockaddr_storage peer;
  socklen_t peer_size = sizeof(peer);
  struct tcp_info tcp = {};
  socklen_t tcp_size = sizeof(tcp);
  int state = getpeername(fd.get(), reinterpret_cast<struct sockaddr*>(&peer), &peer_size) == 0 ? 1 : 7;
  if ((family == AF_INET || family == AF_INET6) && protocol == IPPROTO_TCP &&
      getsockopt(fd.get(), IPPROTO_TCP, TCP_INFO, &tcp, &tcp_size) == 0)
    state = tcp.tcpi_state;
  result.Set("state", Napi::Number::New(env, state));
  UniqueFd network(ioctl(fd.get(), SIOCGSKNS));
  struct stat found;
  if (network.valid() && fstat(network.get(), &found) == 0)
    result.Set("networkNamespace", Napi::Number::New(env, static_cast<double>(found.st_ino)));
  return result;
}

// kcmp(2): 0 the same, 1 and 2 an order among those that are not, 3 neither
Napi::Value Kcmp(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int one = IntArgument(info, 0, "pid", 1);
  int other = IntArgument(info, 1, "otherPid", 1);
  int type = IntArgument(info, 2, "type", 0);
  long result = syscall(SYS_kcmp, one, other, type, 0, 0);
  if (result == -1) throw SystemError(env, "kcmp", errno);
  return Napi::Number::New(env, static_cast<double>(result));
}

namespace {

class Handle : public Apart {
 public:
  Handle(Napi::Env env, std::string mount, int type, std::vector<uint8_t> handle)
      : Apart(env), mount_(std::move(mount)), type_(type), handle_(std::move(handle)) {}

 private:
  void Execute() override {
    UniqueFd mount(open(mount_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
    if (!mount.valid()) {
      outcome_ = errno;
      return;
    }
    std::vector<uint8_t> space(sizeof(struct file_handle) + handle_.size());
    auto* handle = reinterpret_cast<struct file_handle*>(space.data());
    handle->handle_bytes = static_cast<unsigned>(handle_.size());
    handle->handle_type = type_;
    memcpy(handle->f_handle, handle_.data(), handle_.size());
    UniqueFd found(open_by_handle_at(mount.get(), handle, O_PATH | O_CLOEXEC));
    if (!found.valid()) outcome_ = errno;
  }
  Napi::Value Result(Napi::Env env) override { return Napi::Number::New(env, outcome_); }

  std::string mount_;
  int type_;
  std::vector<uint8_t> handle_;
  int outcome_ = 0;
};

}  // namespace

// tryHandle(mountPath, type, handle): whether open_by_handle_at(2) finds the file again; resolves to 0 or an errno.
Napi::Value TryHandle(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  std::string path = PathArgument(info, 0, "mountPath");
  if (info.Length() < 3 || !info[2].IsBuffer()) throw Napi::TypeError::New(env, "handle must be a buffer");
  int type = IntArgument(info, 1, "type", 0);
  auto buffer = info[2].As<Napi::Buffer<uint8_t>>();
  if (buffer.Length() > MAX_HANDLE_SZ) throw Napi::TypeError::New(env, "handle is too long");
  std::vector<uint8_t> bytes(buffer.Data(), buffer.Data() + buffer.Length());
  return (new Handle(env, std::move(path), type, std::move(bytes)))->Start(env);
}
