/*
 * The wrapper's configuration, /etc/cedana/runtime.json:
 *
 *   { "engine": "crun", "runDirectory": "/run/cedana", "stateDirectory": "/var/lib/cedana", "configuration": "/etc/cedana/config.json" }
 *
 * The last three are for a cedanad that the wrapper starts: some callers (Podman's clean-up, conmon) pass no environment on.
 *
 * Whoever may write it decides what root executes, so it must belong to root (or to who runs us, for rootless callers) and be
 * writable by nobody else; the same of its directory, where the file could be replaced. In a user namespace, as Podman's rootless
 * callers are in one, root's files belong to nobody; so do other users', but what we execute there has no more rights than its caller.
 * What is wrong with it is an error of every command, never a default: an engine that silently became another would find none of
 * the containers that there are.
 */
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "json.h"
#include "runtime.h"

#define CONFIG_PATH "/etc/cedana/runtime.json"
#define CONFIG_MAX (64 * KIB)

/* The owner that the kernel shows for a user who isn't known in our user namespace. */
static bool is_unmapped(uid_t uid) {
  autofree char *overflow = NULL;
  if (!runtime_in_user_namespace() || read_file("/proc/sys/kernel/overflowuid", 64, &overflow, NULL) < 0) return false;
  return uid == (uid_t)strtoul(overflow, NULL, 10);
}

static bool trusted(const struct stat *st) {
  bool sticky_directory = S_ISDIR(st->st_mode) && st->st_mode & S_ISVTX; /* others can't replace what isn't theirs */
  if (st->st_mode & (S_IWGRP | S_IWOTH) && !sticky_directory) return false;
  return st->st_uid == 0 || st->st_uid == geteuid() || is_unmapped(st->st_uid);
}

static char *read_config(const char *path, bool named, size_t *length) {
  /* Not blocking: a FIFO at this place must not stop every container. */
  autofd fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0 && errno == ENOENT && !named) return NULL;
  if (fd < 0) runtime_fail("read the configuration %s: %s", path, strerror(errno));
  struct stat st;
  if (fstat(fd, &st) < 0) runtime_fail("read the configuration %s: %s", path, strerror(errno));
  if (!S_ISREG(st.st_mode)) runtime_fail("the configuration %s is not a file", path);
  if (!trusted(&st))
    runtime_fail("the configuration %s may be written by others than root (owner %d, mode %04o), and it names the program that root "
                 "executes: chown root and chmod 0644 it",
                 path, (int)st.st_uid, (unsigned)st.st_mode & 07777);
  autofree char *directory = copy_string(path);
  char *slash = strrchr(directory, '/');
  if (slash == directory) slash++;
  if (slash) *slash = 0;
  struct stat above;
  if (slash && stat(directory, &above) == 0 && !trusted(&above))
    runtime_fail("%s, where the configuration %s is, may be written by others than root: chown root and chmod 0755 it", directory,
                 base_name(path));
  if ((size_t)st.st_size > CONFIG_MAX) runtime_fail("the configuration %s is longer than 64 KiB", path);
  char *text = allocate(CONFIG_MAX + 1);
  size_t used = 0;
  for (ssize_t n = 1; n > 0 && used < CONFIG_MAX; used += n > 0 ? (size_t)n : 0) {
    do n = read(fd, text + used, CONFIG_MAX - used);
    while (n < 0 && errno == EINTR);
    if (n < 0) runtime_fail("read the configuration %s: %s", path, strerror(errno));
  }
  *length = used;
  return text;
}

/* Settings of cedanad's, by key of the file and name in the environment, which goes before the file, as everywhere. */
static struct setting {
  const char *key, *name;
  char *value;
} settings[] = {{"runDirectory", "CEDANA_RUN_DIR", NULL}, {"stateDirectory", "CEDANA_STATE_DIR", NULL}, {"configuration", "CEDANA_CONFIG", NULL}};

void runtime_config_load(const char *named) {
  const char *path = named ? named : CONFIG_PATH;
  char *engine = NULL;
  size_t length;
  autofree char *text = read_config(path, named != NULL, &length);
  if (text) {
    struct json in = json_of(text, length);
    for (char *key; (key = json_member(&in)); free(key)) {
      struct setting *setting = settings;
      while (setting < settings + countof(settings) && strcmp(setting->key, key)) setting++;
      if (!strcmp(key, "engine")) engine = json_string(&in);
      else if (setting < settings + countof(settings)) setting->value = json_string(&in);
      else
        runtime_fail("the configuration %s, line %u: unknown key \"%s\"; there are engine, runDirectory, stateDirectory and configuration", path,
                     json_line(&in), key);
    }
    if (json_end(&in) < 0) runtime_fail("the configuration %s, line %u: %s", path, json_line(&in), in.wrong);
    if (engine && (!*engine || (strchr(engine, '/') && *engine != '/')))
      runtime_fail("the configuration %s: engine is \"%s\"; it must be a name such as runc or crun, or an absolute path", path, engine);
    for (size_t i = 0; i < countof(settings); i++)
      if (settings[i].value && *settings[i].value != '/')
        runtime_fail("the configuration %s: %s is \"%s\"; it must be an absolute path", path, settings[i].key, settings[i].value);
  }
  const char *given = getenv("CEDANA_RUN_DIR");
  if (settings[0].value && (!given || !*given)) runtime_run_directory = settings[0].value;
  if (runtime.engine) return; /* --engine */
  const char *from_environment = getenv("CEDANA_ENGINE");
  if (from_environment && *from_environment) {
    runtime.engine = from_environment;
    runtime.engine_from = "CEDANA_ENGINE";
  } else if (engine) {
    runtime.engine = engine;
    runtime.engine_from = path;
  } else {
    runtime.engine = "runc";
    runtime.engine_from = "the default";
  }
}

/* Only for a cedanad that we start: the environment of the engine is the caller's. */
void runtime_config_export(void) {
  for (size_t i = 0; i < countof(settings); i++) {
    const char *given = getenv(settings[i].name);
    if (settings[i].value && (!given || !*given)) setenv(settings[i].name, settings[i].value, 1);
  }
}
