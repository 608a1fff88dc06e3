/*
 * cedana-exit PID STATUS: a process that stands still in a frozen cgroup ends with an exit status, without running on for one
 * instruction of its own.
 *
 * A container that was checkpointed instead of being signalled must end at once: whatever its processes did after the dump, they would
 * do again after the restore. And who waits for it (conmon, containerd's shim) is to see the status that the signal would have given,
 * which a kill doesn't: a signal that the program handles, or that comes to the first process of a pid namespace, doesn't end it with
 * the signal's status, and SIGKILL gives that of SIGKILL. So the process is made to call exit_group(2):
 *
 *  1. PTRACE_SEIZE every thread, with EXITKILL: if we end in the middle, so do they. PTRACE_INTERRUPT each: it stops before it returns
 *     to its program, at the latest when the cgroup is thawed.
 *  2. Say `ready` on stdout: now the caller thaws.
 *  3. When a thread has stopped: a system call instruction is written where it would go on (the page becomes its own), its
 *     registers are set to exit_group(STATUS), and it goes.
 *
 * Contract: run by cedanad as root, in the pid namespace that PID is of. Exit 0: the process has ended, or is about to, with STATUS. Exit
 * 1: a message on stderr; the process is killed with us (EXITKILL) or was not touched. The caller bounds the time.
 */
#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stdint.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include "launcher.h"
#include "util.h"

static int fail(const char *what, long pid) {
  fprintf(stderr, "cedana-exit: %s %ld: %s\n", what, pid, strerror(errno));
  return 1;
}

/* Every thread; nobody makes new ones in a frozen cgroup. */
static int seize(pid_t pid) {
  autofree char *path = format("/proc/%d/task", (int)pid);
  DIR *directory = opendir(path);
  if (!directory) return fail("list the threads of", pid);
  int result = 0;
  bool some = false;
  for (struct dirent *entry; (entry = readdir(directory));) {
    pid_t thread = (pid_t)strtol(entry->d_name, NULL, 10);
    if (thread <= 0) continue;
    if (ptrace(PTRACE_SEIZE, thread, NULL, PTRACE_O_EXITKILL) < 0) {
      /* ESRCH, and EPERM of a thread that has ended and stays for its group: nothing of it will run. */
      if (errno != ESRCH && errno != EPERM) result = fail("seize", thread);
      continue;
    }
    some = true;
    ptrace(PTRACE_INTERRUPT, thread, NULL, NULL);
  }
  closedir(directory);
  if (result == 0 && !some) {
    errno = EPERM; /* kernel.yama.ptrace_scope 3, or it has ended */
    return fail("trace", pid);
  }
  return result;
}

/*
 * What a stopped thread is made to do, in its own words: the kernel gives a 32-bit program's registers in their own form, which their
 * size tells. A program of the x32 kind runs in 64-bit mode, where the 64-bit number of a call is taken from everybody.
 */
#if defined(__x86_64__)
#define EXIT_GROUP_I386 252
enum { I386_EBX, I386_EAX = 6, I386_ORIG_EAX = 11, I386_EIP, I386_COUNT = 17 };
union registers {
  struct user_regs_struct native;
  uint32_t i386[I386_COUNT];
};
static bool prepare(union registers *regs, size_t size, int status, unsigned long *at, const char **instruction, size_t *length) {
  *length = 2;
  if (size == sizeof regs->native) {
    regs->native.orig_rax = (unsigned long long)-1; /* no interrupted call is taken up again */
    regs->native.rax = SYS_exit_group;
    regs->native.rdi = (unsigned long long)status;
    *at = regs->native.rip;
    *instruction = "\x0f\x05"; /* syscall */
    return true;
  }
  if (size != sizeof regs->i386) return false;
  regs->i386[I386_ORIG_EAX] = (uint32_t)-1;
  regs->i386[I386_EAX] = EXIT_GROUP_I386;
  regs->i386[I386_EBX] = (uint32_t)status;
  *at = regs->i386[I386_EIP];
  *instruction = "\xcd\x80"; /* int 0x80 */
  return true;
}
#elif defined(__aarch64__)
union registers {
  struct user_regs_struct native;
};
static bool prepare(union registers *regs, size_t size, int status, unsigned long *at, const char **instruction, size_t *length) {
  if (size != sizeof regs->native) return false; /* a 32-bit program */
  regs->native.regs[8] = SYS_exit_group;
  regs->native.regs[0] = (unsigned long long)status;
  *at = regs->native.pc;
  *instruction = "\x01\x00\x00\xd4"; /* svc 0 */
  *length = 4;
  return true;
}
#else
#error "cedana-exit knows x86-64 and arm64"
#endif

static int end(pid_t pid, pid_t thread, int status) {
  union registers regs;
  struct iovec all = {.iov_base = &regs, .iov_len = sizeof regs};
  if (ptrace(PTRACE_GETREGSET, thread, NT_PRSTATUS, &all) < 0) return fail("read the registers of", thread);
  unsigned long at;
  const char *instruction;
  size_t length;
  if (!prepare(&regs, all.iov_len, status, &at, &instruction, &length)) {
    errno = ENOEXEC; /* of an architecture that we don't know */
    return fail("make a system call of", thread);
  }
  autofree char *path = format("/proc/%d/mem", (int)pid);
  autofd memory = open(path, O_RDWR | O_CLOEXEC);
  if (memory < 0) return fail("open the memory of", pid);
  /* Through read-only mappings, too: we trace it. */
  if (pwrite(memory, instruction, length, (off_t)at) != (ssize_t)length) return fail("write to the memory of", pid);
#if defined(__aarch64__)
  int none = -1;
  struct iovec call = {.iov_base = &none, .iov_len = sizeof none};
  ptrace(PTRACE_SETREGSET, thread, NT_ARM_SYSTEM_CALL, &call);
#endif
  if (ptrace(PTRACE_SETREGSET, thread, NT_PRSTATUS, &all) < 0) return fail("set the registers of", thread);
  return 0;
}

/* Signals that may be waiting for a thread; what stops more often doesn't do what it is made to. */
#define STOPS_MAX 128

int exit_main(int argc, char **argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: cedana-exit PID STATUS\n");
    return 1;
  }
  pid_t pid = (pid_t)strtol(argv[1], NULL, 10);
  int status = (int)strtol(argv[2], NULL, 10);
  int result = seize(pid);
  if (result) return result;
  if (write_all(1, "ready\n", 6) < 0) return fail("tell who has called us about", pid);
  /* Any thread will do; the first that stops. Others stay stopped until exit_group ends them. */
  pid_t ending = 0;
  unsigned stops = 0;
  for (;;) {
    int wait_status;
    pid_t thread = waitpid(-1, &wait_status, __WALL);
    if (thread < 0 && errno == EINTR) continue;
    if (thread < 0) return errno == ECHILD && ending ? 0 : fail("wait for", pid);
    if (WIFEXITED(wait_status) || WIFSIGNALED(wait_status)) {
      if (thread == pid) {
        if (WIFEXITED(wait_status) && WEXITSTATUS(wait_status) == status) return 0;
        fprintf(stderr, "cedana-exit: %d has ended with wait status %#x\n", (int)pid, (unsigned)wait_status);
        return 1;
      }
      continue;
    }
    if (!WIFSTOPPED(wait_status)) continue;
    if (thread == ending && ++stops > STOPS_MAX) {
      errno = ELOOP;
      return fail("end", pid);
    }
    if (!ending && (result = end(pid, thread, status))) return result;
    if (!ending) ending = thread;
    /* Again for a signal that came meanwhile (SIGCHLD of one that was killed), which it doesn't get. */
    if (thread == ending && ptrace(PTRACE_CONT, thread, NULL, NULL) < 0 && errno != ESRCH) return fail("let go", thread);
  }
}
