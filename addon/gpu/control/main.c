/*
 * cedana-gpu-control: speaks to the interception library in a process, over the mailbox (../mailbox.h, ../PROTOCOL.md).
 *
 *   cedana-gpu-control report  PID                              what the process has on its GPUs
 *   cedana-gpu-control quiesce PID [--deadline MS] [--lease MS] no call of the driver is under way, and none gets in
 *   cedana-gpu-control resume  PID                              calls go on
 *   cedana-gpu-control names   FILE                             entry points of a driver that the library lacks, one a line
 *
 * One line of JSON on stdout; for people's eyes on stderr when it fails. PID is as the caller sees it; the process may be in other
 * namespaces. Needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE (for /proc/PID/map_files).
 *
 * Exit status: 0 done; 1 refused, or not done by its deadline: the process runs as before; 2 wrong usage; 3 the process has no mailbox (no
 * library, or no call of the driver yet); 4 it doesn't answer (frozen, or gone).
 *
 * The process is not trusted: the mailbox is one only if it is sealed at its size, its text is copied and its numbers are only printed.
 */
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "mailbox.h"
#include "names.h"

/* The kernel's headers aren't musl's to find. */
#define FUTEX_WAIT 0
#define FUTEX_WAKE 1
#ifndef F_GET_SEALS
#define F_GET_SEALS 1034
#define F_SEAL_SHRINK 0x0002
#define F_SEAL_GROW 0x0004
#endif

enum { EXIT_REFUSED = 1, EXIT_USAGE = 2, EXIT_NO_MAILBOX = 3, EXIT_SILENT = 4 };

#define DEFAULT_DEADLINE_MS 10000u
#define DEFAULT_LEASE_MS 60000u
#define MAX_MS 3600000u
/* How long an answer may take beyond what the process was given. */
#define GRACE_MS 2000u

static const char *const memory_names[MEMORY_KINDS] = {"device", "pool", "managed", "virtual", "array", "pinned", "registered"};
static const char *const object_names[OBJECT_KINDS] = {"contexts", "streams", "events", "modules", "graphs"};
static const char *const blocker_names[BLOCKER_KINDS] = {
    [BLOCKER_MANAGED] = "managed memory (UVM)",
    [BLOCKER_IPC_MEMORY] = "memory of another process (IPC)",
    [BLOCKER_IPC_EVENT] = "an event of another process (IPC)",
    [BLOCKER_EXTERNAL_MEMORY] = "external memory",
    [BLOCKER_EXTERNAL_SEMAPHORE] = "an external semaphore",
    [BLOCKER_GRAPHICS] = "a resource shared with graphics",
    [BLOCKER_MULTICAST] = "a multicast object",
    [BLOCKER_EXPORTED_MEMORY] = "memory given to other processes (IPC)",
    [BLOCKER_EXPORTED_EVENT] = "an event given to other processes (IPC)",
    [BLOCKER_IMPORTED_POOL] = "a memory pool of another process",
};
static const char *const blocker_keys[BLOCKER_KINDS] = {
    "managed", "ipcMemory", "ipcEvent", "externalMemory", "externalSemaphore", "graphics", "multicast", "exportedMemory", "exportedEvent", "importedPool",
};
static const char *const state_names[] = {"running", "quiescing", "quiesced"};

__attribute__((noreturn, format(printf, 2, 3))) static void die(int status, const char *format, ...) {
  char words[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(words, sizeof words, format, arguments);
  va_end(arguments);
  fprintf(stderr, "cedana-gpu-control: %s\n", words);
  exit(status);
}

static uint64_t now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* ---- finding it ---- */

/* The process's pid in its own namespace: the last of NSpid. */
static uint32_t inner_pid(long pid) {
  char path[64], line[512];
  snprintf(path, sizeof path, "/proc/%ld/status", pid);
  FILE *status = fopen(path, "re");
  if (!status) die(EXIT_SILENT, "process %ld: %s", pid, strerror(errno));
  uint32_t inner = 0;
  while (fgets(line, sizeof line, status)) {
    if (strncmp(line, "NSpid:", 6) != 0) continue;
    char *last = strrchr(line, '\t');
    inner = last ? (uint32_t)strtoul(last + 1, NULL, 10) : 0;
  }
  fclose(status);
  return inner;
}

static int open_mailbox(long pid, struct mailbox *copy) {
  char path[64];
  char line[8192];
  snprintf(path, sizeof path, "/proc/%ld/maps", pid);
  FILE *maps = fopen(path, "re");
  if (!maps) die(EXIT_SILENT, "process %ld: %s", pid, strerror(errno));
  uint32_t inner = inner_pid(pid);
  int found = -1;
  while (found < 0 && fgets(line, sizeof line, maps)) {
    const char *name = strstr(line, " /memfd:" MAILBOX_NAME " (deleted)\n");
    uint64_t from, to;
    if (!name || sscanf(line, "%" SCNx64 "-%" SCNx64, &from, &to) != 2) continue;
    char file[128];
    snprintf(file, sizeof file, "/proc/%ld/map_files/%" PRIx64 "-%" PRIx64, pid, from, to);
    int fd = open(file, O_RDWR | O_CLOEXEC);
    if (fd < 0 && errno == EPERM) die(EXIT_REFUSED, "open %s: it takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE", file);
    if (fd < 0) continue; /* ENOENT: unmapped meanwhile */
    struct stat st;
    int seals = fcntl(fd, F_GET_SEALS);
    bool sound = fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size == MAILBOX_BYTES && seals >= 0 && (seals & F_SEAL_SHRINK) &&
                 pread(fd, copy, sizeof *copy, 0) == sizeof *copy && copy->magic == MAILBOX_MAGIC && copy->pid == inner;
    if (sound) found = fd;
    else close(fd);
  }
  fclose(maps);
  if (found < 0)
    die(EXIT_NO_MAILBOX, "process %ld has no mailbox of the interception library: it isn't preloaded there, or has not called the driver yet", pid);
  if (copy->version != MAILBOX_VERSION)
    die(EXIT_REFUSED, "process %ld has an interception library of protocol %u; this program speaks %u", pid, copy->version, MAILBOX_VERSION);
  return found;
}

/* ---- asking ---- */

/* One asker at a time; the lock goes with the descriptor. */
static void lock_mailbox(int fd, uint64_t until) {
  while (flock(fd, LOCK_EX | LOCK_NB) < 0) {
    if (errno != EWOULDBLOCK) die(EXIT_REFUSED, "lock the mailbox: %s", strerror(errno));
    if (now_ms() >= until) die(EXIT_SILENT, "somebody else has been asking this process for a long time");
    usleep(1000);
  }
}

static void write_word(int fd, size_t at, uint32_t value) {
  if (pwrite(fd, &value, sizeof value, (off_t)at) != sizeof value) die(EXIT_REFUSED, "write to the mailbox: %s", strerror(errno));
}

static uint32_t read_word(int fd, size_t at) {
  uint32_t value = 0;
  if (pread(fd, &value, sizeof value, (off_t)at) != sizeof value) die(EXIT_REFUSED, "read the mailbox: %s", strerror(errno));
  return value;
}

static void ask(int fd, struct mailbox *mailbox, uint32_t command, uint32_t deadline_ms, uint32_t lease_ms) {
  uint64_t until = now_ms() + deadline_ms + GRACE_MS;
  lock_mailbox(fd, until);
  /* Only for its address: a futex of the kernel's. What is in it is read by copies. */
  uint32_t *words = mmap(NULL, MAILBOX_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (words == MAP_FAILED) die(EXIT_REFUSED, "map the mailbox: %s", strerror(errno));
  uint32_t request = read_word(fd, offsetof(struct mailbox, request)) + 1;
  if (request == 0) request = 1;
  write_word(fd, offsetof(struct mailbox, command), command);
  write_word(fd, offsetof(struct mailbox, deadline_ms), deadline_ms);
  write_word(fd, offsetof(struct mailbox, lease_ms), lease_ms);
  write_word(fd, offsetof(struct mailbox, request), request);
  syscall(SYS_futex, &words[offsetof(struct mailbox, request) / 4], FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
  for (;;) {
    uint32_t answered = read_word(fd, offsetof(struct mailbox, answered));
    if (answered == request) break;
    uint64_t now = now_ms();
    if (now >= until) die(EXIT_SILENT, "no answer within %u ms: the process is frozen, or its control thread has gone", deadline_ms + GRACE_MS);
    struct timespec wait = {.tv_sec = (time_t)((until - now) / 1000), .tv_nsec = (long)((until - now) % 1000) * 1000000};
    syscall(SYS_futex, &words[offsetof(struct mailbox, answered) / 4], FUTEX_WAIT, answered, &wait, NULL, 0);
  }
  if (pread(fd, mailbox, sizeof *mailbox, 0) != sizeof *mailbox) die(EXIT_REFUSED, "read the mailbox: %s", strerror(errno));
}

/* ---- saying ---- */

static void say_amount(const char *name, const struct mailbox_amount *amount, bool *first) {
  if (amount->count == 0) return;
  printf("%s\"%s\":{\"count\":%" PRIu64 ",\"bytes\":%" PRIu64 "}", *first ? "" : ",", name, amount->count, amount->bytes);
  *first = false;
}

static void say_report(const struct mailbox *mailbox) {
  uint32_t state = mailbox->state <= MAILBOX_QUIESCED ? mailbox->state : MAILBOX_RUNNING;
  printf("{\"state\":\"%s\",\"pid\":%u,\"driverVersion\":%u,\"callsInFlight\":%u,\"untracked\":%u,\"traceDropped\":%" PRIu64 ",\"devices\":[",
         state_names[state], mailbox->pid, mailbox->driver_version, mailbox->calls_in_flight, mailbox->untracked, mailbox->trace_dropped);
  uint32_t count = mailbox->device_count < MAILBOX_DEVICES ? mailbox->device_count : MAILBOX_DEVICES;
  for (uint32_t i = 0; i < count; i++) {
    const struct mailbox_device *device = &mailbox->devices[i];
    printf("%s{\"index\":%u,\"uuid\":\"GPU-", i ? "," : "", i);
    for (unsigned at = 0; at < 16; at++) printf("%s%02x", at == 4 || at == 6 || at == 8 || at == 10 ? "-" : "", device->uuid[at]);
    printf("\",\"memory\":{");
    bool first = true;
    for (unsigned kind = 0; kind < MEMORY_DEVICE_KINDS; kind++) say_amount(memory_names[kind], &device->memory[kind], &first);
    printf("}}");
  }
  printf("],\"host\":{");
  bool first = true;
  for (unsigned kind = MEMORY_DEVICE_KINDS; kind < MEMORY_KINDS; kind++)
    say_amount(memory_names[kind], &mailbox->host[kind - MEMORY_DEVICE_KINDS], &first);
  printf("},\"objects\":{");
  for (unsigned kind = 0; kind < OBJECT_KINDS; kind++) printf("%s\"%s\":%" PRIu64, kind ? "," : "", object_names[kind], mailbox->objects[kind]);
  printf("},\"blockers\":[");
  first = true;
  for (unsigned kind = 0; kind < BLOCKER_KINDS; kind++) {
    if (mailbox->blockers[kind] == 0) continue;
    printf("%s{\"kind\":\"%s\",\"what\":\"%s\",\"count\":%" PRIu64 "}", first ? "" : ",", blocker_keys[kind], blocker_names[kind], mailbox->blockers[kind]);
    first = false;
  }
  printf("]}\n");
}

static int explain(long pid, struct mailbox *mailbox) {
  mailbox->call[sizeof mailbox->call - 1] = 0;
  for (char *c = mailbox->call; *c; c++)
    if (*c < ' ' || *c > '~') *c = '?';
  switch (mailbox->status) {
    case MAILBOX_OK:
      return 0;
    case MAILBOX_UNKNOWN_COMMAND:
      die(EXIT_REFUSED, "process %ld doesn't know this command", pid);
    case MAILBOX_CALLS_IN_FLIGHT:
      die(EXIT_REFUSED, "process %ld could not be quiesced: %u calls of the driver had not returned by the deadline, among them %s", pid,
          mailbox->calls_in_flight, mailbox->call);
    case MAILBOX_WORK_IN_FLIGHT:
      die(EXIT_REFUSED, "process %ld could not be quiesced: its GPUs were still at work at the deadline", pid);
    case MAILBOX_DRIVER_ERROR:
      die(EXIT_REFUSED, "process %ld could not be quiesced: the driver's error %u while waiting for a context", pid, mailbox->detail);
    case MAILBOX_NO_THREAD:
      die(EXIT_REFUSED, "process %ld could not be quiesced: it can start no thread: %s", pid, strerror((int)mailbox->detail));
    default:
      die(EXIT_REFUSED, "process %ld answers with the unknown status %u", pid, mailbox->status);
  }
}

/* ---- names ---- */

static bool listed(const char *name) {
  static const char *const names[] = {
#define NAME(function, at) #function,
      NAMES(NAME)
#undef NAME
  };
  for (size_t i = 0; i < NAME_COUNT; i++)
    if (!strcmp(names[i], name)) return true;
  return false;
}

/* Every function that starts with cu and a capital letter. Debuggers' entries (cudbg...) are none. */
static int say_names(const char *path) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  struct stat st;
  if (fd < 0 || fstat(fd, &st) < 0) die(EXIT_REFUSED, "open %s: %s", path, strerror(errno));
  size_t size = (size_t)st.st_size;
  const unsigned char *file = size > sizeof(Elf64_Ehdr) ? mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0) : MAP_FAILED;
  if (file == MAP_FAILED || memcmp(file, ELFMAG, SELFMAG) != 0 || file[EI_CLASS] != ELFCLASS64) die(EXIT_REFUSED, "%s is not a library of 64 bits", path);
  Elf64_Ehdr header;
  memcpy(&header, file, sizeof header);
  if (header.e_shentsize != sizeof(Elf64_Shdr) || header.e_shoff > size || header.e_shnum > (size - header.e_shoff) / sizeof(Elf64_Shdr))
    die(EXIT_REFUSED, "%s has no table of sections", path);
  const Elf64_Shdr *sections = (const void *)(file + header.e_shoff);
  int lacking = 0;
  for (unsigned i = 0; i < header.e_shnum; i++) {
    if (sections[i].sh_type != SHT_DYNSYM || sections[i].sh_link >= header.e_shnum) continue;
    const Elf64_Shdr *symbols = &sections[i], *strings = &sections[symbols->sh_link];
    if (symbols->sh_offset > size || symbols->sh_size > size - symbols->sh_offset || strings->sh_offset > size ||
        strings->sh_size > size - strings->sh_offset || strings->sh_size == 0 || file[strings->sh_offset + strings->sh_size - 1] != 0)
      die(EXIT_REFUSED, "%s is cut off", path);
    for (size_t at = 0; at + sizeof(Elf64_Sym) <= symbols->sh_size; at += sizeof(Elf64_Sym)) {
      Elf64_Sym symbol;
      memcpy(&symbol, file + symbols->sh_offset + at, sizeof symbol);
      if (symbol.st_shndx == SHN_UNDEF || ELF64_ST_TYPE(symbol.st_info) != STT_FUNC || symbol.st_name >= strings->sh_size) continue;
      const char *name = (const char *)file + strings->sh_offset + symbol.st_name;
      if (name[0] != 'c' || name[1] != 'u' || name[2] < 'A' || name[2] > 'Z' || listed(name)) continue;
      puts(name);
      lacking++;
    }
  }
  return lacking ? EXIT_REFUSED : 0;
}

/* ---- the command line ---- */

static uint32_t milliseconds(const char *name, const char *value) {
  char *end;
  errno = 0;
  unsigned long ms = value && *value >= '0' && *value <= '9' ? strtoul(value, &end, 10) : (end = "?", 0);
  if (errno || *end || ms > MAX_MS) die(EXIT_USAGE, "%s is to be a number of milliseconds up to %u", name, MAX_MS);
  return (uint32_t)ms;
}

int main(int argc, char **argv) {
  uint32_t deadline_ms = DEFAULT_DEADLINE_MS, lease_ms = DEFAULT_LEASE_MS;
  if (argc < 3) die(EXIT_USAGE, "usage: cedana-gpu-control report|quiesce|resume PID [--deadline MS] [--lease MS], or names FILE");
  for (int i = 3; i < argc; i += 2) {
    if (!strcmp(argv[i], "--deadline")) deadline_ms = milliseconds(argv[i], argv[i + 1]);
    else if (!strcmp(argv[i], "--lease")) lease_ms = milliseconds(argv[i], argv[i + 1]);
    else die(EXIT_USAGE, "unknown option %s", argv[i]);
  }
  if (!strcmp(argv[1], "names")) return say_names(argv[2]);
  char *end;
  long pid = strtol(argv[2], &end, 10);
  if (*end || pid <= 0) die(EXIT_USAGE, "%s is no pid", argv[2]);
  uint32_t command = !strcmp(argv[1], "report") ? MAILBOX_REPORT : !strcmp(argv[1], "quiesce") ? MAILBOX_QUIESCE : !strcmp(argv[1], "resume") ? MAILBOX_RESUME : 0;
  if (command == 0) die(EXIT_USAGE, "unknown command %s", argv[1]);
  static struct mailbox mailbox;
  int fd = open_mailbox(pid, &mailbox);
  ask(fd, &mailbox, command, deadline_ms, lease_ms);
  int status = explain(pid, &mailbox);
  say_report(&mailbox);
  return status;
}
