/*
 * Finding the driver behind us, and what cuGetProcAddress answers.
 *
 * By name nobody can open it any more: the dynamic linker takes us for libcuda.so.1, which is the purpose. By an absolute path it
 * can, and keeps both apart (glibc compares paths and inodes there, not SONAMEs). A namespace of its own (dlmopen) would bring a second
 * libc with its own threads and is no way. So its directory must be found as the linker would have: CEDANA_GPU_LIBCUDA (a
 * file), LD_LIBRARY_PATH, the linker's cache, the usual places. An rpath of the program is not looked at.
 *
 * cuGetProcAddress is how newer programs, and every runtime library since 11.3, come by their functions. The driver is asked first, with
 * the caller's version and flags, so that which variant it is (_v2, _ptsz, a future one) is the driver's to say; what it answers is
 * replaced by our export for that same address. An address that no export has gets one of the spare trampolines: the frame needs no
 * prototype. cuGetExportTable gives private tables that the runtime checks the integrity of: it is passed on untouched.
 */
#include "gpu.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define LIBRARY "libcuda.so.1"
#define PATH_BYTES 4096

/* Tells a copy of this library from a driver. */
EXPORT extern const uint32_t cedana_gpu_interception;
const uint32_t cedana_gpu_interception = MAILBOX_VERSION;

extern const void *const cedana_gpu_exports[NAME_COUNT] __attribute__((visibility("hidden")));
extern const char cedana_gpu_spares[] __attribute__((visibility("hidden")));
#define TRAMPOLINE_BYTES 16

static void *driver; /* from dlopen */
static uint32_t looked;

static void *try_open(const char *path) {
  if (kernel(SYS_access, (long)path, 4 /* R_OK */, 0, 0, 0, 0) != 0) return NULL;
  void *handle = library_open(path);
  if (!handle) return NULL;
  if (!library_symbol(handle, "cedana_gpu_interception") && library_symbol(handle, "cuInit")) return handle;
  library_close(handle);
  return NULL;
}

static void *try_directory(const char *directory, size_t length) {
  char path[PATH_BYTES];
  if (length == 0 || length + sizeof LIBRARY + 1 > sizeof path) return NULL;
  memcpy(path, directory, length);
  path[length] = '/';
  memcpy(path + length + 1, LIBRARY, sizeof LIBRARY);
  return try_open(path);
}

static void *try_directories(const char *list) {
  for (const char *at = list; at && *at;) {
    size_t length = strcspn(at, ":;");
    void *handle = try_directory(at, length);
    if (handle) return handle;
    at += length + (at[length] != 0);
  }
  return NULL;
}

/*
 * The linker's cache, in the format that glibc writes since 2.32 alone and before that behind an old one.
 *   at  size  field
 *   0   20    "glibc-ld.so.cache1.1"
 *   20  4     number of entries
 *   24  24    lengths, flags, unused
 *   48  24    for each entry: flags, name, path (offsets from the header), osversion, hwcap
 */
struct cache_entry {
  int32_t flags;
  uint32_t name, path, osversion;
  uint64_t hwcap;
};

static void *try_cache(const char *map, size_t size) {
  static const char magic[] = "glibc-ld.so.cache1.1";
  const char *header = NULL;
  if (size > 48 && !memcmp(map, magic, sizeof magic - 1)) header = map;
  if (!header && size > 64 && !memcmp(map, "ld.so-1.7.0", 11)) {
    uint32_t count;
    memcpy(&count, map + 12, sizeof count);
    size_t at = (16 + (size_t)count * 12 + 7) & ~(size_t)7;
    if (at + 48 < size && !memcmp(map + at, magic, sizeof magic - 1)) header = map + at, size -= at;
  }
  if (!header || map[0] == 0) return NULL;
  uint32_t count;
  memcpy(&count, header + 20, sizeof count);
  if (count > (size - 48) / sizeof(struct cache_entry)) return NULL;
  for (uint32_t i = 0; i < count; i++) {
    struct cache_entry entry;
    memcpy(&entry, header + 48 + i * sizeof entry, sizeof entry);
    if (entry.name >= size || entry.path >= size || (entry.flags & 0xff00) != 0x0300) continue; /* 0x03: x86-64 */
    if (size - entry.name < sizeof LIBRARY || memcmp(header + entry.name, LIBRARY, sizeof LIBRARY) != 0) continue;
    if (!memchr(header + entry.path, 0, size - entry.path)) continue;
    void *handle = try_open(header + entry.path);
    if (handle) return handle;
  }
  return NULL;
}

static void *try_linker_cache(void) {
  long fd = kernel(SYS_open, (long)"/etc/ld.so.cache", O_RDONLY | O_CLOEXEC, 0, 0, 0, 0);
  if (fd < 0) return NULL;
  long size = kernel(SYS_lseek, fd, 0, 2 /* SEEK_END */, 0, 0, 0);
  void *handle = NULL;
  long map = size > 0 ? kernel(SYS_mmap, 0, size, PROT_READ, MAP_PRIVATE, fd, 0) : -1;
  kernel(SYS_close, fd, 0, 0, 0, 0, 0);
  if (map < 0 && map > -4096) return NULL;
  handle = try_cache((const char *)map, (size_t)size);
  kernel(SYS_munmap, map, size, 0, 0, 0, 0);
  return handle;
}

static void *find_driver(void) {
  static const char usual[] =
      "/usr/lib/x86_64-linux-gnu:/usr/lib64:/usr/lib:/lib/x86_64-linux-gnu:/lib64:/usr/local/nvidia/lib64:/usr/lib/nvidia:"
      "/run/opengl-driver/lib:/usr/lib/wsl/lib";
  const char *file = getenv("CEDANA_GPU_LIBCUDA");
  if (file && *file == '/') return try_open(file); /* named: no other will do */
  void *handle = try_directories(getenv("LD_LIBRARY_PATH"));
  if (!handle) handle = try_linker_cache();
  if (!handle) handle = try_directories(usual);
  return handle;
}

/* Two threads may both look: the linker counts, and both find the same. A lock here could meet the linker's own the wrong way round. */
static void *driver_handle(void) {
  if (!__atomic_load_n(&looked, __ATOMIC_ACQUIRE)) {
    void *found = find_driver(), *nothing = NULL;
    __atomic_compare_exchange_n(&driver, &nothing, found, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    __atomic_store_n(&looked, 1, __ATOMIC_RELEASE);
  }
  return __atomic_load_n(&driver, __ATOMIC_ACQUIRE);
}

bool driver_present(void) {
  return driver_handle() != NULL;
}

void *driver_symbol(const char *name) {
  void *handle = driver_handle();
  return handle ? library_symbol(handle, name) : NULL;
}

void *driver_entry(uint32_t index) {
  struct entry *entry = &entries[index];
  void *target = __atomic_load_n(&entry->target, __ATOMIC_ACQUIRE);
  if (target || __atomic_load_n(&entry->missing, __ATOMIC_RELAXED)) return target;
  target = driver_symbol(entry->name);
  if (target) __atomic_store_n(&entry->target, target, __ATOMIC_RELEASE);
  else __atomic_store_n(&entry->missing, 1, __ATOMIC_RELAXED);
  return target;
}

void *export_of(uint32_t index) {
  if (index < NAME_COUNT) return (void *)(uintptr_t)cedana_gpu_exports[index];
  return (void *)(uintptr_t)(cedana_gpu_spares + (size_t)(index - NAME_COUNT) * TRAMPOLINE_BYTES);
}

bool same_base(const char *name, const char *base) {
  size_t length = strlen(base);
  if (strncmp(name, base, length) != 0) return false;
  const char *rest = name + length;
  if (rest[0] == '_' && rest[1] == 'v' && rest[2] >= '1' && rest[2] <= '9') rest += 3;
  return !*rest || !strcmp(rest, "_ptds") || !strcmp(rest, "_ptsz");
}

/* ---- from the driver's addresses to ours ---- */

static struct address {
  void *target;
  uint32_t index;
} *addresses; /* sorted by target */
static uint32_t address_count;

static void sift(struct address *list, size_t at, size_t count) {
  for (size_t child; (child = 2 * at + 1) < count; at = child) {
    if (child + 1 < count && list[child].target < list[child + 1].target) child++;
    if (list[at].target >= list[child].target) return;
    struct address swap = list[at];
    list[at] = list[child];
    list[child] = swap;
  }
}

/* All names once; a quarter of a millisecond, and only where a program asks for functions in this way. */
static const struct address *address_list(void) {
  struct address *known = __atomic_load_n(&addresses, __ATOMIC_ACQUIRE);
  if (known) return known;
  struct address *list = keep(NAME_COUNT * sizeof *list);
  if (!list) return NULL;
  uint32_t count = 0;
  for (uint32_t i = 0; i < NAME_COUNT; i++)
    if ((list[count].target = driver_entry(i))) list[count++].index = i;
  for (size_t at = count / 2; at-- > 0;) sift(list, at, count);
  for (size_t left = count; left-- > 1;) {
    struct address swap = list[0];
    list[0] = list[left];
    list[left] = swap;
    sift(list, 0, left);
  }
  __atomic_store_n(&address_count, count, __ATOMIC_RELAXED);
  if (!__atomic_compare_exchange_n(&addresses, &known, list, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return known;
  return list;
}

/* Where names share an address, the one that was asked for. */
static int64_t index_of_address(void *target, const char *name) {
  const struct address *list = address_list();
  if (!list) return -1;
  size_t low = 0, high = address_count;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (list[middle].target < target) low = middle + 1;
    else high = middle;
  }
  if (low == address_count || list[low].target != target) return -1;
  for (size_t at = low; at < address_count && list[at].target == target; at++)
    if (same_base(entries[list[at].index].name, name)) return list[at].index;
  return list[low].index;
}

static uint32_t spares_used;

static int64_t spare_for(void *target, const char *name, int version) {
  size_t length = strlen(name) + 1;
  if (length > 128) return -1;
  int64_t found = -1;
  char *copy = keep(length);
  if (!copy) return -1;
  memcpy(copy, name, length);
  lock(&process->lock_spare);
  for (uint32_t i = 0; i < spares_used && found < 0; i++)
    if (entries[NAME_COUNT + i].target == target && !strcmp(entries[NAME_COUNT + i].name, name)) found = NAME_COUNT + i;
  if (found < 0 && spares_used < SPARE_COUNT) {
    struct entry *entry = &entries[found = NAME_COUNT + spares_used++];
    entry->name = copy;
    entry->rule = rule_of(name, version);
    entry->ungated = rule_is_ungated(entry->rule);
    __atomic_store_n(&entry->target, target, __ATOMIC_RELEASE);
  }
  unlock(&process->lock_spare);
  return found;
}

enum {
#define INDEX(function, at) INDEX_##function = at,
  NAMES(INDEX)
#undef INDEX
};

/* The two forms take different arguments; the driver's address may be of neither export. Then the version says which (12.0 made it). */
#define SECOND_FORM_SINCE 12000

/* What a program gets for the address that the driver gave. */
static void *replace(const char *symbol, void *target, int version) {
  if (!target || !symbol || !strcmp(symbol, "cuGetExportTable")) return target;
  if (same_base(symbol, "cuGetProcAddress")) {
    if (target == driver_entry(INDEX_cuGetProcAddress_v2)) return export_of(INDEX_cuGetProcAddress_v2);
    if (target == driver_entry(INDEX_cuGetProcAddress)) return export_of(INDEX_cuGetProcAddress);
    return export_of(version >= SECOND_FORM_SINCE ? INDEX_cuGetProcAddress_v2 : INDEX_cuGetProcAddress);
  }
  int64_t index = index_of_address(target, symbol);
  if (index < 0) index = spare_for(target, symbol, version);
  return index < 0 ? target : export_of((uint32_t)index);
}

EXPORT int cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags);
EXPORT int cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status);
EXPORT int cuGetExportTable(const void **table, const void *id);

/*
 * The driver's answer to one of the two forms. A driver that has only the first form answers the second, too: what it lacks is the
 * reason, which its result stands for.
 */
static int ask(uint32_t index, const char *symbol, void **function, int version, uint64_t flags, int *status) {
  struct call call = {.index = index};
  int (*first)(const char *, void **, int, uint64_t);
  int (*second)(const char *, void **, int, uint64_t, int *);
  bool emulated = false;
  void *target = cedana_gpu_enter(&call);
  if (!target && index == INDEX_cuGetProcAddress_v2 && driver_present()) {
    call.index = INDEX_cuGetProcAddress;
    target = cedana_gpu_enter(&call);
    emulated = target != NULL;
  }
  if (!target) return (int)call.result;
  if (call.index == INDEX_cuGetProcAddress) {
    memcpy(&first, &target, sizeof first);
    call.result = first(symbol, function, version, flags);
    if (emulated && status) *status = call.result == CUDA_SUCCESS ? 0 : 1;
  } else {
    memcpy(&second, &target, sizeof second);
    call.result = second(symbol, function, version, flags, status);
  }
  if (call.result == CUDA_SUCCESS && function) *function = replace(symbol, *function, version);
  cedana_gpu_leave(&call);
  return (int)call.result;
}

EXPORT int cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags) {
  return ask(INDEX_cuGetProcAddress, symbol, function, version, flags, NULL);
}

EXPORT int cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
  return ask(INDEX_cuGetProcAddress_v2, symbol, function, version, flags, status);
}

/* Private tables, of which the runtime checks that nobody has changed them. */
EXPORT int cuGetExportTable(const void **table, const void *id) {
  void *target = driver_entry(INDEX_cuGetExportTable);
  if (!target) return driver_present() ? CUDA_ERROR_NOT_FOUND : CUDA_ERROR_NO_DEVICE;
  int (*function)(const void **, const void *);
  memcpy(&function, &target, sizeof function);
  return function(table, id);
}
