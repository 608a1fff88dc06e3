// Sockets of packets (AF_UNIX, SOCK_SEQPACKET), which Node doesn't know: CRIU speaks over one. Nothing here waits; that there
// is something to receive, libuv tells (WatchReadable).

#include "seqpacket.h"

#include <fcntl.h>
#include <node_api.h>
#include <sys/socket.h>

#include "support.h"
#include "unique-fd.h"

// Of libuv, whose header Node's packages don't carry. Node's executable exports these; sizes come from it, and the two numbers
// have been the same in every libuv 1.x. Source: docs.libuv.org, uv_poll_t and uv_handle_t.
extern "C" {
struct uv_loop_s;
struct uv_handle_s;
size_t uv_handle_size(int type);
void uv_handle_set_data(uv_handle_s*, void*);
void* uv_handle_get_data(const uv_handle_s*);
int uv_poll_init(uv_loop_s*, uv_handle_s*, int fd);
int uv_poll_start(uv_handle_s*, int events, void (*callback)(uv_handle_s*, int status, int events));
int uv_poll_stop(uv_handle_s*);
void uv_close(uv_handle_s*, void (*callback)(uv_handle_s*));
}

namespace {

constexpr int kUvPoll = 8;      // UV_POLL
constexpr int kUvReadable = 1;  // UV_READABLE
constexpr int kMaxFds = 8;      // in one packet; CRIU sends one at most

// A descriptor that libuv watches until stop(). The handle's memory is libuv's until its close callback, whence the two
// lives: Watch goes with stop(), the handle a turn of the loop later.
class Watch {
 public:
  Watch(Napi::Env env, Napi::Function callback)
      : env_(env), callback_(Napi::Persistent(callback)), context_(env, "cedana:watchReadable") {}

  ~Watch() { Stop(); }  // the function that ends it was forgotten

  void Start(int fd) {
    uv_loop_s* loop = nullptr;
    if (napi_get_uv_event_loop(env_, &loop) != napi_ok) throw Napi::Error::New(env_, "no event loop");
    auto* handle = static_cast<uv_handle_s*>(calloc(1, uv_handle_size(kUvPoll)));
    if (handle == nullptr) throw SystemError(env_, "calloc", ENOMEM);
    if (int error = uv_poll_init(loop, handle, fd); error != 0) {
      free(handle);
      throw SystemError(env_, "epoll_ctl", -error);
    }
    handle_ = handle;
    uv_handle_set_data(handle_, this);
    if (int error = uv_poll_start(handle_, kUvReadable, OnReadable); error != 0) {
      Stop();
      throw SystemError(env_, "epoll_ctl", -error);
    }
    napi_add_env_cleanup_hook(env_, OnExit, this);
  }

  void Stop() {
    if (handle_ == nullptr) return;
    uv_poll_stop(handle_);
    uv_handle_set_data(handle_, nullptr);
    uv_close(handle_, [](uv_handle_s* handle) { free(handle); });
    handle_ = nullptr;
    napi_remove_env_cleanup_hook(env_, OnExit, this);
    callback_.Reset();
  }

 private:
  static void OnReadable(uv_handle_s* handle, int, int) {
    auto* watch = static_cast<Watch*>(uv_handle_get_data(handle));
    if (watch == nullptr) return;
    Napi::HandleScope scope(watch->env_);
    try {
      watch->callback_.MakeCallback(watch->env_.Global(), {}, watch->context_);
    } catch (const Napi::Error& error) {
      napi_fatal_exception(watch->env_, error.Value());
    }
  }

  // The environment ends (a worker thread's end): an open handle would make Node abort.
  static void OnExit(void* watch) { static_cast<Watch*>(watch)->Stop(); }

  Napi::Env env_;
  Napi::FunctionReference callback_;
  Napi::AsyncContext context_;
  uv_handle_s* handle_ = nullptr;
};

}  // namespace

// watchReadable(fd, callback): a function that ends it. The descriptor must stay open until then.
Napi::Value WatchReadable(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int fd = IntArgument(info, 0, "fd");
  if (info.Length() < 2 || !info[1].IsFunction()) throw Napi::TypeError::New(env, "callback must be a function");
  auto watch = std::make_shared<Watch>(env, info[1].As<Napi::Function>());
  watch->Start(fd);
  return Napi::Function::New(env, [watch](const Napi::CallbackInfo&) { watch->Stop(); }, "stop");
}

// socketpair(2). Both ends are close-on-exec. The first one, ours, doesn't block; the other one does, whoever gets it expects that.
Napi::Value SeqpacketPair(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == -1) throw SystemError(env, "socketpair", errno);
  UniqueFd ours(ends[0]), theirs(ends[1]);
  if (fcntl(ours.get(), F_SETFL, O_NONBLOCK) == -1) throw SystemError(env, "fcntl", errno);
  Napi::Array pair = Napi::Array::New(env, 2);
  pair.Set(0u, Napi::Number::New(env, ours.release()));
  pair.Set(1u, Napi::Number::New(env, theirs.release()));
  return pair;
}

// send(2) of one packet, whole or not at all
Napi::Value SeqpacketSend(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int fd = IntArgument(info, 0, "fd");
  if (info.Length() < 2 || !info[1].IsTypedArray()) throw Napi::TypeError::New(env, "packet must be a Uint8Array");
  auto packet = info[1].As<Napi::Uint8Array>();
  ssize_t sent = RetryOnEintr([&] { return send(fd, packet.Data(), packet.ByteLength(), MSG_NOSIGNAL | MSG_DONTWAIT); });
  if (sent == -1) throw SystemError(env, "send", errno);
  return env.Undefined();
}

// recvmsg(2) of one packet: undefined when none is there, else { data, fds }; data is empty at the end of the conversation. The
// packet's length is asked first (MSG_PEEK | MSG_TRUNC): a buffer that is too short would cut it, and nobody would say so.
Napi::Value SeqpacketReceive(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int fd = IntArgument(info, 0, "fd");
  ssize_t length = RetryOnEintr([&] { return recv(fd, nullptr, 0, MSG_PEEK | MSG_TRUNC | MSG_DONTWAIT); });
  if (length == -1 && (errno == EAGAIN || errno == EWOULDBLOCK)) return env.Undefined();
  if (length == -1) throw SystemError(env, "recv", errno);

  auto data = Napi::Buffer<char>::New(env, static_cast<size_t>(length));
  char unused = 0;
  struct iovec part = {length > 0 ? data.Data() : &unused, length > 0 ? static_cast<size_t>(length) : 1};
  alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxFds)];
  struct msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  ssize_t received = RetryOnEintr([&] { return recvmsg(fd, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT); });
  if (received == -1) throw SystemError(env, "recvmsg", errno);

  Napi::Array fds = Napi::Array::New(env);
  for (struct cmsghdr* head = CMSG_FIRSTHDR(&message); head != nullptr; head = CMSG_NXTHDR(&message, head)) {
    if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS) continue;
    size_t count = (head->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; i++) {
      int passed;
      memcpy(&passed, CMSG_DATA(head) + i * sizeof(int), sizeof(int));
      fds.Set(fds.Length(), Napi::Number::New(env, passed));
    }
  }
  Napi::Object result = Napi::Object::New(env);
  result.Set("data", data);
  result.Set("fds", fds);
  return result;
}
