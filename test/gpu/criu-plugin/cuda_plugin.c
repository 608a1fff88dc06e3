/*
 * A stand-in for CRIU's CUDA plugin, which Debian's CRIU doesn't ship (test code). It does what the real one's documentation and its log say
 * that it does, by the program cuda-checkpoint of PATH:
 *
 *   PAUSE_DEVICES        before the processes are seized: who has a restore thread is locked
 *   CHECKPOINT_DEVICES   the restore thread, and it alone, runs while the program checkpoints
 *   RESUME_DEVICES_LATE  at a restore, in the same way: restore and unlock
 *   fini                 after a dump that failed or leaves running: each gets back what it had
 *
 * It has no part in pre-dumps, nor in restores of images that it had no part in; it has CRIU seize by ptrace alone and thaw the cgroup, as the
 * real one does. What it leaves out is the real one's look for a GPU in /proc/driver/nvidia/gpus.
 *
 * The layout of the descriptor and the numbers of the hooks are those of CRIU's interface for plugins, version 0.2.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

enum { STAGE_DUMP = 0, STAGE_PRE_DUMP = 1, STAGE_RESTORE = 2 };
enum { RESUME_DEVICES_LATE = 9, PAUSE_DEVICES = 10, CHECKPOINT_DEVICES = 11, HOOKS = 12 };

/* Of the criu that loads this. */
void print_on_level(unsigned level, const char *format, ...) __attribute__((format(printf, 2, 3)));
int add_inventory_plugin(const char *name);
bool check_and_remove_inventory_plugin(const char *name, size_t length);
void set_compel_interrupt_only_mode(void);

#define NAME "cuda_plugin"
#define say(level, ...) print_on_level(level, "cuda_plugin (stand-in): " __VA_ARGS__)
enum { ERROR = 1, INFO = 3 };

enum { MAX_PROCESSES = 64, OUTPUT = 256 };
static struct process {
  int pid;
  bool was_running, was_checkpointed;
  bool checkpointed; /* by us */
} processes[MAX_PROCESSES];
static int count;
static bool off, noted;

/* Its exit status; what it prints, cut off, is in `output`. */
static int run(char *output, const char *const argv[]) {
  int pipes[2];
  if (pipe2(pipes, O_CLOEXEC)) return -1;
  pid_t child = fork();
  if (child < 0) return close(pipes[0]), close(pipes[1]), -1;
  if (child == 0) {
    if (dup2(pipes[1], 1) < 0 || dup2(pipes[1], 2) < 0) _exit(127);
    closefrom(3);
    execvp(argv[0], (char *const *)argv);
    _exit(127);
  }
  close(pipes[1]);
  size_t length = 0;
  for (char buffer[512];;) {
    ssize_t got = read(pipes[0], buffer, sizeof buffer);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    size_t taken = (size_t)got < OUTPUT - 1 - length ? (size_t)got : OUTPUT - 1 - length;
    memcpy(output + length, buffer, taken);
    length += taken;
  }
  output[length] = 0;
  if (length && output[length - 1] == '\n') output[length - 1] = 0;
  close(pipes[0]);
  int status;
  while (waitpid(child, &status, 0) < 0)
    if (errno != EINTR) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* 0 for a process that is no client of the driver; -1 when it can't be asked. */
static int restore_thread(int pid) {
  char text[16], output[OUTPUT];
  snprintf(text, sizeof text, "%d", pid);
  int status = run(output, (const char *const[]){"cuda-checkpoint", "--get-restore-tid", "--pid", text, NULL});
  if (status < 0 || status == 127) return -1;
  return status == 0 ? atoi(output) : 0;
}

static int act(int pid, const char *action) {
  char text[16], output[OUTPUT];
  snprintf(text, sizeof text, "%d", pid);
  bool lock = !strcmp(action, "lock");
  int status = run(output, (const char *const[]){"cuda-checkpoint", "--action", action, "--pid", text, lock ? "--timeout" : NULL,
                                                 "5000", NULL});
  say(status ? ERROR : INFO, "%s of %d: %d %s\n", action, pid, status, output);
  return status ? -1 : 0;
}

/* CRIU has seized and stopped the thread. With no signal it runs for the program, and is stopped again. */
static int with_restore_thread(int pid, int (*work)(int, const char *), const char *const actions[]) {
  int tid = restore_thread(pid);
  if (tid <= 0) return tid;
  unsigned long long before, all = ~0ULL & ~(1ULL << (SIGTRAP - 1));
  if (ptrace(PTRACE_GETSIGMASK, tid, sizeof before, &before) || ptrace(PTRACE_SETSIGMASK, tid, sizeof all, &all) ||
      ptrace(PTRACE_SETOPTIONS, tid, NULL, 0) || ptrace(PTRACE_CONT, tid, NULL, 0)) {
    say(ERROR, "restore thread %d of %d can't be let go: %s\n", tid, pid, strerror(errno));
    return -1;
  }
  int result = 0;
  for (; *actions && !result; actions++) result = work(pid, *actions);
  int status;
  if (ptrace(PTRACE_INTERRUPT, tid, NULL, 0) || waitpid(tid, &status, __WALL) < 0 || !WIFSTOPPED(status) ||
      ptrace(PTRACE_SETOPTIONS, tid, NULL, PTRACE_O_SUSPEND_SECCOMP | PTRACE_O_TRACESYSGOOD) ||
      ptrace(PTRACE_SETSIGMASK, tid, sizeof before, &before)) {
    say(ERROR, "restore thread %d of %d can't be stopped again: %s\n", tid, pid, strerror(errno));
    return -1;
  }
  return result;
}

static int pause_devices(int pid) {
  int tid = off ? 0 : restore_thread(pid);
  if (tid <= 0) return tid ? -1 : -ENOTSUP;
  if (count == MAX_PROCESSES) return -1;
  char text[16], output[OUTPUT];
  snprintf(text, sizeof text, "%d", pid);
  if (run(output, (const char *const[]){"cuda-checkpoint", "--get-state", "--pid", text, NULL})) return -1;
  if (!noted && add_inventory_plugin(NAME)) return -1;
  noted = true;
  bool runs = !strcmp(output, "running");
  if (runs && act(pid, "lock")) return -1;
  processes[count++] = (struct process){.pid = pid, .was_running = runs, .was_checkpointed = !strcmp(output, "checkpointed")};
  return 0;
}

static int checkpoint_devices(int pid) {
  if (off) return -ENOTSUP;
  for (int i = 0; i < count; i++) {
    if (processes[i].pid != pid) continue;
    if (processes[i].was_checkpointed) return 0;
    processes[i].checkpointed = true;
    return with_restore_thread(pid, act, (const char *const[]){"checkpoint", NULL});
  }
  return restore_thread(pid) == 0 ? -ENOTSUP : -1;
}

static int resume_devices_late(int pid) {
  if (off) return -ENOTSUP;
  int tid = restore_thread(pid);
  if (tid <= 0) return tid ? -1 : -ENOTSUP;
  return with_restore_thread(pid, act, (const char *const[]){"restore", "unlock", NULL});
}

static int begin(int stage) {
  if (stage == STAGE_PRE_DUMP || (stage == STAGE_RESTORE && !check_and_remove_inventory_plugin(NAME, strlen(NAME)))) {
    off = true;
    return 0;
  }
  char help[OUTPUT];
  if (run(help, (const char *const[]){"cuda-checkpoint", "-h", NULL}) || !strstr(help, "--action")) {
    say(ERROR, "cuda-checkpoint is not in PATH, or too old\n");
    off = true;
    return stage == STAGE_RESTORE ? -1 : 0;
  }
  set_compel_interrupt_only_mode();
  return 0;
}

/*
 * The real one asks CRIU's options whether the processes run on; their layout is not part of the interface. Those that are to end aren't
 * harmed by getting their GPUs back first: CRIU kills them afterwards.
 */
static void end(int stage, int result) {
  (void)result;
  if (off || stage != STAGE_DUMP) return;
  for (struct process *process = processes; process < processes + count; process++) {
    bool restore = process->checkpointed, unlock = process->was_running;
    const char *actions[] = {restore ? "restore" : unlock ? "unlock" : NULL, restore && unlock ? "unlock" : NULL, NULL};
    with_restore_thread(process->pid, act, actions);
  }
}

/* Called by the symbol CR_PLUGIN_DESC. */
__attribute__((visibility("default"))) struct {
  const char *name;
  int (*init)(int stage);
  void (*exit)(int stage, int result);
  unsigned version, max_hooks;
  void *hooks[HOOKS];
} CR_PLUGIN_DESC = {
    .name = NAME,
    .init = begin,
    .exit = end,
    .version = 2 << 8,
    .max_hooks = HOOKS,
    .hooks = {[RESUME_DEVICES_LATE] = resume_devices_late, [PAUSE_DEVICES] = pause_devices, [CHECKPOINT_DEVICES] = checkpoint_devices},
};
