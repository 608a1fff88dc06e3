/* NVIDIA's program, as far as its documentation says what it does, over whatever libcuda.so.1 is found (test code). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "../cuda-abi.h"

static void *find(const char *name) {
  static void *library;
  if (!library) library = dlopen("libcuda.so.1", RTLD_NOW);
  void *found = library ? dlsym(library, name) : NULL;
  if (!found) {
    fprintf(stderr, "%s not found\n", name);
    exit(1);
  }
  return found;
}
static int fail(const char *what, int code) {
  if (code) fprintf(stderr, "%s: CUDA error %d\n", what, code);
  return code != 0;
}
static void uuid(const char *text, CUuuid *to) {
  int digits = 0;
  for (text += strncmp(text, "GPU-", 4) ? 0 : 4; *text && digits < 32; text++) {
    if (*text == '-') continue;
    char two[2] = {*text, 0};
    unsigned char *byte = (unsigned char *)&to->bytes[digits++ / 2];
    *byte = (unsigned char)(*byte << 4 | strtoul(two, NULL, 16));
  }
}
int main(int argc, char **argv) {
  const char *action = NULL, *map = NULL;
  int pid = 0, timeout = 0, state = 0, tid = 0;
  for (int i = 1; i < argc; i++) {
    const char *value = i + 1 < argc ? argv[i + 1] : "";
    if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) return puts("--get-state --get-restore-tid --action --pid --timeout --device-map"), 0;
    if (!strcmp(argv[i], "--get-state")) state = 1;
    else if (!strcmp(argv[i], "--get-restore-tid")) tid = 1;
    else if (!strcmp(argv[i], "--action")) action = value, i++;
    else if (!strcmp(argv[i], "--pid")) pid = atoi(value), i++;
    else if (!strcmp(argv[i], "--timeout")) timeout = atoi(value), i++;
    else if (!strcmp(argv[i], "--device-map")) map = value, i++;
  }
  if (tid) {
    int found;
    CUresult (*get)(int, int *) = find("cuCheckpointProcessGetRestoreThreadId");
    int code = get(pid, &found);
    if (!code) printf("%d\n", found);
    return fail("get-restore-tid", code);
  }
  if (state) {
    static const char *const names[] = {"running", "locked", "checkpointed", "failed"};
    CUprocessState found;
    CUresult (*get)(int, CUprocessState *) = find("cuCheckpointProcessGetState");
    int code = get(pid, &found);
    if (!code) puts(names[found]);
    return fail("get-state", code);
  }
  if (action && !strcmp(action, "lock")) {
    CUcheckpointLockArgs args = {.timeoutMs = (unsigned)timeout};
    CUresult (*lock)(int, CUcheckpointLockArgs *) = find("cuCheckpointProcessLock");
    return fail("lock", lock(pid, &args));
  }
  if (action && !strcmp(action, "restore")) {
    CUcheckpointGpuPair pairs[8] = {0};
    CUcheckpointRestoreArgs args = {.gpuPairs = pairs};
    char copy[1024];
    snprintf(copy, sizeof copy, "%s", map ? map : "");
    for (char *rest = copy, *pair; *copy && (pair = strsep(&rest, ","));) {
      char *to = strchr(pair, '=');
      uuid(pair, &pairs[args.gpuPairsCount].oldUuid);
      uuid(to + 1, &pairs[args.gpuPairsCount++].newUuid);
    }
    if (!args.gpuPairsCount) args.gpuPairs = NULL;
    CUresult (*init)(unsigned) = find("cuInit");
    CUresult (*restore)(int, CUcheckpointRestoreArgs *) = find("cuCheckpointProcessRestore");
    init(0);
    return fail("restore", restore(pid, &args));
  }
  if (action) {
    int checkpoint = !strcmp(action, "checkpoint");
    CUcheckpointCheckpointArgs args = {0};
    CUresult (*call)(int, void *) = find(checkpoint ? "cuCheckpointProcessCheckpoint" : "cuCheckpointProcessUnlock");
    return fail(action, call(pid, &args));
  }
  return 2;
}
