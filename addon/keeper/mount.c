/*
 * Mounts, made here because the keeper is in containerd's mount namespace. Each MOUNT is one call of mount(2), by the plan that
 * cedanad has made; an option string of a page or more goes by fsconfig(2), each lower layer as an option of its own.
 *
 * File systems of a disk or of the network may take seconds to come and to go (a journal, dirty pages, a server). These are left
 * to a forked helper, which tells its result through a pipe; nothing of the pod waits for it. The usual ones (overlay, bind,
 * tmpfs) are done in 0.1 ms, less than a fork.
 */
#include "keeper.h"
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096
#define WHY_MAX 1024
#define HELPER_FD 3 /* a helper's, for its result; below are the standard ones */

/* musl has no kernel headers. Layout and numbers: linux/loop.h. */
#define LOOP_CTL_GET_FREE 0x4C82
#define LOOP_CONFIGURE 0x4C0A
#define LO_FLAGS_READ_ONLY 1
#define LO_FLAGS_AUTOCLEAR 4
struct loop_info64 {
  uint64_t lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit;
  uint32_t lo_number, lo_encrypt_type, lo_encrypt_key_size, lo_flags;
  uint8_t lo_file_name[64], lo_crypt_name[64], lo_encrypt_key[32];
  uint64_t lo_init[2];
};
struct loop_config {
  uint32_t fd, block_size;
  struct loop_info64 info;
  uint64_t reserved[8];
};
#define UNMOUNTS_MAX 10000

enum { FSCONFIG_FLAG = 0, FSCONFIG_STRING = 1, FSCONFIG_CREATE = 6 };
#define MS_NOSYMFOLLOW_ 256
#define FSMOUNT_CLOEXEC_ 1
#define MOVE_MOUNT_F_EMPTY_PATH_ 4

static int set_option(int fs, const char *key, const char *value) {
  return (int)syscall(SYS_fsconfig, fs, value ? FSCONFIG_STRING : FSCONFIG_FLAG, key, value, 0) < 0 ? -errno : 0;
}

static uint64_t attributes_of(unsigned long flags) {
  uint64_t attributes = 0;
  if (flags & MS_RDONLY) attributes |= 1;
  if (flags & MS_NOSUID) attributes |= 2;
  if (flags & MS_NODEV) attributes |= 4;
  if (flags & MS_NOEXEC) attributes |= 8;
  if (flags & MS_NOATIME) attributes |= 0x10;
  if (flags & MS_STRICTATIME) attributes |= 0x20;
  if (flags & MS_NODIRATIME) attributes |= 0x80;
  if (flags & MS_NOSYMFOLLOW_) attributes |= 0x200000;
  return attributes;
}

/* The new mount API, for options that don't fit a page. Relative paths are below the working directory. */
static int mount_by_options(const char *type, const char *source, const char *target, unsigned long flags, char *data, char **why) {
  autofd fs = (int)syscall(SYS_fsopen, type, 1);
  if (fs < 0) return -errno;
  int result = set_option(fs, "source", source && *source ? source : type);
  for (char *save, *option = strtok_r(data, ",", &save); option && result == 0; option = strtok_r(NULL, ",", &save)) {
    char *value = strchr(option, '=');
    if (value) *value++ = 0;
    if (value && !strcmp(option, "lowerdir")) {
      for (char *inner, *layer = strtok_r(value, ":", &inner); layer && result == 0; layer = strtok_r(NULL, ":", &inner))
        result = set_option(fs, "lowerdir+", layer);
    } else {
      result = set_option(fs, option, value);
    }
    if (result < 0) *why = format("mount %s option %s: %s", type, option, strerror(-result));
  }
  if (result == 0 && syscall(SYS_fsconfig, fs, FSCONFIG_CREATE, NULL, NULL, 0) < 0) result = -errno;
  if (result < 0) return result;
  autofd mounted = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC_, attributes_of(flags));
  if (mounted < 0) return -errno;
  return syscall(SYS_move_mount, mounted, "", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH_) < 0 ? -errno : 0;
}

/* Attaches a file to a free loop device, which goes with its last user. Returns its fd; *path is its name. */
static int attach_loop(const char *file, bool read_only, char **path) {
  autofd backing = open(file, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
  if (backing < 0) return -errno;
  autofd control = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
  if (control < 0) return -errno;
  for (int attempt = 0; attempt < 100; attempt++) {
    int number = ioctl(control, LOOP_CTL_GET_FREE);
    if (number < 0) return -errno;
    free(*path);
    *path = format("/dev/loop%d", number);
    autofd loop = open(*path, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
    if (loop < 0) return -errno;
    struct loop_config config = {.fd = (unsigned)backing};
    config.info.lo_flags = LO_FLAGS_AUTOCLEAR | (read_only ? LO_FLAGS_READ_ONLY : 0);
    strncpy((char *)config.info.lo_file_name, file, sizeof config.info.lo_file_name - 1);
    if (ioctl(loop, LOOP_CONFIGURE, &config) == 0) {
      int fd = loop;
      loop = -1;
      return fd;
    }
    if (errno != EBUSY) return -errno; /* EBUSY: somebody else took it meanwhile */
  }
  return -EBUSY;
}

static int mount_make(const struct message *m, char **why) {
  const char *type = message_string(m, FIELD_MOUNT_TYPE), *source = message_string(m, FIELD_SOURCE);
  const char *target = message_string(m, FIELD_TARGET), *data = message_string(m, FIELD_MOUNT_DATA);
  const char *cwd = message_string(m, FIELD_CWD);
  unsigned long flags = (unsigned long)message_int(m, FIELD_MOUNT_FLAGS);
  autofree char *loop_path = NULL;
  autofd loop = -1;
  int result = 0;
  if (!target || target[0] != '/') {
    *why = format("mount at %s: not an absolute path", target ? target : "nothing");
    return -EINVAL;
  }
  struct stat st;
  if (stat(target, &st) < 0 && (result = make_directories(target, 0711)) < 0) {
    *why = format("make mount target %s: %s", target, strerror(-result));
    return result;
  }
  if (message_int(m, FIELD_LOOP)) {
    loop = attach_loop(source ? source : "", flags & MS_RDONLY, &loop_path);
    if (loop < 0) {
      *why = format("attach %s to a loop device: %s", source ? source : "nothing", strerror(-loop));
      return loop;
    }
    source = loop_path;
  }
  if (cwd && chdir(cwd) < 0) {
    result = -errno;
    *why = format("chdir %s: %s", cwd, strerror(-result));
    return result;
  }
  if (data && strlen(data) >= PAGE) {
    autofree char *copy = copy_string(data);
    result = mount_by_options(type, source, target, flags, copy, why);
  } else if (mount(source ? source : "none", target, type, flags, data) < 0) {
    result = -errno;
  }
  if (cwd && chdir("/") < 0 && result == 0) result = -errno;
  if (result < 0 && !*why)
    *why = format("mount %s (%s) at %s, options %.200s: %s", source ? source : "", type ? type : "", target, data ? data : "", strerror(-result));
  return result;
}

static void unescape(char *text) {
  char *to = text;
  for (char *at = text; *at; at++)
    if (at[0] == '\\' && at[1] >= '0' && at[1] <= '3' && at[2] && at[3]) {
      *to++ = (char)((at[1] - '0') << 6 | (at[2] - '0') << 3 | (at[3] - '0'));
      at += 3;
    } else {
      *to++ = *at;
    }
  *to = 0;
}

static bool is_quick(const char *type) {
  static const char *const quick[] = {"", "none", "bind", "overlay", "tmpfs", "proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2"};
  for (size_t i = 0; i < countof(quick); i++)
    if (!strcmp(type, quick[i])) return true;
  return false;
}

/*
 * The last mount point that is `target` or below it: later lines were mounted later, so they go first. NULL with *error 0: none.
 * *slow, where asked for: whether one of them may take its time.
 */
static char *last_below(const char *target, int *error, bool *slow) {
  char *text = NULL, *found = NULL;
  size_t length = strlen(target);
  *error = read_file("/proc/self/mountinfo", 64 * MIB, &text, NULL);
  if (*error < 0) return NULL;
  for (char *save, *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
    char *type = strstr(line, " - "), *inner;
    if (type) type[3 + strcspn(type + 3, " ")] = 0;
    char *word = strtok_r(line, " ", &inner);
    for (int i = 0; i < 4 && word; i++) word = strtok_r(NULL, " ", &inner);
    if (!word || !type) continue;
    unescape(word);
    if (strncmp(word, target, length) || (word[length] && word[length] != '/')) continue;
    if (slow && !is_quick(type + 3)) *slow = true;
    free(found);
    found = copy_string(word);
  }
  free(text);
  return found;
}

/* As mountinfo has it: no symbolic link on the way (/var/run), but the last part as it is, which umount2 doesn't follow either. */
static char *resolve_target(const char *target) {
  char *copy = copy_string(target);
  size_t length = strlen(copy);
  while (length > 1 && copy[length - 1] == '/') copy[--length] = 0;
  char *slash = strrchr(copy, '/');
  if (!slash || slash == copy) return copy;
  *slash = 0;
  autofree char *parent = realpath(copy, NULL);
  *slash = '/';
  if (!parent) return copy; /* it isn't there, so nothing is mounted */
  char *resolved = format("%s%s", strcmp(parent, "/") ? parent : "", slash);
  free(copy);
  return resolved;
}

int unmount_below(const char *target, char **why) {
  int error;
  if (!target || target[0] != '/' || !target[1 + strspn(target + 1, "/")]) { /* "/" would be everything */
    *why = format("unmount %s: not an absolute path below /", target ? target : "nothing");
    return -EINVAL;
  }
  autofree char *resolved = resolve_target(target);
  for (int i = 0; i < UNMOUNTS_MAX; i++) {
    autofree char *path = last_below(resolved, &error, NULL);
    if (!path && error < 0) *why = format("read /proc/self/mountinfo: %s", strerror(-error));
    if (!path) return error;
    if (umount2(path, UMOUNT_NOFOLLOW) == 0 || umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW) == 0) continue;
    error = errno;
    *why = format("unmount %s: %s", path, strerror(error));
    return -error;
  }
  return -ELOOP;
}

/* ---- helpers ---- */

struct helper {
  struct child child;
  int result_fd;
  struct tag tag;
};

static int operation(const struct message *m, char **why) {
  return m->type == MESSAGE_MOUNT ? mount_make(m, why) : unmount_below(message_string(m, FIELD_TARGET), why);
}

static bool is_slow(const struct message *m) {
  if (m->type == MESSAGE_MOUNT) {
    const char *type = message_string(m, FIELD_MOUNT_TYPE);
    bool changes = message_int(m, FIELD_MOUNT_FLAGS) & (MS_BIND | MS_MOVE | MS_REMOUNT | MS_SHARED | MS_PRIVATE | MS_SLAVE | MS_UNBINDABLE);
    return !changes && type && !is_quick(type);
  }
  const char *target = message_string(m, FIELD_TARGET);
  if (!target || target[0] != '/') return false;
  bool slow = false;
  int error;
  autofree char *resolved = resolve_target(target);
  autofree char *any = last_below(resolved, &error, &slow);
  return slow;
}

static void finish(struct tag tag, int result, const char *why) {
  result_send(tag, -result, why && *why ? why : result ? strerror(-result) : NULL);
}

static void helper_ended(struct child *child, int status) {
  struct helper *h = container_of(child, struct helper, child);
  struct {
    int result;
    char why[WHY_MAX];
  } told = {0};
  /* All of it is in the pipe by now, or never will be. */
  if (!WIFEXITED(status) || read(h->result_fd, &told, sizeof told) != sizeof told) {
    told.result = -EIO;
    snprintf(told.why, sizeof told.why, "the helper that mounts or unmounts has ended early (wait status %d)", status);
  }
  finish(h->tag, told.result, told.why);
  close(h->result_fd);
  tag_free(&h->tag);
  free(h);
}

void mount_operate(const struct message *m) {
  int ends[2] = {-1, -1};
  bool slow = is_slow(m) && pipe2(ends, O_CLOEXEC) == 0;
  pid_t pid = slow ? fork() : -1;
  if (pid == 0) {
    struct {
      int result;
      char why[WHY_MAX];
    } told = {0};
    char *why = NULL;
    /* Nothing else of ours: the output of a container, say, whose reader would wait for its end as long as we take. */
    if (dup2(ends[1], HELPER_FD) < 0) _exit(1);
    close_from(HELPER_FD + 1);
    told.result = operation(m, &why);
    snprintf(told.why, sizeof told.why, "%s", why ? why : "");
    _exit(write(HELPER_FD, &told, sizeof told) == sizeof told ? 0 : 1);
  }
  if (pid > 0) {
    close(ends[1]);
    struct helper *h = allocate(sizeof *h);
    h->result_fd = ends[0];
    h->tag = tag_copy(tag_of(m));
    child_watch(&h->child, pid, helper_ended);
    return;
  }
  close_fd(&ends[0]);
  close_fd(&ends[1]);
  char *why = NULL;
  int result = operation(m, &why);
  finish(tag_of(m), result, why);
  free(why);
}
