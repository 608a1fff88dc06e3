#include "spawn.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef PR_SCHED_CORE
#define PR_SCHED_CORE 62
#endif
#define SCHED_CORE_CREATE 1

/* Only pages that the child touches are ever there. One child at a time uses it: CLONE_VFORK. */
static char child_stack[64 * 1024] __attribute__((aligned(64)));

int sched_core_create(int scope) {
  if (prctl(PR_SCHED_CORE, SCHED_CORE_CREATE, 0, scope, 0) == 0) return 0;
  return errno == ENODEV || errno == EINVAL ? 0 : -errno;
}

static void decimal(char *out, unsigned number) {
  char digits[12];
  int count = 0;
  do digits[count++] = (char)('0' + number % 10);
  while (number /= 10);
  while (count > 0) *out++ = digits[--count];
  *out = 0;
}

/*
 * Runs in the child, in the parent's memory: system calls only, and nothing of the parent's is changed but
 * `spawn->error` and `spawn->pid_text`.
 */
__attribute__((no_sanitize("address", "undefined"))) static int child_main(void *argument) {
  struct spawn *spawn = argument;
  int fds[SPAWN_FDS];

  if (spawn->new_session) setsid();
  else setpgid(0, 0);
  for (char *const *procs = spawn->join; procs && *procs; procs++) {
    int fd = open(*procs, O_WRONLY | O_CLOEXEC);
    if (fd >= 0 && write(fd, "0", 1) < 0) { /* best effort */
    }
    if (fd >= 0) close(fd);
  }
  if (spawn->oom_score_adj) {
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd >= 0 && write(fd, spawn->oom_score_adj, strlen(spawn->oom_score_adj)) < 0) { /* best effort */
    }
    if (fd >= 0) close(fd);
  }
  if (spawn->sched_core && sched_core_create(SCHED_CORE_THREAD_GROUP) < 0) goto failed;
  if (spawn->cwd && chdir(spawn->cwd) < 0) goto failed;
  /* Out of the way first, so that no dup2 closes a source that a later one needs. */
  for (int i = 0; i < spawn->fd_count; i++)
    if ((fds[i] = fcntl(spawn->fds[i], F_DUPFD_CLOEXEC, SPAWN_FDS)) < 0) goto failed;
  for (int i = 0; i < spawn->fd_count; i++)
    if (dup2(fds[i], i) < 0) goto failed;
  /* Linux before 5.9 has no such call: then they are held, as by any program. */
  if (spawn->close_others) syscall(SYS_close_range, (unsigned)spawn->fd_count, ~0U, 0);
  if (spawn->pid_text) decimal(spawn->pid_text, (unsigned)getpid());
  umask(022);
  /* What the keeper ignores would stay ignored in every container: CRIU's cgroup helper even waits for SIGTERM. */
  struct sigaction by_default = {.sa_handler = SIG_DFL};
  for (int number = 1; number < 32; number++) sigaction(number, &by_default, NULL);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, NULL);
  /* Close-on-exec hinders only scripts, which no engine is. Where it fails, the file itself is as good. */
  if (spawn->use_sealed) syscall(SYS_execveat, spawn->sealed, "", spawn->argv, spawn->env, AT_EMPTY_PATH);
  execve(spawn->path, spawn->argv, spawn->env);
failed:
  spawn->error = errno;
  _exit(127);
}

pid_t spawn_program(struct spawn *spawn) {
  /* No signal may run a handler of the parent in the child. */
  sigset_t all, before;
  sigfillset(&all);
  sigprocmask(SIG_BLOCK, &all, &before);
  spawn->error = 0;
  int flags = CLONE_VM | CLONE_VFORK | SIGCHLD | (spawn->sibling ? CLONE_PARENT : 0);
  pid_t pid = clone(child_main, child_stack + sizeof child_stack, flags, spawn);
  int error = pid < 0 ? errno : spawn->error;
  if (pid > 0 && error && !spawn->sibling) waitpid(pid, NULL, 0); /* it has ended; nobody knows its pid, so nobody else would wait */
  sigprocmask(SIG_SETMASK, &before, NULL);
  return error ? -error : pid;
}

static bool executable(const char *path) {
  struct stat st;
  return stat(path, &st) == 0 && S_ISREG(st.st_mode) && access(path, X_OK) == 0;
}

char *find_program(const char *name, const char *path) {
  if (strchr(name, '/')) return copy_string(name);
  if (!path || !*path) path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
  while (*path) {
    size_t length = strcspn(path, ":");
    char *candidate = format("%.*s%s%s", (int)length, path, length ? "/" : "./", name);
    if (executable(candidate)) return candidate;
    free(candidate);
    path += length;
    path += *path == ':';
  }
  return NULL;
}

#define SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)

char *file_identity(const char *path) {
  struct stat st;
  if (stat(path, &st) < 0) return NULL;
  return format("%llu:%llu:%lld:%lld:%lld", (unsigned long long)st.st_dev, (unsigned long long)st.st_ino, (long long)st.st_size,
                (long long)st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec,
                (long long)st.st_ctim.tv_sec * 1000000000 + st.st_ctim.tv_nsec);
}

bool is_sealed_copy(int fd, const char *path, const char *of) {
  autofree char *found = file_identity(path);
  return found && strcmp(found, of) == 0 && (fcntl(fd, F_GET_SEALS) & SEALS) == SEALS;
}

char **filter_environment(char *const *env, bool (*skip)(const char *entry)) {
  size_t count = 0;
  while (env[count]) count++;
  char **list = allocate((count + 1) * sizeof *list);
  size_t kept = 0;
  for (size_t i = 0; i < count; i++)
    if (!skip(env[i])) list[kept++] = env[i];
  return list;
}

const char *environment_get(char *const *env, const char *name) {
  size_t length = strlen(name);
  for (; env && *env; env++)
    if (strncmp(*env, name, length) == 0 && (*env)[length] == '=') return *env + length + 1;
  return NULL;
}

char **environment_with(char *const *base, char *const *added) {
  size_t count = 0, more = 0, kept = 0;
  while (base[count]) count++;
  while (added && added[more]) more++;
  char **all = allocate((count + more + 1) * sizeof *all);
  for (size_t i = 0; i < count; i++) {
    bool replaced = false;
    for (size_t k = 0; k < more; k++) replaced |= !strncmp(base[i], added[k], strcspn(added[k], "=") + 1);
    if (!replaced) all[kept++] = base[i];
  }
  for (size_t k = 0; k < more; k++) all[kept++] = added[k];
  return all;
}
