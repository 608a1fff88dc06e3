/*
 * Starts a program without copying the caller's memory: clone(2) with CLONE_VM and CLONE_VFORK, as vfork(3) does,
 * on a stack of its own. 60 us instead of the 500 to 950 us of Node's spawn.
 *
 * The child gets exactly the fds named here, from 0 on (everything else of ours is CLOEXEC), an empty signal mask
 * and default dispositions (the keeper blocks signals and handles none), and a process group of its own.
 */
#pragma once

#include "util.h"

#define SPAWN_FDS 6

struct spawn {
  const char *path; /* of the program, found already */
  int sealed;       /* with `use_sealed`: a memfd that is executed in its place */
  bool use_sealed;
  char *const *argv;
  char *const *env;
  const char *cwd;              /* NULL: the caller's */
  int fds[SPAWN_FDS];           /* fds[n] becomes n */
  int fd_count;
  bool new_session;             /* setsid instead of setpgid */
  bool close_others; /* inherits nothing but fds: what our caller left open for somebody else isn't held open */
  bool sibling;                 /* a child of our parent (CLONE_PARENT), so that we aren't its reaper */
  bool sched_core;              /* a core-scheduling cookie of its own, where the kernel has them */
  const char *oom_score_adj;    /* or NULL; best effort */
  char *const *join;            /* cgroup.procs files, best effort; or NULL */
  char *pid_text;               /* filled with the child's pid in decimal before it runs (21 bytes), or NULL */
  volatile int error;           /* out: why the program could not be executed */
};

/* The pid, or -errno, also of a failed execve. */
pid_t spawn_program(struct spawn *spawn);
/* A name with a slash as it is, else the first executable in `path` (NULL: a usual one); the caller frees. NULL: none. */
char *find_program(const char *name, const char *path);
/* "dev:ino:size:mtimeNs:ctimeNs" of a file; the caller frees. NULL: there is none. */
char *file_identity(const char *path);
/* Whether `path` is the file of "dev:ino:size:mtimeNs:ctimeNs", and `fd` can't be changed any more. */
bool is_sealed_copy(int fd, const char *path, const char *of);
/* A new list of the environment's strings without those for which `skip` says so; the caller frees the list. */
char **filter_environment(char *const *env, bool (*skip)(const char *entry));
/* The variables of `base`, with those of `added` (or NULL) in the place of their namesakes; the caller frees the list. */
char **environment_with(char *const *base, char *const *added);
/* The value in a list of `K=V`, or NULL. */
const char *environment_get(char *const *env, const char *name);
/* prctl(PR_SCHED_CORE): 0 also where the kernel or the machine has no core scheduling. */
int sched_core_create(int scope);
#define SCHED_CORE_THREAD_GROUP 1
#define SCHED_CORE_PROCESS_GROUP 2
