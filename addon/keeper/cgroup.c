#include "cgroup.h"

#include <sys/stat.h>

/* A new cpuset of version 1 has no cpus and memory nodes and takes no process: as its parent's, each level. */
static void fill_cpuset(const char *directory) {
  static const char *const files[] = {"cpuset.cpus", "cpuset.mems"};
  for (size_t i = 0; i < countof(files); i++) {
    autofree char *path = format("%s/%s", directory, files[i]);
    autofree char *above = format("%s/../%s", directory, files[i]);
    autofree char *mine = NULL;
    autofree char *parents = NULL;
    if (read_file(path, 64 * KIB, &mine, NULL) < 0 || mine[0] > ' ') continue;
    if (read_file(above, 64 * KIB, &parents, NULL) == 0) write_existing(path, parents);
  }
}

static int make_group(const char *mount, const char *name, bool cpuset) {
  autofree char *path = format("%s/%s", mount, name);
  for (char *slash = path + strlen(mount) + 1;; slash++) {
    while (*slash && *slash != '/') slash++;
    char end = *slash;
    *slash = 0;
    if (mkdir(path, 0755) < 0 && errno != EEXIST) return -errno;
    if (cpuset) fill_cpuset(path);
    *slash = end;
    if (!end) return 0;
  }
}

/* The n-th (from 0) space-separated word of a line. */
static char *word(const char *line, int n) {
  for (; n > 0; n--) {
    line += strcspn(line, " ");
    line += *line == ' ';
  }
  size_t length = strcspn(line, " ");
  char *out = allocate(length + 1);
  return memcpy(out, line, length);
}

char **cgroup_make(const char *name, bool controllers_only, int *error) {
  *error = 0;
  while (*name == '/') name++;
  autofree char *mounts = NULL;
  char **list = allocate(sizeof *list);
  size_t count = 0;
  *error = read_file("/proc/self/mountinfo", 16 * MIB, &mounts, NULL);
  if (*error < 0) return list;

  /* Version 1 first: with it, the unified hierarchy has no controllers. */
  bool version1 = false;
  for (int version = 1; version <= 2; version++) {
    if (version == 2 && version1 && controllers_only) break;
    for (char *line = mounts; line && *line;) {
      char *end = strchr(line, '\n');
      if (end) *end = 0;
      char *tail = strstr(line, " - ");
      if (tail && starts_with(tail + 3, version == 1 ? "cgroup " : "cgroup2 ")) {
        autofree char *mount = word(line, 4);
        autofree char *options = word(tail + 3, 2);
        bool named = strstr(options, "name=") != NULL;
        if (version == 1 && !named) version1 = true;
        if (!(named && controllers_only)) {
          int result = make_group(mount, name, strstr(options, "cpuset") != NULL);
          if (result == 0) {
            list = reallocate(list, (count + 2) * sizeof *list);
            list[count++] = format("%s/%s/cgroup.procs", mount, name);
            list[count] = NULL;
          } else if (*error == 0) {
            *error = result;
          }
        }
      }
      if (end) *end = '\n';
      line = end ? end + 1 : NULL;
    }
  }
  if (count == 0 && *error == 0) *error = -ENOENT;
  return list;
}

void cgroup_free(char **procs) {
  for (char **at = procs; at && *at; at++) free(*at);
  free(procs);
}

int cgroup_join(const char *name) {
  int result;
  char **procs = cgroup_make(name, true, &result);
  for (char **at = procs; result == 0 && *at; at++) result = write_existing(*at, "0");
  cgroup_free(procs);
  return result;
}
