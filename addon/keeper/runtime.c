/*
 * cedana-runtime: an OCI runtime in the place of runc or crun.
 *
 * Most commands become the engine's by execve(2): fds (LISTEN_FDS, --preserve-fds and all), environment, arguments, exit
 * status, signals and session are the caller's, as if we had not been there. Read before that: the configuration; for create, run,
 * start, state, kill and delete the marker of the container (one stat); for create and run the bundle's config.json, which must
 * not name any of the annotations that are ours. No daemon, no Node, no other file.
 *
 * One call ends here: `delete --force` of a container of which runc has no state. runc succeeds then, and says nothing.
 *
 * The rest is cedanad's to decide (runtime-ask.c): checkpoint, restore, create and run of an annotated container, and the life of a
 * container that has our marker. Rootless callers can't reach cedanad: everything of theirs that can be passed through is.
 *
 * Ours, taken out of the arguments (both before the command, value by `=` or as the next one):
 *   --engine NAME         runc, crun, or a path; goes before CEDANA_ENGINE, which goes before the configuration
 *   --cedana-config FILE  instead of /etc/cedana/runtime.json
 *
 * Exit codes: the engine's; 1 for our own errors, which also go to the --log file.
 */
#include "runtime.h"

#include <sys/stat.h>
#include <unistd.h>

#include "json.h"
#include "launcher.h"
#include "spawn.h"

extern char **environ;

struct runtime runtime;
const char *runtime_run_directory;

/* ---- the command line ---- */

/* Global options of runc 1.x and crun 1.x that take a value. */
static const char *const valued[] = {"root", "log", "log-format", "log-level", "criu", "rootless", "cgroup-manager"};
static const char *const plain[] = {"debug", "systemd-cgroup", "no-pivot", "help", "h", "version", "v"};

static bool among(const char *const *names, size_t count, const char *name, size_t length) {
  for (size_t i = 0; i < count; i++)
    if (strlen(names[i]) == length && !memcmp(names[i], name, length)) return true;
  return false;
}

/* The name of an option without its dashes, its length, and its value when it has one after `=`. */
static const char *option_name(const char *argument, size_t *length, const char **value) {
  const char *name = argument + (argument[1] == '-' ? 2 : 1);
  const char *equals = strchr(name, '=');
  *length = equals ? (size_t)(equals - name) : strlen(name);
  *value = equals ? equals + 1 : NULL;
  return name;
}

static bool is(const char *name, size_t length, const char *wanted) {
  return strlen(wanted) == length && !memcmp(name, wanted, length);
}

/*
 * Reads the options before the command, and takes ours out. At one that neither engine is known to have, nobody can say
 * whether the next argument is its value or the command: then runtime.command stays 0, and everything goes to the engine.
 */
static const char *read_arguments(char **argv) {
  const char *config = NULL;
  int out = 1;
  bool unknown = false;
  for (int i = 1; argv[i]; i++) {
    char *argument = argv[i];
    if (unknown || runtime.command) {
      runtime.argv[out++] = argument;
      continue;
    }
    if (argument[0] != '-' || argument[1] == 0) {
      runtime.command = out;
      runtime.argv[out++] = argument;
      continue;
    }
    size_t length;
    const char *value;
    const char *name = option_name(argument, &length, &value);
    bool ours = is(name, length, "engine") || is(name, length, "cedana-config");
    bool takes_value = ours || among(valued, countof(valued), name, length);
    unknown = !takes_value && !among(plain, countof(plain), name, length);
    if (!ours) runtime.argv[out++] = argument;
    if (!takes_value) continue;
    bool follows = !value && !is(name, length, "rootless"); /* runc's is a string, crun's and go-runc's are written with `=` */
    if (is(name, length, "rootless") && !value && argv[i + 1] && (!strcmp(argv[i + 1], "true") || !strcmp(argv[i + 1], "false") || !strcmp(argv[i + 1], "auto")))
      follows = true;
    if (follows) {
      value = argv[i + 1];
      if (!value) {
        if (ours) runtime_fail("flag needs an argument: --%.*s", (int)length, name);
        break; /* the engine says so in its own words */
      }
      i++;
      if (!ours) runtime.argv[out++] = argv[i];
    }
    if (is(name, length, "engine")) runtime.engine = value, runtime.engine_from = "--engine";
    else if (is(name, length, "cedana-config")) config = value;
    else if (is(name, length, "root")) runtime.root = value;
    else if (is(name, length, "log")) runtime.log = value;
    else if (is(name, length, "log-format")) runtime.log_json = value && !strcmp(value, "json");
  }
  runtime.argc = out;
  runtime.argv[out] = NULL;
  return config;
}

/* The last argument where options take values; else the first that is no option, because a signal may follow it. */
const char *runtime_container_id(void) {
  const char *command = runtime.argv[runtime.command];
  bool values = !strcmp(command, "create") || !strcmp(command, "run") || !strcmp(command, "checkpoint") || !strcmp(command, "restore");
  if (values) return runtime.argc > runtime.command + 1 ? runtime.argv[runtime.argc - 1] : NULL;
  for (char **a = runtime.argv + runtime.command + 1; *a; a++) {
    if (!strcmp(*a, "--")) return a[1];
    if (**a != '-') return *a;
  }
  return NULL;
}

/* ---- the engine ---- */

static void find_engine(void) {
  if (runtime.engine && !*runtime.engine) runtime_fail("--engine is empty: name runc, crun or an absolute path");
  runtime.engine_path = find_program(runtime.engine, getenv("PATH"));
  struct stat self, other;
  if (!runtime.engine_path || stat(runtime.engine_path, &other) < 0)
    runtime_fail("the engine %s (from %s) is not installed: install it, or name another one in /etc/cedana/runtime.json, by CEDANA_ENGINE or "
                 "by --engine",
                 runtime.engine, runtime.engine_from);
  if (stat("/proc/self/exe", &self) == 0 && self.st_ino == other.st_ino && self.st_dev == other.st_dev)
    runtime_fail("the engine %s (from %s) is %s, which is cedana-runtime itself: name runc's or crun's own path in "
                 "/etc/cedana/runtime.json, by CEDANA_ENGINE or by --engine",
                 runtime.engine, runtime.engine_from, runtime.engine_path);
}

void runtime_execute(const char *path, char **argv, char **env) {
  execve(path, argv, env);
  runtime_fail("execute the engine %s (from %s): %s", path, runtime.engine_from, strerror(errno));
}

/* ---- what is ours ---- */

/* Annotations that act at create or run, KEY or KEY.CONTAINER after `cedana.io/`. What others mean is decided at a checkpoint. */
static const char *const acting[] = {"kill-signal", "kill-grace",   "kill-escalation", "checkpoint-on", "auto-resume",
                                     "restore-from", "hook",         "gpu",             "gpu-tracing"};

static bool acts(const char *key) {
  if (!starts_with(key, "cedana.io/")) return false;
  key += sizeof "cedana.io/" - 1;
  size_t length = strcspn(key, ".");
  return among(acting, countof(acting), key, length);
}

/* A spec that can't be read or is broken is the engine's to refuse, in its own words. */
static bool annotated(const char *bundle) {
  autofree char *path = format("%s/config.json", bundle);
  autofree char *text = NULL;
  size_t length;
  if (read_file(path, 10 * MIB, &text, &length) < 0) return false;
  if (!memmem(text, length, "cedana", 6)) return false;
  bool found = false;
  struct json in = json_of(text, length);
  for (char *key; (key = json_member(&in)); free(key)) {
    if (strcmp(key, "annotations")) {
      json_skip(&in);
      continue;
    }
    json_enter(&in);
    for (char *name; (name = json_member(&in)); free(name)) {
      found |= acts(name);
      json_skip(&in);
    }
  }
  return json_end(&in) == 0 && found;
}

/* The value of -b, --bundle; the working directory without one. */
static const char *bundle_option(void) {
  const char *bundle = ".";
  for (char **a = runtime.argv + runtime.command + 1; *a; a++) {
    if (**a != '-') continue;
    size_t length;
    const char *value;
    const char *name = option_name(*a, &length, &value);
    if (!is(name, length, "bundle") && !is(name, length, "b")) continue;
    if (!value && a[1]) value = *++a;
    if (value) bundle = value;
  }
  return bundle;
}

bool runtime_in_user_namespace(void) {
  autofree char *map = NULL;
  if (read_file("/proc/self/uid_map", 64 * KIB, &map, NULL) < 0) return false; /* a kernel without user namespaces */
  unsigned long inside, outside, count;
  return sscanf(map, "%lu %lu %lu", &inside, &outside, &count) != 3 || inside != 0 || outside != 0 || count != 4294967295;
}

/* Root in the first user namespace; podman's rootless callers are root in one of their own. */
static const char *rootless(void) {
  if (geteuid() != 0) return "it is not root";
  return runtime_in_user_namespace() ? "it is in a user namespace" : NULL;
}

/* No container has it, and the engine has the words for that. */
static bool engine_refuses(const char *id) { return !id || !*id || strchr(id, '/'); }

static bool has_marker(const char *id) {
  autofree char *marker = runtime_marker(id);
  struct stat st;
  return marker && stat(marker, &st) == 0;
}

/* Whether cedanad has to decide. */
static bool is_ours(void) {
  const char *command = runtime.argv[runtime.command];
  if (!strcmp(command, "checkpoint") || !strcmp(command, "restore")) {
    runtime_options_check(command, runtime.argv + runtime.command + 1);
    const char *why = rootless();
    if (why)
      runtime_fail("%s needs root on the host, as CRIU and cedanad do; this caller can't have it: %s. Everything else is passed through to %s",
                   command, why, runtime.engine_path);
    return true;
  }
  const char *id = runtime_container_id();
  if (engine_refuses(id)) return false;
  if (!strcmp(command, "create") || !strcmp(command, "run")) {
    /* A marker that is there already may be of one that was deleted past us: what it says must not be taken for this one's. */
    if (!annotated(bundle_option())) return has_marker(id);
    const char *why = rootless();
    if (why)
      runtime_fail("the container has annotations cedana.io/… that need cedanad, and this caller can't reach it: %s. Leave them out, or run "
                   "it as root",
                   why);
    return true;
  }
  if (strcmp(command, "start") && strcmp(command, "state") && strcmp(command, "kill") && strcmp(command, "delete")) return false;
  return has_marker(id);
}

/*
 * `delete --force ID`, where runc has nothing of such a container: it was deleted before, by a checkpoint above all, in which runc removes what it
 * has ended, and whose caller deletes it all the same (Podman, CRI-O). runc would take 3 to 4 ms to find nothing, without a word and with
 * success; crun, which leaves that to its caller, takes less. Anything odd is left to runc: other options, a log to be made, an id that it may
 * refuse. Source: runc 1.0 to 1.3, delete.go.
 */
static bool is_deleted_already(void) {
  char **arguments = runtime.argv + runtime.command + 1;
  if (strcmp(runtime.argv[runtime.command], "delete") || runtime.argc - runtime.command != 3) return false;
  int forced = !strcmp(arguments[0], "--force") || !strcmp(arguments[0], "-f");
  if (!forced && strcmp(arguments[1], "--force") && strcmp(arguments[1], "-f")) return false;
  const char *id = arguments[forced];
  static const char allowed[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-";
  if (!*id || *id == '-' || strlen(id) > 200 || id[strspn(id, allowed)]) return false;
  if (strcmp(base_name(runtime.engine_path), "runc") || rootless()) return false;
  for (int i = 1; i < runtime.command; i++) {
    size_t length;
    const char *value;
    const char *name = option_name(runtime.argv[i], &length, &value);
    if (is(name, length, "systemd-cgroup")) continue;
    if (!is(name, length, "root")) return false;
    if (!value) i++;
  }
  autofree char *root = runtime_state_root();
  autofree char *state = format("%s/%s", root, id);
  struct stat st;
  return lstat(state, &st) < 0 && errno == ENOENT;
}

int runtime_main(char **argv) {
  int count = 0;
  while (argv[count]) count++;
  runtime.argv = allocate(((size_t)count + 1) * sizeof *argv);
  runtime_config_load(read_arguments(argv));
  find_engine();
  runtime.argv[0] = (char *)runtime.engine; /* both engines begin some of their messages with it */
  if (runtime.command && is_ours()) runtime_ask();
  if (runtime.command && is_deleted_already()) return 0;
  runtime_execute(runtime.engine_path, runtime.argv, environ);
}
