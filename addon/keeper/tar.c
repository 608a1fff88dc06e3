/*
 * tar, as CRIU runs it for the files of a tmpfs, once for each at a dump and at a restore, while the container stands still:
 *
 *   tar --create --gzip … --directory /proc/self/fd/0 .      the archive on stdout
 *   tar --extract --gzip … --directory DIR                   the archive on stdin
 *
 * A container has four or five (/dev, /dev/shm, masked directories of /proc and /sys) with hardly anything in them, and the programs that
 * the real one starts (a shell and gzip) take most of its 3 to 5 ms. So cedanad puts a directory into the PATH of the engine's CRIU in which
 * we are `tar`. What is small and simple (directories, devices, symbolic links, FIFOs, short files) we do by ourselves, in a tenth of the
 * time; the archive is one for every tar, only that gzip's blocks are stored as they are.
 *
 * Everything else is the real tar's, the next one in PATH, which we become before we have written anything: other arguments, hard links,
 * sockets, holes, long names, foreign archives, and whatever goes wrong. An archive that has been extracted in part is extracted again
 * by it from the beginning, which replaces what is there. So an error is always its error, in its words.
 *
 * Source: CRIU, criu/filesystems.c (tmpfs_dump, tmpfs_restore); ustar: pax(1); gzip: RFC 1952, stored blocks: RFC 1951, 3.2.4.
 */
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "launcher.h"
#include "util.h"

#define BLOCK ((size_t)512)
/* Of one file, and of an archive: more is worth a compression. */
#define FILE_MAX_BYTES (64 * KIB)
#define ARCHIVE_MAX (MIB)
#define DEPTH_MAX 32
#define STORED_MAX ((size_t)65535)

/* Of linux/openat2.h, which musl's compiler doesn't find. */
struct how {
  uint64_t flags, mode, resolve;
};
#define RESOLVE_NO_MAGICLINKS 0x02
#define RESOLVE_NO_SYMLINKS 0x04
#define RESOLVE_BENEATH 0x08

/* All fields are text; numbers are octal. Every header fills a block. */
struct header {
  char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8], type, link[100], magic[6], version[2], uname[32], gname[32],
      major[8], minor[8], prefix[155], rest[12];
};
_Static_assert(sizeof(struct header) == BLOCK, "a header is a block");

static const char *const creating[] = {"--create",      "--gzip",          "--no-unquote",           "--no-wildcards",
                                       "--one-file-system", "--check-links", "--preserve-permissions", "--sparse",
                                       "--numeric-owner", "--directory",    NULL};
static const char *const extracting[] = {"--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory", NULL};

/* ---- the real one ---- */

/* The next tar in PATH that isn't we, wherever in it we are. */
static _Noreturn void become_real(char **argv) {
  struct stat self, other;
  bool known = stat("/proc/self/exe", &self) == 0;
  const char *path = getenv("PATH");
  for (const char *at = path ? path : "/usr/bin:/bin"; *at;) {
    size_t length = strcspn(at, ":");
    autofree char *program = format("%.*s/tar", (int)length, at);
    if (stat(program, &other) == 0 && !(known && other.st_ino == self.st_ino && other.st_dev == self.st_dev)) execv(program, argv);
    at += length + (at[length] == ':');
  }
  fprintf(stderr, "cedana: no tar in PATH (%s), which CRIU needs for the files of a tmpfs\n", path ? path : "");
  exit(127);
}

/* ---- numbers ---- */

/* Octal digits and a NUL; false: it doesn't fit. */
static bool put_octal(char *field, size_t size, uint64_t value) {
  field[size - 1] = 0;
  for (size_t i = size - 1; i-- > 0; value >>= 3) field[i] = (char)('0' + (value & 7));
  return value == 0;
}

/* UINT64_MAX: something else stands there. */
static uint64_t octal(const char *field, size_t size) {
  uint64_t value = 0;
  size_t digits = 0;
  for (; digits < size && field[digits] >= '0' && field[digits] <= '7'; digits++) value = value << 3 | (uint64_t)(field[digits] - '0');
  return digits > 0 && digits < size && (field[digits] == 0 || field[digits] == ' ') ? value : UINT64_MAX;
}

/* The sum of a header's bytes, with spaces where it stands itself. */
static uint64_t checksum(const struct header *header) {
  uint64_t sum = 0;
  for (size_t i = 0; i < BLOCK; i++) sum += ((const uint8_t *)header)[i];
  for (size_t i = 0; i < sizeof header->checksum; i++) sum += ' ' - (uint64_t)(uint8_t)header->checksum[i];
  return sum;
}

static uint32_t crc32_of(const uint8_t *data, size_t length) {
  static const uint32_t table[16] = {0,          0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
                                     0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c};
  uint32_t crc = 0xffffffff;
  for (size_t i = 0; i < length; i++) {
    crc ^= data[i];
    crc = crc >> 4 ^ table[crc & 15];
    crc = crc >> 4 ^ table[crc & 15];
  }
  return ~crc;
}

static void append_le(struct buffer *out, uint32_t value, int bytes) {
  for (; bytes > 0; bytes--, value >>= 8) buffer_append(out, &(uint8_t){(uint8_t)value}, 1);
}

static uint32_t le32(const uint8_t *at) { return (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24; }

/* ---- create ---- */

static bool add_content(struct buffer *out, int parent, const char *base, const struct stat *st) {
  static const char zeros[BLOCK];
  size_t size = (size_t)st->st_size;
  if (size > FILE_MAX_BYTES || (size_t)st->st_blocks * 512 < size) return false; /* long, or with holes */
  autofd fd = openat(parent, base, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd < 0 || buffer_reserve(out, size + 1) < 0) return false;
  size_t used = 0;
  for (ssize_t n = 1; n > 0 && used <= size; used += (size_t)n)
    if ((n = read(fd, out->data + out->end + used, size + 1 - used)) < 0) return false;
  if (used != size) return false;
  out->end += size;
  buffer_append(out, zeros, (BLOCK - size % BLOCK) % BLOCK);
  return true;
}

/* One entry, with its content where it is a file. false: not one for us. */
static bool add(struct buffer *out, int parent, const char *base, const char *name, const struct stat *st) {
  struct header header = {.magic = "ustar", .version = {'0', '0'}};
  bool directory = S_ISDIR(st->st_mode);
  if (snprintf(header.name, sizeof header.name, "%s%s", name, directory ? "/" : "") >= (int)sizeof header.name) return false;
  if (!directory && st->st_nlink > 1) return false;
  bool fits = put_octal(header.mode, sizeof header.mode, st->st_mode & 07777) && put_octal(header.uid, sizeof header.uid, st->st_uid) &&
              put_octal(header.gid, sizeof header.gid, st->st_gid) && st->st_mtime >= 0 &&
              put_octal(header.mtime, sizeof header.mtime, (uint64_t)st->st_mtime) &&
              put_octal(header.size, sizeof header.size, S_ISREG(st->st_mode) ? (uint64_t)st->st_size : 0);
  if (!fits) return false;
  if (S_ISREG(st->st_mode)) header.type = '0';
  else if (S_ISLNK(st->st_mode)) {
    header.type = '2';
    ssize_t length = readlinkat(parent, base, header.link, sizeof header.link);
    if (length <= 0 || (size_t)length == sizeof header.link) return false;
  } else if (S_ISCHR(st->st_mode) || S_ISBLK(st->st_mode)) {
    header.type = S_ISCHR(st->st_mode) ? '3' : '4';
    if (!put_octal(header.major, sizeof header.major, major(st->st_rdev)) || !put_octal(header.minor, sizeof header.minor, minor(st->st_rdev)))
      return false;
  } else if (directory) header.type = '5';
  else if (S_ISFIFO(st->st_mode)) header.type = '6';
  else return false; /* a socket, of which tar has something to say */
  put_octal(header.checksum, 7, checksum(&header)); /* six digits, a NUL, a space */
  header.checksum[7] = ' ';
  buffer_append(out, &header, sizeof header);
  if (S_ISREG(st->st_mode) && !add_content(out, parent, base, st)) return false;
  return buffer_length(out) <= ARCHIVE_MAX;
}

/* All of a directory but itself. What is mounted below has its entry, as tar makes one, and no content. */
static bool add_below(struct buffer *out, int directory, const char *name, dev_t device, int depth) {
  if (depth > DEPTH_MAX) return false;
  int fd = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR *entries = fd < 0 ? NULL : fdopendir(fd);
  if (!entries) {
    close_fd(&fd);
    return false;
  }
  bool good = true;
  for (struct dirent *entry; good;) {
    errno = 0;
    if (!(entry = readdir(entries))) {
      good = errno == 0;
      break;
    }
    if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
    struct stat st;
    autofree char *path = format("%s/%s", name, entry->d_name);
    good = fstatat(fd, entry->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 && add(out, fd, entry->d_name, path, &st);
    if (!good || !S_ISDIR(st.st_mode) || st.st_dev != device) continue;
    autofd below = openat(fd, entry->d_name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    good = below >= 0 && add_below(out, below, path, device, depth + 1);
  }
  closedir(entries);
  return good;
}

static void zip(struct buffer *out, const struct buffer *in) {
  static const uint8_t head[10] = {0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3}; /* no name, no time, from Unix */
  buffer_append(out, head, sizeof head);
  const uint8_t *data = in->data + in->start;
  size_t left = buffer_length(in);
  do {
    size_t length = left < STORED_MAX ? left : STORED_MAX;
    left -= length;
    append_le(out, left == 0, 1);
    append_le(out, (uint32_t)length, 2);
    append_le(out, ~(uint32_t)length, 2);
    buffer_append(out, data, length);
    data += length;
  } while (left > 0);
  append_le(out, crc32_of(in->data + in->start, buffer_length(in)), 4);
  append_le(out, (uint32_t)buffer_length(in), 4);
}

/* @returns 0, 1: not one for us, or -errno */
static int create(const char *path) {
  static const char end[2 * BLOCK];
  autofd root = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  struct stat st;
  struct buffer tar = {0}, all = {0};
  int result = 1;
  if (root >= 0 && fstat(root, &st) == 0 && add(&tar, root, ".", ".", &st) && add_below(&tar, root, ".", st.st_dev, 0)) {
    buffer_append(&tar, end, sizeof end);
    zip(&all, &tar);
    result = write_all(1, all.data + all.start, buffer_length(&all));
  }
  buffer_free(&tar);
  buffer_free(&all);
  return result;
}

/* ---- extract ---- */

/* Only gzip's stored blocks, without any of its extras: what we have made. */
static bool unzip(struct buffer *out, const uint8_t *at, size_t left) {
  if (left < 18 || at[0] != 0x1f || at[1] != 0x8b || at[2] != 8 || at[3] != 0) return false;
  at += 10, left -= 10;
  for (bool last = false; !last;) {
    if (left < 5 || at[0] > 1) return false;
    last = at[0] == 1;
    size_t length = (size_t)at[1] | (size_t)at[2] << 8, inverse = (size_t)at[3] | (size_t)at[4] << 8;
    at += 5, left -= 5;
    if ((length ^ inverse) != 0xffff || length > left) return false;
    buffer_append(out, at, length);
    at += length, left -= length;
  }
  return left == 8 && le32(at) == crc32_of(out->data + out->start, buffer_length(out)) && le32(at + 4) == (uint32_t)buffer_length(out);
}

/* An entry's directory, by no symbolic link and not above the root; *base: its name in there. */
static int parent_of(int root, char *name, char **base) {
  char *slash = strrchr(name, '/');
  *base = slash + 1;
  *slash = 0;
  struct how how = {.flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC, .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
  return (int)syscall(SYS_openat2, root, name, &how, sizeof how);
}

static bool make_file(int parent, const char *base, const uint8_t *content, size_t size) {
  autofd fd = openat(parent, base, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
  return fd >= 0 && write_all(fd, content, size) == 0;
}

/* What is there was made by us; so is the directory that a name leads through. */
static bool set_time(int root, char *name, uint64_t mtime) {
  char *base = ".";
  autofd parent = strcmp(name, ".") ? parent_of(root, name, &base) : dup(root);
  struct timespec times[2] = {{.tv_nsec = UTIME_NOW}, {.tv_sec = (time_t)mtime}};
  return parent >= 0 && utimensat(parent, base, times, AT_SYMLINK_NOFOLLOW) == 0;
}

/* A header is read where it lies. @returns false: not one for us, or it failed */
static bool extract_one(int root, const struct header *header, char *name, const uint8_t *content, size_t size) {
  uint64_t mode = octal(header->mode, sizeof header->mode), uid = octal(header->uid, sizeof header->uid),
           gid = octal(header->gid, sizeof header->gid), device_major = octal(header->major, sizeof header->major),
           device_minor = octal(header->minor, sizeof header->minor);
  if (mode > 07777 || uid == UINT64_MAX || gid == UINT64_MAX) return false;
  bool top = !strcmp(name, ".");
  char *base = ".";
  autofd parent = top ? dup(root) : parent_of(root, name, &base);
  if (parent < 0 || !*base || !strcmp(base, "..") || (!top && !strcmp(base, ".")) || (top && header->type != '5')) return false;
  bool device = device_major != UINT64_MAX && device_minor != UINT64_MAX, made = false;
  dev_t number = makedev((unsigned)device_major, (unsigned)device_minor);
  switch (header->type) {
    case '0': made = make_file(parent, base, content, size); break;
    case '2': made = symlinkat(header->link, parent, base) == 0; break;
    case '3': made = device && mknodat(parent, base, S_IFCHR | 0600, number) == 0; break;
    case '4': made = device && mknodat(parent, base, S_IFBLK | 0600, number) == 0; break;
    case '5': made = top || mkdirat(parent, base, 0700) == 0; break;
    case '6': made = mknodat(parent, base, S_IFIFO | 0600, 0) == 0; break;
    default: break;
  }
  /* The owner first: changing it takes set-user-ID away. */
  return made && fchownat(parent, base, (uid_t)uid, (gid_t)gid, AT_SYMLINK_NOFOLLOW) == 0 &&
         (header->type == '2' || fchmodat(parent, base, (mode_t)mode, 0) == 0);
}

/* A name as in "./a/b", without the slash that ends a directory's. */
static bool name_of(const struct header *header, char name[sizeof header->name]) {
  memcpy(name, header->name, sizeof header->name);
  size_t length = strnlen(name, sizeof header->name);
  if (length == sizeof header->name || header->prefix[0] || header->link[sizeof header->link - 1] || !starts_with(name, "./")) return false;
  if ((header->type == '5') != (name[length - 1] == '/')) return false;
  if (header->type == '5') name[length - 1] = 0;
  return true;
}

/* @returns false: not one for us, or it failed; some of it may be there */
static bool extract_all(int root, const uint8_t *data, size_t length) {
  static const struct header none;
  /* First whatever is made, then the times: what is made in a directory changes that of the directory. */
  for (int pass = 0; pass < 2; pass++) {
    const uint8_t *at = data;
    for (size_t left = length;;) {
      if (left < BLOCK) return false; /* an archive has an end */
      const struct header *header = (const struct header *)at;
      at += BLOCK, left -= BLOCK;
      if (!memcmp(header, &none, sizeof none)) break;
      uint64_t size = octal(header->size, sizeof header->size), mtime = octal(header->mtime, sizeof header->mtime);
      char name[sizeof header->name];
      if (memcmp(header->magic, "ustar", 6) || octal(header->checksum, sizeof header->checksum) != checksum(header) || mtime == UINT64_MAX ||
          size > left || (size && header->type != '0') || !name_of(header, name))
        return false;
      if (!(pass == 0 ? extract_one(root, header, name, at, (size_t)size) : set_time(root, name, mtime))) return false;
      size_t padded = ((size_t)size + BLOCK - 1) / BLOCK * BLOCK;
      if (padded > left) return false;
      at += padded, left -= padded;
    }
  }
  return true;
}

/* @returns false: not one for us, or it failed; stdin stands where it stood */
static bool extract(const char *path) {
  struct stat st;
  off_t begin = lseek(0, 0, SEEK_CUR);
  if (geteuid() != 0 || begin < 0 || fstat(0, &st) < 0 || !S_ISREG(st.st_mode) || st.st_size < begin ||
      st.st_size - begin > (off_t)(2 * ARCHIVE_MAX))
    return false;
  size_t size = (size_t)(st.st_size - begin);
  autofree uint8_t *all = allocate(size);
  struct buffer tar = {0};
  autofd root = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  mode_t before = umask(0);
  bool done = root >= 0 && pread(0, all, size, begin) == (ssize_t)size && unzip(&tar, all, size) &&
              extract_all(root, tar.data + tar.start, buffer_length(&tar));
  umask(before);
  buffer_free(&tar);
  return done;
}

/* The arguments without the last ones, which are `count`. */
static bool has_arguments(char **argv, const char *const *wanted, size_t count) {
  char **at = argv + 1;
  for (; *wanted; wanted++, at++)
    if (!*at || strcmp(*at, *wanted)) return false;
  while (count > 0 && *at) at++, count--;
  return count == 0 && !*at;
}

int tar_main(char **argv) {
  int result = 1;
  if (has_arguments(argv, extracting, 1)) result = !extract(argv[countof(extracting)]);
  if (has_arguments(argv, creating, 2) && !strcmp(argv[countof(creating) + 1], ".")) result = create(argv[countof(creating)]);
  if (result > 0) become_real(argv);
  if (result < 0) fprintf(stderr, "cedana: write the archive of a tmpfs: %s\n", strerror(-result));
  return result < 0 ? 2 : 0;
}
