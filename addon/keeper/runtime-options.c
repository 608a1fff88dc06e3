/*
 * The options of checkpoint and restore: what runc 1.1 to 1.4 and crun 1.8 to 1.28 take, together. Whether the engine at
 * hand has one is cedanad's to say, which knows other ways to have it. Here only what callers probe for is answered, in runc's words:
 *
 *   CRI-O   `checkpoint --help` must succeed; `restore --lsm-mount-context` must fail with "flag needs an argument"
 *
 * After the check runtime.argv has options in one form, `--name` or `--name=value`, then `--` and the id, so that cedanad
 * needn't know which take a value.
 */
#include "runtime.h"

#define COMMON                                                                                                               \
  {"image-path", "value", "directory of CRIU's images"}, {"work-path", "value", "directory of CRIU's log and scratch files"}, \
      {"tcp-established", NULL, "keep established TCP connections"},                                                         \
      {"tcp-close", NULL, "connections come back closed"}, {"ext-unix-sk", NULL, "unix sockets whose peer is outside"},      \
      {"shell-job", NULL, "a terminal, or session leader, that is outside"}, {"file-locks", NULL, "file locks"},             \
      {"manage-cgroups-mode", "value", "soft (the engine's default), full, strict or ignore"},                               \
      {"empty-ns", "value", "a namespace that is made, but not filled"},                                                     \
      {"auto-dedup", NULL, "leave out of a parent what its child has"},                                                      \
      {"lazy-pages", NULL, "memory is fetched when it is needed"}, {"network-lock", "value", "iptables, nftables or skip"}

static const struct runtime_option checkpoint_options[] = {
    COMMON,
    {"parent-path", "value", "images of an earlier pre-dump, relative to the image path"},
    {"leave-running", NULL, "the container runs on"},
    {"tcp-skip-in-flight", NULL, "half-open connections are left out"},
    {"link-remap", NULL, "deleted files that are open get a name for the while"},
    {"status-fd", "value", "a byte comes here when lazy pages can be fetched"},
    {"page-server", "value", "ADDRESS:PORT of the page server"},
    {"pre-dump", NULL, "memory only, and the container runs on"},
};

static const struct runtime_option restore_options[] = {
    COMMON,
    {"bundle", "value", "the bundle's directory (-b); the working directory without it"},
    {"detach", NULL, "return when it runs (-d)"},
    {"pid-file", "value", "the init's pid is written here"},
    {"console-socket", "value", "socket that gets the terminal's master"},
    {"preserve-fds", "value", "fds beyond stdio and LISTEN_FDS that the container gets"},
    {"no-subreaper", NULL, "don't reap what the container leaves"},
    {"no-pivot", NULL, "the root is on a ramdisk"},
    {"no-new-keyring", NULL, "no session keyring of its own"},
    {"lsm-profile", "value", "TYPE:NAME of the LSM profile"},
    {"lsm-mount-context", "value", "LSM mount context of the mounts"},
};

static void help(const char *command) {
  bool dump = !strcmp(command, "checkpoint");
  const struct runtime_option *options = dump ? checkpoint_options : restore_options;
  size_t count = dump ? countof(checkpoint_options) : countof(restore_options);
  printf("NAME:\n   cedana-runtime %s - %s\n\nUSAGE:\n   cedana-runtime %s [command options] <container-id>\n\nOPTIONS:\n", command,
         dump ? "checkpoint a running container" : "restore a container from a checkpoint", command);
  for (size_t i = 0; i < count; i++) {
    char name[64];
    snprintf(name, sizeof name, "--%s%s%s", options[i].name, options[i].value ? " " : "", options[i].value ? options[i].value : "");
    printf("   %-30s %s\n", name, options[i].help);
  }
}

/* As runc says it. The caller frees nothing. */
static _Noreturn void wrong_usage(const char *command, char *message) {
  printf("Incorrect Usage: %s\n\n", message);
  help(command);
  fflush(stdout);
  runtime_say_error(message);
  exit(1);
}

/* Source: Go's strconv.ParseBool, by which runc reads them. */
static bool parse_boolean(const char *text, bool *value) {
  static const char *const words[] = {"1", "t", "T", "true", "TRUE", "True", "0", "f", "F", "false", "FALSE", "False"};
  for (size_t i = 0; i < countof(words); i++)
    if (!strcmp(text, words[i])) {
      *value = i < countof(words) / 2;
      return true;
    }
  return false;
}

static const struct runtime_option *find(const char *command, const char *name, size_t length) {
  bool dump = !strcmp(command, "checkpoint");
  const struct runtime_option *options = dump ? checkpoint_options : restore_options;
  size_t count = dump ? countof(checkpoint_options) : countof(restore_options);
  if (length == 1 && !dump && *name == 'b') name = "bundle", length = 6;
  if (length == 1 && !dump && *name == 'd') name = "detach", length = 6;
  for (size_t i = 0; i < count; i++)
    if (strlen(options[i].name) == length && !memcmp(options[i].name, name, length)) return &options[i];
  return NULL;
}

void runtime_options_check(const char *command, char **arguments) {
  int count = 0, ids = 0, out = 0;
  while (arguments[count]) count++;
  char **canonical = allocate(((size_t)count + 3) * sizeof *canonical);
  const char *id = NULL;
  bool ended = false;
  for (int i = 0; i < count; i++) {
    char *argument = arguments[i];
    if (!ended && !strcmp(argument, "--")) {
      ended = true;
      continue;
    }
    if (ended || argument[0] != '-' || argument[1] == 0) {
      id = argument;
      ids++;
      continue;
    }
    const char *name = argument + (argument[1] == '-' ? 2 : 1);
    size_t length = strcspn(name, "=");
    const char *value = name[length] ? name + length + 1 : NULL;
    if (!strncmp(name, "help", 4 + (length != 4)) || !strcmp(name, "h") || !strcmp(name, "?") || !strcmp(name, "usage")) {
      help(command);
      exit(0);
    }
    const struct runtime_option *option = find(command, name, length);
    if (!option) wrong_usage(command, format("flag provided but not defined: -%.*s", (int)length, name));
    if (option->value && !value && i + 1 < count) value = arguments[++i];
    if (option->value && !value) wrong_usage(command, format("flag needs an argument: -%.*s", (int)length, name));
    bool set = true;
    if (!option->value && value && !parse_boolean(value, &set))
      wrong_usage(command, format("invalid boolean value \"%s\" for -%.*s: parse error", value, (int)length, name));
    if (set) {
      canonical[out++] = option->value ? format("--%s=%s", option->name, value) : format("--%s", option->name);
      continue;
    }
    int kept = 0; /* the last word on a flag counts */
    for (int k = 0; k < out; k++)
      if (strcmp(canonical[k] + 2, option->name)) canonical[kept++] = canonical[k];
    out = kept;
  }
  if (ids != 1) wrong_usage(command, format("cedana-runtime: \"%s\" requires exactly 1 argument(s)", command));
  if (!*id) wrong_usage(command, format("cedana-runtime: \"%s\": the container id is empty", command));
  canonical[out++] = copy_string("--");
  canonical[out++] = copy_string(id);
  char **all = allocate(((size_t)(runtime.command + out) + 2) * sizeof *all);
  memcpy(all, runtime.argv, ((size_t)runtime.command + 1) * sizeof *all);
  memcpy(all + runtime.command + 1, canonical, (size_t)out * sizeof *all);
  free(canonical);
  runtime.argv = all;
  runtime.argc = runtime.command + 1 + out;
}
