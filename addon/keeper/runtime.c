/*
 * cedana-runtime: for now the engine itself, by execve(2): fds, environment, arguments and exit status are the caller's.
 * The engine: CEDANA_ENGINE (name or path), else runc. Exit code 1 with a message when there is none.
 */
#include "launcher.h"
#include "spawn.h"
#include "util.h"
#include <sys/stat.h>
#include <unistd.h>

extern char **environ;

int runtime_main(char **argv) {
  const char *name = getenv("CEDANA_ENGINE");
  if (!name || !*name) name = "runc";
  autofree char *engine = find_program(name, getenv("PATH"));
  struct stat self, other;
  if (!engine || stat(engine, &other) < 0) {
    fprintf(stderr, "cedana-runtime: engine %s is not installed (CEDANA_ENGINE names another)\n", name);
    return 1;
  }
  if (stat("/proc/self/exe", &self) == 0 && self.st_ino == other.st_ino && self.st_dev == other.st_dev) {
    fprintf(stderr, "cedana-runtime: engine %s is cedana-runtime itself: set CEDANA_ENGINE to runc or crun\n", engine);
    return 1;
  }
  argv[0] = engine;
  execve(engine, argv, environ);
  fprintf(stderr, "cedana-runtime: execute %s: %s\n", engine, strerror(errno));
  return 1;
}
