#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "driver.h"

struct devices devices;
bool initialised;

const char *gpu_directory(void) {
  const char *given = getenv("CEDANA_TEST_GPU_DIR");
  return given && *given ? given : "/tmp/cedana-test-gpu";
}

static bool parse_uuid(const char *text, CUuuid *uuid) {
  unsigned char *to = (unsigned char *)uuid->bytes;
  int digits = 0;
  for (; *text && digits < 32; text++) {
    if (*text == '-') continue;
    char two[3] = {*text, 0, 0};
    char *end;
    unsigned value = (unsigned)strtoul(two, &end, 16);
    if (*end) return false;
    to[digits / 2] = (unsigned char)(digits % 2 ? to[digits / 2] | value : value << 4);
    digits++;
  }
  return digits == 32;
}

/* The file `devices` of the GPU directory: a line per device, UUID, chip, MiB. Without it two of the same chip. */
struct devices devices_now(void) {
  struct devices found = {0};
  char path[600], line[256];
  snprintf(path, sizeof path, "%s/devices", gpu_directory());
  FILE *file = fopen(path, "re");
  if (!file) {
    for (int i = 0; i < 2; i++) {
      struct device *device = &found.at[found.count++];
      for (int b = 0; b < 16; b++) device->uuid.bytes[b] = (char)((0xa0 + i) & 0xff);
      snprintf(device->chip, sizeof device->chip, "STANDIN-1");
      device->memory = 64ull << 20;
    }
    return found;
  }
  while (found.count < MAX_DEVICES && fgets(line, sizeof line, file)) {
    char uuid[64], chip[64];
    unsigned long mib;
    struct device *device = &found.at[found.count];
    if (sscanf(line, "%63s %63s %lu", uuid, chip, &mib) != 3 || !parse_uuid(uuid, &device->uuid)) continue;
    snprintf(device->chip, sizeof device->chip, "%s", chip);
    device->memory = (uint64_t)mib << 20;
    found.count++;
  }
  fclose(file);
  return found;
}

/* Of all processes: their files say. */
uint64_t device_used(const struct device *device) {
  char path[600];
  unsigned char *u = (unsigned char *)device->uuid.bytes;
  snprintf(path, sizeof path, "%s/mem-%02x%02x%02x%02x", gpu_directory(), u[0], u[1], u[2], u[15]);
  DIR *directory = opendir(path);
  if (!directory) return 0;
  uint64_t used = 0;
  struct stat info;
  for (struct dirent *entry; (entry = readdir(directory));)
    if (entry->d_name[0] != '.' && !fstatat(dirfd(directory), entry->d_name, &info, 0)) used += (uint64_t)info.st_size;
  closedir(directory);
  return used;
}

static int held[MAX_DEVICES] = {-1, -1, -1, -1, -1, -1, -1, -1};

void device_hold(void) {
  for (int i = 0; i < devices.count; i++) {
    if (held[i] >= 0) continue;
    char path[32];
    snprintf(path, sizeof path, "/dev/nvidia%d", i);
    held[i] = open(path, O_RDWR | O_CLOEXEC);
    /* struct landlock_ruleset_attr; any process may have one, and CRIU dumps none */
    uint64_t attributes[2] = {1, 0};
    if (held[i] < 0) held[i] = (int)syscall(444 /* landlock_create_ruleset */, attributes, sizeof(uint64_t), 0);
    if (held[i] < 0) fprintf(stderr, "stand-in driver: nothing here that CRIU can't dump; a dump of a running process will not fail\n");
  }
}

void device_release(void) {
  for (int i = 0; i < MAX_DEVICES; i++) {
    if (held[i] >= 0) close(held[i]);
    held[i] = -1;
  }
}

EXPORT CUresult cuInit(unsigned flags) {
  static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
  if (flags) return CUDA_ERROR_INVALID_VALUE;
  pthread_mutex_lock(&once);
  CUresult result = CUDA_SUCCESS;
  if (!initialised) {
    devices = devices_now();
    result = devices.count == 0 ? CUDA_ERROR_NO_DEVICE : control_start();
    initialised = result == CUDA_SUCCESS;
  }
  pthread_mutex_unlock(&once);
  return result;
}

EXPORT CUresult cuDriverGetVersion(int *version) {
  if (!version) return CUDA_ERROR_INVALID_VALUE;
  *version = driver_version();
  return CUDA_SUCCESS;
}

#define CHECK_DEVICE(pointer, device)                                              \
  do {                                                                             \
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;                           \
    if (!(pointer)) return CUDA_ERROR_INVALID_VALUE;                               \
    if ((device) < 0 || (device) >= devices.count) return CUDA_ERROR_INVALID_DEVICE; \
  } while (0)

API(cuDeviceGetCount, (int *count), (count)) {
  CHECK_DEVICE(count, 0);
  *count = devices.count;
  return CUDA_SUCCESS;
}
API(cuDeviceGet, (CUdevice * device, int ordinal), (device, ordinal)) {
  CHECK_DEVICE(device, ordinal);
  *device = ordinal;
  return CUDA_SUCCESS;
}
API(cuDeviceGetName, (char *name, int length, CUdevice device), (name, length, device)) {
  CHECK_DEVICE(name, device);
  snprintf(name, (size_t)length, "%s", devices.at[device].chip);
  return CUDA_SUCCESS;
}
API(cuDeviceTotalMem_v2, (size_t * bytes, CUdevice device), (bytes, device)) {
  CHECK_DEVICE(bytes, device);
  *bytes = devices.at[device].memory;
  return CUDA_SUCCESS;
}
API(cuDeviceGetAttribute, (int *value, int attribute, CUdevice device), (value, attribute, device)) {
  CHECK_DEVICE(value, device);
  static const int known[][2] = {
      {1, 1024} /* threads per block */, {10, 32} /* warp */,  {16, 4} /* multiprocessors */, {33, 0} /* PCI bus */,
      {34, 0} /* PCI device, changed below */, {41, 1} /* unified addressing */, {75, 9} /* compute capability */, {76, 0},
      {83, 1} /* managed memory */,     {102, 1} /* VMM */};
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (known[i][0] == attribute) {
      *value = attribute == 34 ? device + 1 : known[i][1];
      return CUDA_SUCCESS;
    }
  return CUDA_ERROR_INVALID_VALUE;
}
API(cuDeviceGetUuid, (CUuuid * uuid, CUdevice device), (uuid, device)) {
  CHECK_DEVICE(uuid, device);
  *uuid = devices.at[device].uuid;
  return CUDA_SUCCESS;
}
API(cuDeviceGetUuid_v2, (CUuuid * uuid, CUdevice device), (uuid, device)) { return do_cuDeviceGetUuid(uuid, device); }
API(cuDeviceGetPCIBusId, (char *id, int length, CUdevice device), (id, length, device)) {
  CHECK_DEVICE(id, device);
  snprintf(id, (size_t)length, "0000:00:%02x.0", device + 1);
  return CUDA_SUCCESS;
}

static const struct { int code; const char *name, *text; } errors[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {401, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

static CUresult error_text(CUresult code, const char **text, bool name) {
  if (!text) return CUDA_ERROR_INVALID_VALUE;
  for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
    if (errors[i].code == code) {
      *text = name ? errors[i].name : errors[i].text;
      return CUDA_SUCCESS;
    }
  *text = NULL;
  return CUDA_ERROR_INVALID_VALUE;
}
EXPORT CUresult cuGetErrorName(CUresult code, const char **text) { return error_text(code, text, true); }
EXPORT CUresult cuGetErrorString(CUresult code, const char **text) { return error_text(code, text, false); }

/* Private tables of the runtime library's: there are none. */
EXPORT CUresult cuGetExportTable(const void **table, const CUuuid *id) {
  (void)id;
  if (table) *table = NULL;
  return CUDA_ERROR_NOT_FOUND;
}
