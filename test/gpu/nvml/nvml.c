/* The stand-in's NVML (test code): devices as the GPU directory has them, and who has a mailbox of the stand-in driver computes on all. */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
struct device { char uuid[64], chip[64]; unsigned long long memory; };
static struct device devices[8];
static unsigned count;
static char switches[4096];

static const char *directory(void) {
  const char *given = getenv("CEDANA_TEST_GPU_DIR");
  return given ? given : "/tmp/cedana-test-gpu";
}
static int has(const char *word) { return strstr(switches, word) != NULL; }

EXPORT int nvmlInit_v2(void) {
  char path[600], line[256];
  count = 0;
  *switches = 0;
  snprintf(path, sizeof path, "%s/faults", directory());
  FILE *file = fopen(path, "re");
  if (file) {
    switches[fread(switches, 1, sizeof switches - 1, file)] = 0;
    fclose(file);
  }
  /* For tests that want to know whether anybody has asked: a line in the file `queries`, where there is one. */
  snprintf(path, sizeof path, "%s/queries", directory());
  if (!access(path, W_OK) && (file = fopen(path, "ae"))) {
    fprintf(file, "nvml by %d\n", getpid());
    fclose(file);
  }
  if (has("nvml=off")) return 9; /* driver not loaded */
  snprintf(path, sizeof path, "%s/devices", directory());
  file = fopen(path, "re");
  if (!file) {
    for (; count < 2; count++) {
      snprintf(devices[count].chip, sizeof devices[count].chip, "STANDIN-1");
      for (int i = 0; i < 16; i++) sprintf(devices[count].uuid + 2 * i, "%02x", 0xa0 + count);
      devices[count].memory = 64ull << 20;
    }
    return 0;
  }
  while (count < 8 && fgets(line, sizeof line, file)) {
    unsigned long mib;
    if (sscanf(line, "%63s %63s %lu", devices[count].uuid, devices[count].chip, &mib) == 3)
      devices[count++].memory = (unsigned long long)mib << 20;
  }
  fclose(file);
  return 0;
}
EXPORT int nvmlShutdown(void) { return 0; }
EXPORT int nvmlSystemGetDriverVersion(char *text, unsigned length) { return snprintf(text, length, "999.stand-in") < 0; }
EXPORT int nvmlDeviceGetCount_v2(unsigned *found) { return *found = count, 0; }
EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct device **device) {
  if (index >= count) return 2;
  *device = &devices[index];
  return 0;
}
EXPORT int nvmlDeviceGetUUID(struct device *device, char *text, unsigned length) {
  const char *u = device->uuid;
  return snprintf(text, length, "GPU-%.8s-%.4s-%.4s-%.4s-%.12s", u, u + 8, u + 12, u + 16, u + 20) < 0;
}
EXPORT int nvmlDeviceGetName(struct device *device, char *text, unsigned length) { return snprintf(text, length, "%s", device->chip) < 0; }
EXPORT int nvmlDeviceGetMemoryInfo(struct device *device, unsigned long long *memory) {
  memory[0] = memory[1] = device->memory;
  memory[2] = 0;
  return 0;
}
EXPORT int nvmlDeviceGetMigMode(struct device *device, unsigned *now, unsigned *pending) {
  (void)device;
  return *now = *pending = has("mig=on"), 0;
}
EXPORT int nvmlDeviceGetPersistenceMode(struct device *device, unsigned *mode) {
  (void)device;
  return *mode = !has("persistence=off"), 0;
}
struct process { unsigned pid; unsigned long long used; unsigned gpu, compute; };
EXPORT int nvmlDeviceGetComputeRunningProcesses_v3(struct device *device, unsigned *room, struct process *processes) {
  (void)device;
  unsigned found = 0;
  DIR *proc = opendir("/proc");
  for (struct dirent *entry; proc && (entry = readdir(proc));) {
    char path[300], link[64];
    if (!isdigit((unsigned char)*entry->d_name)) continue;
    snprintf(path, sizeof path, "/proc/%.20s/fd", entry->d_name);
    DIR *fds = opendir(path);
    for (struct dirent *fd; fds && (fd = readdir(fds));) {
      ssize_t n = readlinkat(dirfd(fds), fd->d_name, link, sizeof link - 1);
      if (n <= 0) continue;
      link[n] = 0;
      if (strncmp(link, "/memfd:cedana-test-gpu", 22)) continue;
      if (found < *room) processes[found] = (struct process){(unsigned)atoi(entry->d_name), has("memory=unknown") ? ~0ull : has("memory=huge") ? 1ull << 50 : 1 << 20, 0, 0};
      found++;
      break;
    }
    if (fds) closedir(fds);
  }
  if (proc) closedir(proc);
  int code = found > *room ? 7 : 0;
  *room = found;
  return code;
}
