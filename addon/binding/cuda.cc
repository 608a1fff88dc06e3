// The driver's library (libcuda.so.1), by dlopen: never linked, never loaded but in the helper process, which asks for it. Each call runs on
// a thread of libuv's pool and may never return; whoever waits for it ends the process.
//
// The structs are declared here in own words: a toolkit's header is not needed. Each argument struct has 64 bytes, and what isn't named is
// zero: newer drivers give reserved bytes a meaning, for which zero is "not used". Source: CUDA driver API reference, section
// "CUDA checkpointing" (12.8 and later).

#include "cuda.h"

#include <dlfcn.h>
#include <string.h>

#include <functional>
#include <memory>
#include <vector>

#include "support.h"

namespace {

using Result = int;

struct Uuid {
  unsigned char bytes[16];
};
struct LockArgs {
  uint32_t timeout_ms, reserved0;
  uint64_t reserved1[7];
};
struct EmptyArgs {
  uint64_t reserved[8];
};
struct GpuPair {
  Uuid from, to;
};
struct RestoreArgs {
  GpuPair* pairs;
  uint32_t count;
  char reserved[52];
};
static_assert(sizeof(LockArgs) == 64 && sizeof(EmptyArgs) == 64 && sizeof(RestoreArgs) == 64 && sizeof(GpuPair) == 32);

// The driver whose forms we know; newer ones answer with these.
constexpr int kVersion = 12080;

struct Driver {
  Result (*get_proc_address)(const char*, void**, int, uint64_t, int*);
  Result (*init)(unsigned);
  Result (*driver_get_version)(int*);
  Result (*get_error_name)(Result, const char**);
  Result (*device_get_count)(int*);
  Result (*device_get)(int*, int);
  Result (*device_get_name)(char*, int, int);
  Result (*device_get_uuid)(Uuid*, int);
  Result (*device_total_mem)(size_t*, int);
  Result (*device_get_pci_bus_id)(char*, int, int);
  Result (*get_state)(int, int*);
  Result (*get_restore_thread_id)(int, int*);
  Result (*lock)(int, LockArgs*);
  Result (*checkpoint)(int, EmptyArgs*);
  Result (*restore)(int, RestoreArgs*);
  Result (*unlock)(int, EmptyArgs*);
};

Driver driver;
void* library;

// By the driver's own search, which knows the forms of a version; a name that this doesn't give is looked for as a symbol.
template <typename Function>
bool Find(Function& to, const char* name, const char* symbol = nullptr) {
  void* found = nullptr;
  if (driver.get_proc_address == nullptr || driver.get_proc_address(name, &found, kVersion, 0, nullptr) != 0) found = nullptr;
  if (found == nullptr) found = dlsym(library, symbol ? symbol : name);
  to = reinterpret_cast<Function>(found);
  return to != nullptr;
}

// Runs `work` on the pool; `settle` makes of it what the promise resolves to.
class Call : public Napi::AsyncWorker {
 public:
  using Settle = std::function<Napi::Value(Napi::Env)>;
  static Napi::Value Start(Napi::Env env, std::function<void()> work, Settle settle) {
    auto* call = new Call(env, std::move(work), std::move(settle));
    Napi::Promise promise = call->deferred_.Promise();
    call->Queue();
    return promise;
  }

  void Execute() override { work_(); }
  void OnOK() override {
    Napi::HandleScope scope(Env());
    deferred_.Resolve(settle_(Env()));
  }
  void OnError(const Napi::Error& error) override { deferred_.Reject(error.Value()); }

 private:
  Call(Napi::Env env, std::function<void()> work, Settle settle)
      : Napi::AsyncWorker(env), deferred_(Napi::Promise::Deferred::New(env)), work_(std::move(work)), settle_(std::move(settle)) {}

  Napi::Promise::Deferred deferred_;
  std::function<void()> work_;
  Settle settle_;
};

struct Device {
  Uuid uuid;
  char name[128];
  size_t memory;
  char pci_bus_id[32];
};

template <typename Function>
void Require(Napi::Env env, Function function, const char* name) {
  if (function == nullptr) throw Napi::Error::New(env, std::string("the driver has no ") + name);
}

// A call that takes a pid alone and its struct, and gives a code.
Napi::Value CodeOf(Napi::Env env, std::function<Result()> work) {
  auto code = std::make_shared<Result>(0);
  return Call::Start(
      env, [=] { *code = work(); }, [=](Napi::Env env) { return Napi::Number::New(env, *code); });
}

}  // namespace

// cudaOpen(path): loads the library; what it has of the checkpoint calls, symbol by symbol.
Napi::Value CudaOpen(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  std::string path = PathArgument(info, 0, "path");
  if (library != nullptr) throw Napi::Error::New(env, "a driver is loaded already");
  library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    throw Napi::Error::New(env, reason ? reason : "dlopen failed");
  }
  driver.get_proc_address = reinterpret_cast<decltype(driver.get_proc_address)>(dlsym(library, "cuGetProcAddress_v2"));
  Napi::Object result = Napi::Object::New(env);
  auto probe = [&](auto& to, const char* name, const char* symbol = nullptr) {
    result.Set(name, Napi::Boolean::New(env, Find(to, name, symbol)));
  };
  probe(driver.init, "cuInit");
  probe(driver.driver_get_version, "cuDriverGetVersion");
  probe(driver.get_error_name, "cuGetErrorName");
  probe(driver.device_get_count, "cuDeviceGetCount");
  probe(driver.device_get, "cuDeviceGet");
  probe(driver.device_get_name, "cuDeviceGetName");
  probe(driver.device_get_uuid, "cuDeviceGetUuid", "cuDeviceGetUuid_v2");
  probe(driver.device_total_mem, "cuDeviceTotalMem", "cuDeviceTotalMem_v2");
  probe(driver.device_get_pci_bus_id, "cuDeviceGetPCIBusId");
  probe(driver.get_state, "cuCheckpointProcessGetState");
  probe(driver.get_restore_thread_id, "cuCheckpointProcessGetRestoreThreadId");
  probe(driver.lock, "cuCheckpointProcessLock");
  probe(driver.checkpoint, "cuCheckpointProcessCheckpoint");
  probe(driver.restore, "cuCheckpointProcessRestore");
  probe(driver.unlock, "cuCheckpointProcessUnlock");
  return result;
}

// cudaInit(): cuInit; resolves to its code
Napi::Value CudaInit(const Napi::CallbackInfo& info) {
  Require(info.Env(), driver.init, "cuInit");
  return CodeOf(info.Env(), [] { return driver.init(0); });
}

// cudaDriverVersion(): as cuDriverGetVersion says it, 13000 for 13.0; needs no cuInit
Napi::Value CudaDriverVersion(const Napi::CallbackInfo& info) {
  Require(info.Env(), driver.driver_get_version, "cuDriverGetVersion");
  auto code = std::make_shared<Result>(0);
  auto version = std::make_shared<int>(0);
  return Call::Start(
      info.Env(), [=] { *code = driver.driver_get_version(version.get()); },
      [=](Napi::Env env) { return Napi::Number::New(env, *code == 0 ? *version : -*code); });
}

// cudaErrorName(code)
Napi::Value CudaErrorName(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int code = IntArgument(info, 0, "code");
  const char* name = nullptr;
  if (driver.get_error_name == nullptr || driver.get_error_name(code, &name) != 0 || name == nullptr)
    return Napi::String::New(env, "CUDA error " + std::to_string(code));
  return Napi::String::New(env, name);
}

// cudaDevices(): after cudaInit. Resolves to a code that isn't 0, or to the list.
Napi::Value CudaDevices(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  Require(env, driver.device_get_count, "cuDeviceGetCount");
  Require(env, driver.device_get, "cuDeviceGet");
  Require(env, driver.device_get_uuid, "cuDeviceGetUuid");
  auto code = std::make_shared<Result>(0);
  auto found = std::make_shared<std::vector<Device>>();
  auto work = [=] {
    int count = 0;
    *code = driver.device_get_count(&count);
    for (int i = 0; i < count && *code == 0; i++) {
      Device device = {};
      int handle = 0;
      *code = driver.device_get(&handle, i);
      if (*code == 0) *code = driver.device_get_uuid(&device.uuid, handle);
      if (*code == 0 && driver.device_get_name) *code = driver.device_get_name(device.name, sizeof(device.name) - 1, handle);
      if (*code == 0 && driver.device_total_mem) *code = driver.device_total_mem(&device.memory, handle);
      if (*code == 0 && driver.device_get_pci_bus_id)
        *code = driver.device_get_pci_bus_id(device.pci_bus_id, sizeof(device.pci_bus_id) - 1, handle);
      found->push_back(device);
    }
  };
  return Call::Start(env, work, [=](Napi::Env env) -> Napi::Value {
    if (*code != 0) return Napi::Number::New(env, *code);
    Napi::Array list = Napi::Array::New(env, found->size());
    for (uint32_t i = 0; i < found->size(); i++) {
      const Device& device = (*found)[i];
      Napi::Object object = Napi::Object::New(env);
      object.Set("uuid", Napi::Buffer<unsigned char>::Copy(env, device.uuid.bytes, sizeof(device.uuid.bytes)));
      object.Set("name", Napi::String::New(env, device.name));
      object.Set("memoryBytes", Napi::Number::New(env, static_cast<double>(device.memory)));
      object.Set("pciBusId", Napi::String::New(env, device.pci_bus_id));
      list.Set(i, object);
    }
    return list;
  });
}

// cudaState(pid), cudaRestoreThread(pid): resolve to [code, value]
static Napi::Value ValueOf(const Napi::CallbackInfo& info, Result (*call)(int, int*), const char* name) {
  Napi::Env env = info.Env();
  Require(env, call, name);
  int pid = IntArgument(info, 0, "pid", 1);
  auto code = std::make_shared<Result>(0);
  auto value = std::make_shared<int>(0);
  return Call::Start(
      env, [=] { *code = call(pid, value.get()); },
      [=](Napi::Env env) {
        Napi::Array pair = Napi::Array::New(env, 2);
        pair.Set(0u, Napi::Number::New(env, *code));
        pair.Set(1u, Napi::Number::New(env, *value));
        return pair;
      });
}
Napi::Value CudaState(const Napi::CallbackInfo& info) { return ValueOf(info, driver.get_state, "cuCheckpointProcessGetState"); }
Napi::Value CudaRestoreThread(const Napi::CallbackInfo& info) {
  return ValueOf(info, driver.get_restore_thread_id, "cuCheckpointProcessGetRestoreThreadId");
}

// cudaLock(pid, timeoutMs), 0: for ever
Napi::Value CudaLock(const Napi::CallbackInfo& info) {
  Require(info.Env(), driver.lock, "cuCheckpointProcessLock");
  int pid = IntArgument(info, 0, "pid", 1);
  unsigned timeout = static_cast<unsigned>(IntArgument(info, 1, "timeoutMs"));
  return CodeOf(info.Env(), [=] {
    LockArgs args = {};
    args.timeout_ms = timeout;
    return driver.lock(pid, &args);
  });
}

// cudaCheckpoint(pid)
Napi::Value CudaCheckpoint(const Napi::CallbackInfo& info) {
  Require(info.Env(), driver.checkpoint, "cuCheckpointProcessCheckpoint");
  int pid = IntArgument(info, 0, "pid", 1);
  return CodeOf(info.Env(), [=] {
    EmptyArgs args = {};
    return driver.checkpoint(pid, &args);
  });
}

// cudaRestore(pid, pairs): pairs is a Buffer of old and new UUID by turns, 32 bytes a pair; empty: every GPU as it was
Napi::Value CudaRestore(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  Require(env, driver.restore, "cuCheckpointProcessRestore");
  int pid = IntArgument(info, 0, "pid", 1);
  if (info.Length() < 2 || !info[1].IsBuffer()) throw Napi::TypeError::New(env, "pairs must be a Buffer");
  auto bytes = info[1].As<Napi::Buffer<unsigned char>>();
  if (bytes.Length() % sizeof(GpuPair) != 0) throw Napi::TypeError::New(env, "pairs must have 32 bytes each");
  auto pairs = std::make_shared<std::vector<GpuPair>>(bytes.Length() / sizeof(GpuPair));
  if (bytes.Length() > 0) memcpy(pairs->data(), bytes.Data(), bytes.Length());
  return CodeOf(env, [=] {
    RestoreArgs args = {};
    args.pairs = pairs->empty() ? nullptr : pairs->data();
    args.count = static_cast<uint32_t>(pairs->size());
    return driver.restore(pid, &args);
  });
}

// cudaUnlock(pid)
Napi::Value CudaUnlock(const Napi::CallbackInfo& info) {
  Require(info.Env(), driver.unlock, "cuCheckpointProcessUnlock");
  int pid = IntArgument(info, 0, "pid", 1);
  return CodeOf(info.Env(), [=] {
    EmptyArgs args = {};
    return driver.unlock(pid, &args);
  });
}

// ---- NVML (libnvidia-ml.so.1): what the driver knows of its devices. Prototypes in own words. ----

namespace {

using NvmlDevice = struct NvmlDeviceOpaque*;
struct NvmlMemory {
  unsigned long long total, free, used;
};
// Of nvmlDeviceGetComputeRunningProcesses_v3.
struct NvmlProcess {
  unsigned pid;
  unsigned long long used_bytes;
  unsigned gpu_instance, compute_instance;
};

constexpr int kNvmlInsufficientSize = 7;
constexpr unsigned long long kNvmlNotAvailable = ~0ull;  // NVML_VALUE_NOT_AVAILABLE

struct NvmlAnswer {
  std::string error;  // empty: it worked
  std::string driver;
  struct Device {
    std::string uuid, name;
    double total = -1, used = -1;
    int mig = -1, persistence = -1;  // -1: it doesn't say
    std::vector<NvmlProcess> processes;
  };
  std::vector<Device> devices;
};

void AskNvml(const std::string& path, NvmlAnswer* answer) {
  std::unique_ptr<void, int (*)(void*)> nvml(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL), dlclose);
  if (!nvml) {
    const char* reason = dlerror();
    answer->error = reason ? reason : "dlopen failed";
    return;
  }
  auto find = [&](const char* name) { return dlsym(nvml.get(), name); };
  auto init = reinterpret_cast<int (*)()>(find("nvmlInit_v2"));
  auto shutdown = reinterpret_cast<int (*)()>(find("nvmlShutdown"));
  auto driver_version = reinterpret_cast<int (*)(char*, unsigned)>(find("nvmlSystemGetDriverVersion"));
  auto count_of = reinterpret_cast<int (*)(unsigned*)>(find("nvmlDeviceGetCount_v2"));
  auto by_index = reinterpret_cast<int (*)(unsigned, NvmlDevice*)>(find("nvmlDeviceGetHandleByIndex_v2"));
  auto uuid_of = reinterpret_cast<int (*)(NvmlDevice, char*, unsigned)>(find("nvmlDeviceGetUUID"));
  auto name_of = reinterpret_cast<int (*)(NvmlDevice, char*, unsigned)>(find("nvmlDeviceGetName"));
  auto memory_of = reinterpret_cast<int (*)(NvmlDevice, NvmlMemory*)>(find("nvmlDeviceGetMemoryInfo"));
  auto mig_of = reinterpret_cast<int (*)(NvmlDevice, unsigned*, unsigned*)>(find("nvmlDeviceGetMigMode"));
  auto persistence_of = reinterpret_cast<int (*)(NvmlDevice, unsigned*)>(find("nvmlDeviceGetPersistenceMode"));
  auto processes_of =
      reinterpret_cast<int (*)(NvmlDevice, unsigned*, NvmlProcess*)>(find("nvmlDeviceGetComputeRunningProcesses_v3"));
  if (!init || !shutdown || !count_of || !by_index || !uuid_of) {
    answer->error = path + " lacks what every NVML has";
    return;
  }
  if (int code = init(); code != 0) {
    answer->error = "nvmlInit: error " + std::to_string(code);
    return;
  }
  char text[128] = "";
  if (driver_version && driver_version(text, sizeof(text)) == 0) answer->driver = text;
  unsigned count = 0;
  if (int code = count_of(&count); code != 0) answer->error = "nvmlDeviceGetCount: error " + std::to_string(code);
  for (unsigned i = 0; i < count; i++) {
    NvmlDevice handle = nullptr;
    if (int code = by_index(i, &handle); code != 0) {
      answer->error = "device " + std::to_string(i) + " of NVML: error " + std::to_string(code);
      break;
    }
    NvmlAnswer::Device device;
    if (uuid_of(handle, text, sizeof(text)) == 0) device.uuid = text;
    if (name_of && name_of(handle, text, sizeof(text)) == 0) device.name = text;
    NvmlMemory memory = {};
    if (memory_of && memory_of(handle, &memory) == 0) {
      device.total = static_cast<double>(memory.total);
      device.used = static_cast<double>(memory.used);
    }
    unsigned mode = 0, pending = 0;
    if (mig_of && mig_of(handle, &mode, &pending) == 0) device.mig = static_cast<int>(mode);
    if (persistence_of && persistence_of(handle, &mode) == 0) device.persistence = static_cast<int>(mode);
    if (processes_of) {
      unsigned found = 64;
      int code;
      do {
        device.processes.resize(found);
        code = processes_of(handle, &found, device.processes.data());
        found += code == kNvmlInsufficientSize ? 16 : 0;  // more have come meanwhile
      } while (code == kNvmlInsufficientSize && found < 65536);
      device.processes.resize(code == 0 ? found : 0);
    }
    answer->devices.push_back(std::move(device));
  }
  shutdown();
}

}  // namespace

// nvmlQuery(path): opens NVML, asks, and closes it again, so that nothing of it stays open. Rejects when it can't be asked.
Napi::Value NvmlQuery(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  std::string path = PathArgument(info, 0, "path");
  auto answer = std::make_shared<NvmlAnswer>();
  return Call::Start(
      env, [=] { AskNvml(path, answer.get()); },
      [=](Napi::Env env) -> Napi::Value {
        Napi::Object result = Napi::Object::New(env);
        if (!answer->error.empty()) {
          result.Set("error", Napi::String::New(env, answer->error));
          return result;
        }
        result.Set("driver", Napi::String::New(env, answer->driver));
        Napi::Array devices = Napi::Array::New(env, answer->devices.size());
        for (uint32_t i = 0; i < answer->devices.size(); i++) {
          const auto& device = answer->devices[i];
          Napi::Object object = Napi::Object::New(env);
          auto known = [&](const char* name, double value) {
            if (value >= 0) object.Set(name, Napi::Number::New(env, value));
          };
          object.Set("uuid", Napi::String::New(env, device.uuid));
          object.Set("name", Napi::String::New(env, device.name));
          known("memoryBytes", device.total);
          known("usedBytes", device.used);
          known("migMode", device.mig);
          known("persistenceMode", device.persistence);
          Napi::Array processes = Napi::Array::New(env, device.processes.size());
          for (uint32_t p = 0; p < device.processes.size(); p++) {
            Napi::Object process = Napi::Object::New(env);
            process.Set("pid", Napi::Number::New(env, device.processes[p].pid));
            if (device.processes[p].used_bytes != kNvmlNotAvailable)
              process.Set("usedBytes", Napi::Number::New(env, static_cast<double>(device.processes[p].used_bytes)));
            processes.Set(p, process);
          }
          object.Set("processes", processes);
          devices.Set(i, object);
        }
        result.Set("devices", devices);
        return result;
      });
}
