/* One program, several faces, chosen by the name it is called by. */
#include "launcher.h"
#include "util.h"

int main(int argc, char **argv) {
  const char *name = base_name(argv[0] ? argv[0] : "");
  if (!strcmp(name, "cedana-runtime")) return runtime_main(argv);
  if (!strcmp(name, "cedana-loopback")) return loopback_main();
  if (!strcmp(name, "cedana-exit")) return exit_main(argc, argv);
  if (!strcmp(name, "cedana-pids")) return pids_main(argc, argv);
  if (!strcmp(name, "criu")) return criu_main(argc, argv);
  if (!strcmp(name, "tar")) return tar_main(argv);
  if (!strcmp(name, "cedana-log")) return log_main(argc, argv);
  return launcher_main(argc, argv);
}
