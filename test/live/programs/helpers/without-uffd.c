// In the place of criu, before CRIU in PATH: everything goes on to it, but what `criu swrk` starts gets no userfaultfd from the kernel.
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv) {
  struct sock_filter filter[] = {
    BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
  if (argc > 1 && strcmp(argv[1], "swrk") == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0) return 100;
  execv("/usr/sbin/criu", argv);
  return 101;
}
