// hold CASE: makes one thing that a checkpoint may trip over, says "ready PID" on stdout (or in the file $HOLD_REPORT, for a
// stdout that is no trouble itself), and sleeps until it is killed.
// PID is the root of the tree to be dumped: the program itself, or a child when the case needs a process outside of
// that tree. "skip WHY" instead: this kernel or these privileges don't let us make the thing.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/bpf.h>
#include <linux/filter.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/io_uring.h>
#include <linux/landlock.h>

#include <linux/netlink.h>
#include <linux/perf_event.h>
#include <linux/rtnetlink.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <linux/vm_sockets.h>
#include <mqueue.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB (1024 * 1024)

static char **arguments;
static const char *directory = "/tmp"; // or $HOLD_DIR: where files are made
static pid_t root; // of the tree to be dumped

static void say(const char *format, ...) {
  char line[256];
  va_list values;
  va_start(values, format);
  int length = vsnprintf(line, sizeof line, format, values);
  va_end(values);
  const char *report = getenv("HOLD_REPORT");
  if (!report) {
    if (write(1, line, length) != length) _exit(101);
    return;
  }
  char unfinished[256];
  snprintf(unfinished, sizeof unfinished, "%s.new", report);
  int fd = open(unfinished, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  if (fd < 0 || write(fd, line, length) != length || close(fd) || rename(unfinished, report)) _exit(101);
}

static void skip(const char *what) {
  say("skip %s: %s\n", what, strerror(errno));
  exit(0);
}

static long must(long result, const char *what) {
  if (result < 0) skip(what);
  return result;
}

static const char *in_directory(const char *name) {
  static char paths[4][256];
  static int next;
  char *path = paths[next++ % 4];
  snprintf(path, sizeof paths[0], "%s/%s", directory, name);
  return path;
}

static void sleep_for_ever(void) {
  for (;;) pause();
}

// State of a process or thread, as in /proc/PID/stat.
static char state_of(pid_t pid) {
  char path[64], text[256] = "";
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  int fd = must(open(path, O_RDONLY), "open stat");
  if (read(fd, text, sizeof text - 1) <= 0) skip("read stat");
  close(fd);
  const char *end = strrchr(text, ')');
  return end ? end[2] : '?';
}

static void wait_for_state(pid_t pid, char state) {
  for (int i = 0; state_of(pid) != state; i++) {
    if (i == 5000) skip("wait for a state");
    usleep(1000);
  }
}

// A line over which a child tells its parent that it has done something.
static int line[2];
static void open_line(void) { must(pipe(line), "pipe"); }
static void tell(pid_t value) {
  if (write(line[1], &value, sizeof value) != sizeof value) _exit(1);
  close(line[0]);
  close(line[1]);
}
static pid_t hear(const char *what) {
  pid_t value;
  close(line[1]);
  errno = EPERM; // what ends such a child without a word
  if (read(line[0], &value, sizeof value) != sizeof value) skip(what);
  close(line[0]);
  return value;
}

// The caller goes on as the root of a tree of its own; its parent stays outside of it.
static void leave_parent_outside(void) {
  pid_t child = must(fork(), "fork");
  if (child > 0) sleep_for_ever();
  must(prctl(PR_SET_PDEATHSIG, SIGKILL), "prctl");
  must(setsid(), "setsid");
  root = getpid();
}

// A child of ours that only sleeps.
static pid_t sleeper(void) {
  pid_t child = must(fork(), "fork");
  if (child > 0) return child;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  sleep_for_ever();
  return 0;
}

static int scratch_file(const char *name, size_t bytes) {
  char path[256];
  snprintf(path, sizeof path, "%s/hold-%d-%s", directory, getpid(), name);
  int fd = must(open(path, O_RDWR | O_CREAT | O_TRUNC, 0600), "open a scratch file");
  static char block[4096];
  memset(block, 'x', sizeof block);
  for (size_t done = 0; done < bytes; done += sizeof block)
    if (write(fd, block, sizeof block) != sizeof block) skip("write a scratch file");
  must(unlink(path), "unlink a scratch file");
  return fd;
}

static int linked_file(void) {
  char path[256];
  snprintf(path, sizeof path, "%s/hold-%d", directory, getpid());
  return must(open(path, O_RDWR | O_CREAT, 0600), "open a file");
}

// A mount namespace of its own, and the program executed again in it: its own file would stay on the old one's mount,
// as would the /dev/null of its stdin and stderr.
static void open_null_again(void) {
  int null = must(open("/dev/null", O_RDWR), "open /dev/null");
  for (int fd = 0; fd < 3; fd++)
    if (fd != 1 || getenv("HOLD_REPORT")) must(dup2(null, fd), "dup2");
  close(null);
}

static void private_mounts(void) {
  if (getenv("HOLD_PRIVATE")) {
    open_null_again();
    return;
  }
  must(unshare(CLONE_NEWNS), "unshare mounts");
  must(mount(0, "/", 0, MS_REC | MS_PRIVATE, 0), "make mounts private");
  setenv("HOLD_PRIVATE", "1", 1);
  must(execv(arguments[0], arguments), "execv");
}

static void tmpfs_at(const char *path) {
  mkdir(path, 0700);
  must(mount("hold", path, "tmpfs", 0, "size=8m"), "mount tmpfs");
}

static void own_network(void) {
  must(unshare(CLONE_NEWNET), "unshare network");
  int fd = must(socket(AF_INET, SOCK_DGRAM, 0), "socket");
  struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
  must(ioctl(fd, SIOCSIFFLAGS, &request), "set lo up");
  close(fd);
}

static int listener(int backlog, struct sockaddr_in *address) {
  int fd = must(socket(AF_INET, SOCK_STREAM, 0), "socket");
  *address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  must(bind(fd, (void *)address, sizeof *address), "bind");
  must(listen(fd, backlog), "listen");
  socklen_t size = sizeof *address;
  must(getsockname(fd, (void *)address, &size), "getsockname");
  return fd;
}

static int dial(struct sockaddr_in *address) {
  int fd = must(socket(AF_INET, SOCK_STREAM, 0), "socket");
  must(connect(fd, (void *)address, sizeof *address), "connect");
  return fd;
}

// ---- what a checkpoint has no trouble with

static void clean(void) {}

static void many_kinds(void) {
  int epoll = must(epoll_create1(0), "epoll"), event = must(eventfd(3, 0), "eventfd"), pipes[2], pair[2];
  struct epoll_event wanted = {.events = EPOLLIN};
  must(epoll_ctl(epoll, EPOLL_CTL_ADD, event, &wanted), "epoll_ctl");
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGUSR1);
  must(signalfd(-1, &set, 0), "signalfd");
  must(timerfd_create(CLOCK_MONOTONIC, 0), "timerfd");
  must(pipe(pipes), "pipe");
  must(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), "socketpair");
  must(memfd_create("held", 0), "memfd");
  must(open("/dev/null", O_RDWR), "null");
  must(open("/dev/zero", O_RDWR), "zero");
  must(open("/dev/urandom", O_RDONLY), "urandom");
  must(open("/proc/self/status", O_RDONLY), "proc");
  must(open("/proc/self/ns/uts", O_RDONLY), "ns");
  must(open("/tmp", O_RDONLY | O_DIRECTORY), "directory");
  must(open("/tmp", O_PATH), "O_PATH");
  must(inotify_init(), "inotify");
  sleeper();
}

static void zombie(void) {
  pid_t child = must(fork(), "fork");
  if (child == 0) _exit(0);
  wait_for_state(child, 'Z');
}
static void stopped(void) {
  pid_t child = sleeper();
  kill(child, SIGSTOP);
  wait_for_state(child, 'T');
}
static void listening(void) {
  struct sockaddr_in address;
  own_network();
  listener(8, &address);
}
static void udp(void) {
  own_network();
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons(999)};
  int fd = must(socket(AF_INET, SOCK_DGRAM, 0), "socket");
  must(bind(fd, (void *)&address, sizeof address), "bind");
  int other = must(socket(AF_INET6, SOCK_DGRAM, 0), "socket");
  (void)other;
}
static void aio(void) {
  aio_context_t context = 0;
  must(syscall(SYS_io_setup, 8, &context), "io_setup");
}
static void small_ghost(void) { scratch_file("small", 8192); }
static void seccomp_filter(void) {
  struct sock_filter code[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
  struct sock_fprog program = {1, code};
  must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs");
  must(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), "seccomp");
}
static void pidfd_inside(void) {
  must(syscall(SYS_pidfd_open, sleeper(), 0), "pidfd_open");
}
static void bpf_array(void) {
  union bpf_attr attr = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = 1};
  must(syscall(SYS_bpf, BPF_MAP_CREATE, &attr, sizeof attr), "bpf");
}
static void sysv_shm(void) {
  must(unshare(CLONE_NEWIPC), "unshare ipc");
  int id = must(shmget(IPC_PRIVATE, 65536, 0600), "shmget");
  if (shmat(id, 0, 0) == (void *)-1) skip("shmat");
}
static void uts_own(void) { must(unshare(CLONE_NEWUTS), "unshare uts"); }

// ---- files

static void io_uring(void) {
  struct io_uring_params params = {0};
  must(syscall(SYS_io_uring_setup, 4, &params), "io_uring_setup");
}
static void io_uring_mapped(void) {
  struct io_uring_params params = {0};
  int fd = must(syscall(SYS_io_uring_setup, 4, &params), "io_uring_setup");
  if (mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, IORING_OFF_SQ_RING) == MAP_FAILED) skip("mmap");
  close(fd);
}
static void device_fuse(void) { must(open("/dev/fuse", O_RDWR), "open /dev/fuse"); }
static void device_kmsg(void) { must(open("/dev/kmsg", O_RDONLY), "open /dev/kmsg"); }
static void device_tun(void) { must(open("/dev/net/tun", O_RDWR), "open /dev/net/tun"); }
static void tun_inside(void) {
  own_network();
  struct ifreq request = {.ifr_flags = IFF_TUN};
  must(ioctl(must(open("/dev/net/tun", O_RDWR), "open /dev/net/tun"), TUNSETIFF, &request), "TUNSETIFF");
}
static void device_block(void) { must(open("/dev/loop0", O_RDONLY), "open /dev/loop0"); }
static void device_mapped(void) {
  int fd = must(open("/dev/zero", O_RDWR), "open");
  if (mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0) == MAP_FAILED) skip("mmap");
}
static void console(void) { must(open("/dev/tty1", O_RDWR | O_NOCTTY), "open /dev/tty1"); }
static void serial(void) { must(open("/dev/ttyS0", O_RDWR | O_NOCTTY | O_NONBLOCK), "open /dev/ttyS0"); }
static void uffd(void) {
  int fd = must(syscall(SYS_userfaultfd, O_CLOEXEC), "userfaultfd");
  struct uffdio_api api = {.api = UFFD_API};
  must(ioctl(fd, UFFDIO_API, &api), "UFFDIO_API");
}
static void perf(void) {
  struct perf_event_attr attr = {.type = PERF_TYPE_SOFTWARE, .size = sizeof attr, .config = PERF_COUNT_SW_CPU_CLOCK};
  must(syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0), "perf_event_open");
}
static void perf_mapped(void) {
  struct perf_event_attr attr = {.type = PERF_TYPE_SOFTWARE, .size = sizeof attr, .config = PERF_COUNT_SW_CPU_CLOCK};
  int fd = must(syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0), "perf_event_open");
  if (mmap(0, 2 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED) skip("mmap");
  close(fd);
}
static void bpf_mapped(void) {
  union bpf_attr attr = {.map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4096, .max_entries = 1, .map_flags = BPF_F_MMAPABLE};
  int fd = must(syscall(SYS_bpf, BPF_MAP_CREATE, &attr, sizeof attr), "bpf");
  if (mmap(0, 4096, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED) skip("mmap");
  close(fd);
}
static void block_mapped(void) {
  int fd = must(open("/dev/loop0", O_RDONLY), "open /dev/loop0");
  if (mmap(0, 4096, PROT_READ, MAP_PRIVATE, fd, 0) == MAP_FAILED) skip("mmap");
  close(fd);
}
static void bpf_prog(void) {
  struct bpf_insn code[] = {{.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 0}, {.code = BPF_JMP | BPF_EXIT}};
  union bpf_attr attr = {.prog_type = BPF_PROG_TYPE_SOCKET_FILTER, .insn_cnt = 2, .insns = (uint64_t)code, .license = (uint64_t) "GPL"};
  must(syscall(SYS_bpf, BPF_PROG_LOAD, &attr, sizeof attr), "bpf");
}
static void bpf_ringbuf(void) {
  union bpf_attr attr = {.map_type = BPF_MAP_TYPE_RINGBUF, .max_entries = 4096};
  must(syscall(SYS_bpf, BPF_MAP_CREATE, &attr, sizeof attr), "bpf");
}
static void lazy_umount(void) {
  private_mounts();
  tmpfs_at(in_directory("hold-lazy"));
  must(open(in_directory("hold-lazy/file"), O_RDWR | O_CREAT, 0600), "open");
  must(umount2(in_directory("hold-lazy"), MNT_DETACH), "umount");
  rmdir(in_directory("hold-lazy"));
}
static void overmounted(void) {
  private_mounts();
  tmpfs_at(in_directory("hold-over"));
  must(open(in_directory("hold-over/file"), O_RDWR | O_CREAT, 0600), "open");
  tmpfs_at(in_directory("hold-over"));
}
static void foreign_mount(void) { // the file's mount stays in the namespace that we leave
  if (!getenv("HOLD_PRIVATE")) linked_file();
  private_mounts();
}
static void foreign_program(void) { must(unshare(CLONE_NEWNS), "unshare mounts"); }
static void inotify_deleted(void) {
  char path[256];
  snprintf(path, sizeof path, "%s/hold-%d-watched", directory, getpid());
  int fd = must(open(path, O_RDWR | O_CREAT, 0600), "open");
  must(inotify_add_watch(must(inotify_init(), "inotify"), path, IN_MODIFY), "watch");
  (void)fd;
  must(unlink(path), "unlink");
}
static void inotify_file(void) {
  char path[256];
  snprintf(path, sizeof path, "%s/hold-watched-file", directory);
  close(must(open(path, O_RDWR | O_CREAT, 0600), "open"));
  must(inotify_add_watch(must(inotify_init(), "inotify"), path, IN_MODIFY), "watch");
}
static void inotify_directory(void) {
  must(inotify_add_watch(must(inotify_init(), "inotify"), directory, IN_CREATE), "watch");
}
static void inotify_foreign(void) { // the watched file is on a mount of the namespace that the parent stays in
  if (getenv("HOLD_SECOND")) {
    open_null_again();
    return;
  }
  private_mounts();
  tmpfs_at(in_directory("hold-watched"));
  must(inotify_add_watch(must(inotify_init(), "inotify"), in_directory("hold-watched"), IN_CREATE), "watch");
  leave_parent_outside();
  must(unshare(CLONE_NEWNS), "unshare mounts");
  must(umount2(in_directory("hold-watched"), MNT_DETACH), "umount");
  setenv("HOLD_SECOND", "1", 1);
  must(execv(arguments[0], arguments), "execv");
}
static void inotify_proc(void) {
  must(inotify_add_watch(must(inotify_init(), "inotify"), "/proc/sys/kernel", IN_OPEN), "watch");
}
static void inotify_sysfs(void) {
  must(inotify_add_watch(must(inotify_init(), "inotify"), "/sys/fs", IN_OPEN), "watch");
}
static void inotify_cgroup(void) {
  must(inotify_add_watch(must(inotify_init(), "inotify"), "/sys/fs/cgroup/memory/cgroup.procs", IN_OPEN), "watch");
}
static void fanotify(void) {
  int fd = must(fanotify_init(FAN_CLASS_NOTIF, O_RDONLY), "fanotify_init");
  must(fanotify_mark(fd, FAN_MARK_ADD, FAN_OPEN, AT_FDCWD, "/tmp"), "fanotify_mark");
}
static void fanotify_mount(void) {
  private_mounts();
  int fd = must(fanotify_init(FAN_CLASS_NOTIF, O_RDONLY), "fanotify_init");
  tmpfs_at(in_directory("hold-fan"));
  must(fanotify_mark(fd, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_OPEN, AT_FDCWD, in_directory("hold-fan")), "fanotify_mark");
}
static void fanotify_fid(void) {
  int fd = must(fanotify_init(FAN_CLASS_NOTIF | FAN_REPORT_FID, O_RDONLY), "fanotify_init");
  must(fanotify_mark(fd, FAN_MARK_ADD | FAN_MARK_FILESYSTEM, FAN_OPEN, AT_FDCWD, "/dev/shm"), "fanotify_mark");
}
static void ext_tty(void) {
  int master = must(posix_openpt(O_RDWR | O_NOCTTY), "openpt");
  must(grantpt(master), "grantpt");
  must(unlockpt(master), "unlockpt");
  char name[64];
  must(ptsname_r(master, name, sizeof name), "ptsname");
  leave_parent_outside();
  close(master);
  int slave = must(open(name, O_RDWR), "open the terminal");
  must(ioctl(slave, TIOCSCTTY, 0), "controlling terminal");
}
static void tty_inside(void) {
  int master = must(posix_openpt(O_RDWR | O_NOCTTY), "openpt");
  must(grantpt(master), "grantpt");
  must(unlockpt(master), "unlockpt");
  char name[64];
  must(ptsname_r(master, name, sizeof name), "ptsname");
  must(open(name, O_RDWR | O_NOCTTY), "open the terminal");
}
static void no_leader(void) {
  pid_t child = must(fork(), "fork");
  if (child > 0) sleep_for_ever();
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  root = getpid();
}
static void flock_lock(void) { must(flock(linked_file(), LOCK_EX), "flock"); }
static void posix_lock(void) {
  struct flock lock = {.l_type = F_WRLCK};
  must(fcntl(linked_file(), F_SETLK, &lock), "F_SETLK");
}
static void ofd_lock(void) {
  struct flock lock = {.l_type = F_WRLCK};
  must(fcntl(linked_file(), F_OFD_SETLK, &lock), "F_OFD_SETLK");
}
static void lease(void) { must(fcntl(linked_file(), F_SETLEASE, F_WRLCK), "F_SETLEASE"); }
static void ghost(void) { scratch_file("ghost", 2 * MIB); }
static void ghost_sparse(void) { must(ftruncate(scratch_file("sparse", 4096), 64 * MIB), "ftruncate"); }
static void ghost_mapped(void) {
  int fd = scratch_file("mapped", 2 * MIB);
  if (mmap(0, 2 * MIB, PROT_READ, MAP_PRIVATE, fd, 0) == MAP_FAILED) skip("mmap");
  close(fd);
}
static void link_remap(void) {
  char path[256], other[256];
  snprintf(path, sizeof path, "%s/hold-%d", directory, getpid());
  snprintf(other, sizeof other, "%s/hold-%d-other", directory, getpid());
  int fd = must(open(path, O_RDWR | O_CREAT, 0600), "open");
  (void)fd;
  must(link(path, other), "link");
  must(unlink(path), "unlink");
}
static void deleted_cwd(void) {
  char path[256];
  snprintf(path, sizeof path, "%s/hold-%d-cwd", directory, getpid());
  must(mkdir(path, 0700), "mkdir");
  must(chdir(path), "chdir");
  must(rmdir(path), "rmdir");
}
static void pidfd_outside(void) {
  leave_parent_outside();
  must(syscall(SYS_pidfd_open, getppid(), 0), "pidfd_open");
}
static void pidfd_dead(void) {
  pid_t child = sleeper();
  must(syscall(SYS_pidfd_open, child, 0), "pidfd_open");
  kill(child, SIGKILL);
  waitpid(child, 0, 0);
}
static void pidfd_thread(void) { must(syscall(SYS_pidfd_open, getpid(), O_EXCL), "pidfd_open PIDFD_THREAD"); }
static void secretmem(void) {
  int fd = must(syscall(SYS_memfd_secret, 0), "memfd_secret");
  must(ftruncate(fd, 4096), "ftruncate");
  char *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (page == MAP_FAILED) skip("mmap");
  *page = 1;
}
static void landlock_fd(void) {
  struct landlock_ruleset_attr attr = {.handled_access_fs = LANDLOCK_ACCESS_FS_EXECUTE};
  must(syscall(SYS_landlock_create_ruleset, &attr, sizeof attr, 0), "landlock_create_ruleset");
}
static void landlocked(void) {
  struct landlock_ruleset_attr attr = {.handled_access_fs = LANDLOCK_ACCESS_FS_MAKE_SOCK};
  int fd = must(syscall(SYS_landlock_create_ruleset, &attr, sizeof attr, 0), "landlock_create_ruleset");
  must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs");
  must(syscall(SYS_landlock_restrict_self, fd, 0), "landlock_restrict_self");
  close(fd);
}
static void seccomp_notify(void) {
  struct sock_filter code[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
  struct sock_fprog program = {1, code};
  must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs");
  must(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program), "seccomp");
}
static void mount_fd(void) { must(syscall(SYS_fsopen, "tmpfs", 0), "fsopen"); }
static void detached_mount(void) {
  int context = must(syscall(SYS_fsopen, "tmpfs", 0), "fsopen");
  must(syscall(SYS_fsconfig, context, FSCONFIG_CMD_CREATE, 0, 0, 0), "fsconfig");
  must(syscall(SYS_fsmount, context, 0, 0), "fsmount");
  close(context);
}
static void message_queue(void) {
  must(unshare(CLONE_NEWIPC), "unshare ipc");
  must(mq_open("/held", O_RDWR | O_CREAT, 0600, 0), "mq_open");
}
static void host_ns_fd(void) {
  must(open("/proc/self/ns/uts", O_RDONLY), "open a namespace");
  must(unshare(CLONE_NEWUTS), "unshare uts");
}
static void foreign_ns_fd(void) {
  must(unshare(CLONE_NEWUTS), "unshare uts");
  host_ns_fd();
}
static void packet_pipe_empty(void) {
  int fds[2];
  must(pipe2(fds, O_DIRECT), "pipe2");
}
static void packet_pipe(void) {
  int fds[2];
  must(pipe2(fds, O_DIRECT), "pipe2");
  if (write(fds[1], "x", 1) != 1) skip("write");
}
static void hugetlb(void) {
  char *page = mmap(0, 2 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
  if (page == MAP_FAILED) skip("mmap MAP_HUGETLB");
  *page = 1;
}

// ---- sockets

static void netlink_socket(void);
static void tcp(void) {
  struct sockaddr_in address;
  own_network();
  int server = listener(8, &address);
  dial(&address);
  must(accept(server, 0, 0), "accept");
}
static void tcp_pending(void) { // in the queue of a listener that nobody accepts from
  struct sockaddr_in address;
  own_network();
  listener(8, &address);
  dial(&address);
}
static void tcp_connecting(void) { // the listener's queue is full, so the second stays in SYN-SENT
  struct sockaddr_in address;
  own_network();
  listener(0, &address);
  for (int i = 0; i < 3; i++) {
    int fd = must(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), "socket");
    if (connect(fd, (void *)&address, sizeof address) && errno != EINPROGRESS) skip("connect");
    usleep(10000);
  }
}
static void tcp_close_wait(void) {
  struct sockaddr_in address;
  own_network();
  int server = listener(8, &address), client = dial(&address);
  must(accept(server, 0, 0), "accept");
  close(client);
}
static void tcp_unbound(void) {
  own_network();
  must(socket(AF_INET, SOCK_STREAM, 0), "socket");
  must(socket(AF_INET6, SOCK_DGRAM, 0), "socket");
}
static void mptcp(void) {
  own_network();
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  int fd = must(socket(AF_INET, SOCK_STREAM, 262), "socket MPTCP");
  must(bind(fd, (void *)&address, sizeof address), "bind");
  must(listen(fd, 8), "listen");
}
static void raw(void) {
  own_network();
  must(socket(AF_INET, SOCK_RAW, IPPROTO_ICMP), "raw socket");
}
static void ping(void) {
  own_network();
  FILE *file = fopen("/proc/sys/net/ipv4/ping_group_range", "w");
  if (!file || fprintf(file, "0 0") < 0 || fclose(file)) skip("ping_group_range");
  must(socket(AF_INET, SOCK_DGRAM, IPPROTO_ICMP), "ping socket");
}
static void udp_corked(void) {
  own_network();
  int fd = must(socket(AF_INET, SOCK_DGRAM, 0), "socket");
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK), .sin_port = htons(999)};
  must(sendto(fd, "x", 1, MSG_MORE, (void *)&address, sizeof address), "sendto MSG_MORE");
}
static void foreign_socket(void) {
  struct sockaddr_in address;
  listener(8, &address);
  own_network();
}
static void foreign_unbound(void) {
  must(socket(AF_INET, SOCK_STREAM, 0), "socket");
  own_network();
}
static void elsewhere_unbound(void) { // in a namespace that is neither ours nor CRIU's
  own_network();
  foreign_unbound();
}
static void foreign_udp(void) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  must(bind(must(socket(AF_INET, SOCK_DGRAM, 0), "socket"), (void *)&address, sizeof address), "bind");
  own_network();
}
static void foreign_netlink(void) {
  netlink_socket();
  own_network();
}
static void foreign_packet(void) {
  must(socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL)), "packet socket");
  own_network();
}
static void foreign_unix(void) {
  int pair[2];
  must(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), "socketpair");
  own_network();
}
static void ext_unix_pair(void) {
  int pair[2];
  must(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), "socketpair");
  leave_parent_outside();
  close(pair[0]);
}
static void ext_unix_seqpacket(void) {
  int pair[2];
  must(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair), "socketpair");
  leave_parent_outside();
  close(pair[0]);
}
static void ext_unix_nameless(void) {
  int pair[2];
  must(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair), "socketpair");
  leave_parent_outside();
  close(pair[0]);
}
static void unix_name(struct sockaddr_un *address) {
  *address = (struct sockaddr_un){.sun_family = AF_UNIX};
  snprintf(address->sun_path, sizeof address->sun_path, "%s/hold-%d.sock", directory, getpid());
}
static void ext_unix_stream(void) {
  struct sockaddr_un address;
  unix_name(&address);
  int server = must(socket(AF_UNIX, SOCK_STREAM, 0), "socket"), client = must(socket(AF_UNIX, SOCK_STREAM, 0), "socket");
  must(bind(server, (void *)&address, sizeof address), "bind");
  must(listen(server, 8), "listen");
  must(connect(client, (void *)&address, sizeof address), "connect");
  must(accept(server, 0, 0), "accept");
  pid_t child = must(fork(), "fork");
  if (child > 0) { close(client); sleep_for_ever(); }
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  setsid();
  root = getpid();
  close(server);
  close(server + 2); // what accept returned
}
static void ext_unix_dgram(void) {
  struct sockaddr_un address;
  unix_name(&address);
  int server = must(socket(AF_UNIX, SOCK_DGRAM, 0), "socket");
  must(bind(server, (void *)&address, sizeof address), "bind");
  leave_parent_outside();
  close(server);
  int client = must(socket(AF_UNIX, SOCK_DGRAM, 0), "socket");
  must(connect(client, (void *)&address, sizeof address), "connect");
}
static void unix_pending(void) {
  struct sockaddr_un address;
  unix_name(&address);
  int server = must(socket(AF_UNIX, SOCK_STREAM, 0), "socket"), client = must(socket(AF_UNIX, SOCK_STREAM, 0), "socket");
  must(bind(server, (void *)&address, sizeof address), "bind");
  must(listen(server, 8), "listen");
  must(connect(client, (void *)&address, sizeof address), "connect");
}
static void unix_pending_outside(void) { // a connection from outside that the tree has not accepted yet
  struct sockaddr_un address;
  unix_name(&address);
  int server = must(socket(AF_UNIX, SOCK_STREAM, 0), "socket");
  must(bind(server, (void *)&address, sizeof address), "bind");
  must(listen(server, 8), "listen");
  int client = must(socket(AF_UNIX, SOCK_STREAM, 0), "socket");
  must(connect(client, (void *)&address, sizeof address), "connect");
  leave_parent_outside();
  close(client);
}
static void unix_unaccepted(void) { // a connection of the tree that one outside has not accepted yet
  struct sockaddr_un address;
  unix_name(&address);
  int server = must(socket(AF_UNIX, SOCK_STREAM, 0), "socket");
  must(bind(server, (void *)&address, sizeof address), "bind");
  must(listen(server, 8), "listen");
  leave_parent_outside();
  close(server);
  int client = must(socket(AF_UNIX, SOCK_STREAM, 0), "socket");
  must(connect(client, (void *)&address, sizeof address), "connect");
}
static void unix_half(void) {
  int pair[2];
  must(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), "socketpair");
  close(pair[0]);
}
static void unix_deleted(void) {
  struct sockaddr_un address;
  unix_name(&address);
  int server = must(socket(AF_UNIX, SOCK_STREAM, 0), "socket");
  must(bind(server, (void *)&address, sizeof address), "bind");
  must(listen(server, 8), "listen");
  must(unlink(address.sun_path), "unlink");
}
static void send_fd(int over, int fd) {
  char data = 'x', space[CMSG_SPACE(sizeof(int))] = {0};
  struct iovec vector = {&data, 1};
  struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof space};
  struct cmsghdr *header = CMSG_FIRSTHDR(&message);
  *header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))};
  memcpy(CMSG_DATA(header), &fd, sizeof fd);
  must(sendmsg(over, &message, 0), "sendmsg");
}
static void unix_fd_queued(void) {
  int pair[2];
  must(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), "socketpair");
  send_fd(pair[0], 0);
}
static void netlink_socket(void) {
  struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = RTMGRP_LINK};
  int fd = must(socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE), "netlink");
  must(bind(fd, (void *)&address, sizeof address), "bind");
}
static void netlink_queued(void) {
  int fd = must(socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE), "netlink");
  struct { struct nlmsghdr header; struct rtgenmsg body; } request = {
      {sizeof request, RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, 1, 0}, {AF_UNSPEC}};
  must(send(fd, &request, sizeof request, 0), "send");
}
static void netlink_group(void) {
  int fd = must(socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE), "netlink"), group = 33;
  must(setsockopt(fd, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group, sizeof group), "NETLINK_ADD_MEMBERSHIP");
}
static void unix_credentials_queued(void) {
  int pair[2], one = 1;
  must(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair), "socketpair");
  must(setsockopt(pair[1], SOL_SOCKET, SO_PASSCRED, &one, sizeof one), "SO_PASSCRED");
  must(send(pair[0], "x", 1, 0), "send");
}
static void packet(void) {
  own_network();
  must(socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL)), "packet socket");
}
static void packet_ring(void) {
  own_network();
  int fd = must(socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL)), "packet socket");
  struct tpacket_req request = {.tp_block_size = 4096, .tp_block_nr = 1, .tp_frame_size = 2048, .tp_frame_nr = 2};
  must(setsockopt(fd, SOL_PACKET, PACKET_RX_RING, &request, sizeof request), "PACKET_RX_RING");
  if (mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED) skip("mmap");
}
static void vsock(void) {
  struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = VMADDR_PORT_ANY};
  int fd = must(socket(AF_VSOCK, SOCK_STREAM, 0), "vsock");
  must(bind(fd, (void *)&address, sizeof address), "bind");
}
static void xdp(void) { must(socket(AF_XDP, SOCK_RAW, 0), "AF_XDP"); }
static void alg(void) { must(socket(AF_ALG, SOCK_SEQPACKET, 0), "AF_ALG"); }
static void ktls(void) {
  struct sockaddr_in address;
  own_network();
  int server = listener(8, &address), client = dial(&address);
  must(accept(server, 0, 0), "accept");
  must(setsockopt(client, IPPROTO_TCP, 31 /* TCP_ULP */, "tls", 3), "TCP_ULP tls");
}

// ---- processes

static void traced(void) {
  pid_t child = sleeper();
  must(ptrace(PTRACE_SEIZE, child, 0, 0), "ptrace");
}
static void traced_outside(void) {
  open_line();
  pid_t child = must(fork(), "fork");
  if (child == 0) {
    setsid();
    tell(0);
    sleep_for_ever();
  }
  hear("setsid");
  must(ptrace(PTRACE_SEIZE, child, 0, PTRACE_O_EXITKILL), "ptrace");
  root = child;
}
static void *sleep_in_thread(void *unused) {
  sleep_for_ever();
  return unused;
}
static void threads(void) {
  pthread_t thread;
  for (int i = 0; i < 3; i++) pthread_create(&thread, 0, sleep_in_thread, 0);
}
static volatile pid_t thread_id;
static void *tell_and_sleep(void *unused) {
  thread_id = gettid();
  return sleep_in_thread(unused);
}
static void traced_thread(void) { // not the leader, by somebody outside
  pthread_t thread;
  open_line();
  pid_t child = must(fork(), "fork");
  if (child == 0) {
    setsid();
    pthread_create(&thread, 0, tell_and_sleep, 0);
    while (thread_id == 0) usleep(1000);
    tell(thread_id);
    sleep_for_ever();
  }
  must(ptrace(PTRACE_SEIZE, hear("make a thread"), 0, PTRACE_O_EXITKILL), "ptrace");
  root = child;
}
static void *report_and_sleep(void *unused) {
  wait_for_state(root, 'Z');
  say("ready %d\n", root);
  return sleep_in_thread(unused);
}
static void leader_ended(void) {
  pthread_t thread;
  pthread_create(&thread, 0, report_and_sleep, 0);
  pthread_exit(0);
}
static void *vfork_in_thread(void *unused) {
  thread_id = gettid();
  if (vfork() == 0) {
    for (;;) pause();
  }
  return unused;
}
static void d_thread(void) {
  pthread_t thread;
  pthread_create(&thread, 0, vfork_in_thread, 0);
  while (thread_id == 0) usleep(1000);
  wait_for_state(thread_id, 'D');
}
static void no_exec_memory(void) { must(prctl(65 /* PR_SET_MDWE */, 1, 0, 0, 0), "PR_SET_MDWE"); }
static void guard_pages(void) {
  char *space = mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (space == MAP_FAILED || madvise(space + 4096, 4096, 102 /* MADV_GUARD_INSTALL */)) skip("MADV_GUARD_INSTALL");
}
static void ldt(void) {
  struct { unsigned number, base, limit, flags; } entry = {0, 0, 0xfffff, 0x51};
  must(syscall(SYS_modify_ldt, 1, &entry, sizeof entry), "modify_ldt");
}
static void d_state(void) {
  pid_t child = must(fork(), "fork");
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (vfork() == 0) { // the parent waits uninterruptibly for the child's exec or end
      for (;;) pause();
    }
    _exit(0);
  }
  wait_for_state(child, 'D');
}
static pid_t in_new(int flags) {
  open_line();
  pid_t child = must(fork(), "fork");
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (unshare(flags)) _exit(1);
    if (flags & CLONE_NEWPID) sleeper();
    tell(0);
    sleep_for_ever();
  }
  hear("unshare");
  return child;
}
static void nested_pid(void) { in_new(CLONE_NEWPID); }
static void nested_user(void) { in_new(CLONE_NEWUSER); }
static void nested_uts(void) { in_new(CLONE_NEWUTS); }
static void nested_ipc(void) { in_new(CLONE_NEWIPC); }
static void nested_net(void) { in_new(CLONE_NEWNET); }
static void nested_mount(void) { in_new(CLONE_NEWNS); }
static void nested_cgroup(void) { in_new(CLONE_NEWCGROUP); }
static void nested_time(void) { in_new(CLONE_NEWTIME); }
static int share_memory(void *unused) {
  sleep_for_ever();
  return unused != 0;
}
static void shared_memory_space(void) {
  static char stack[65536];
  must(clone(share_memory, stack + sizeof stack, CLONE_VM | SIGCHLD, 0), "clone");
}
static void sysv_shared(void) { // a segment of an IPC namespace that is not the tree's own
  int id = must(shmget(IPC_PRIVATE, 65536, 0600), "shmget");
  if (shmat(id, 0, 0) == (void *)-1) skip("shmat");
  shmctl(id, IPC_RMID, 0);
}
static void sem_undo(void) {
  must(unshare(CLONE_NEWIPC), "unshare ipc");
  int id = must(semget(IPC_PRIVATE, 1, 0600), "semget");
  struct sembuf operation = {0, 1, SEM_UNDO};
  must(semop(id, &operation, 1), "semop");
}
static void deadline(void) {
  struct { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority; uint64_t runtime, deadline, period; } attr =
      {48, 6, 0, 0, 0, 1000000, 10000000, 10000000};
  must(syscall(SYS_sched_setattr, 0, &attr, 0), "sched_setattr");
}
static void id_mapped(void) {
  private_mounts();
  pid_t child = in_new(CLONE_NEWUSER);
  char path[256];
  for (int i = 0; i < 2; i++) {
    snprintf(path, sizeof path, "/proc/%d/%cid_map", child, "ug"[i]);
    int fd = must(open(path, O_WRONLY), "open id map");
    if (write(fd, "0 1000 10", 9) != 9) skip("write id map");
    close(fd);
  }
  snprintf(path, sizeof path, "/proc/%d/ns/user", child);
  int user = must(open(path, O_RDONLY | O_CLOEXEC), "open user namespace");
  tmpfs_at(in_directory("hold-idmap"));
  int tree = must(syscall(SYS_open_tree, AT_FDCWD, in_directory("hold-idmap"), OPEN_TREE_CLONE | O_CLOEXEC), "open_tree");
  struct mount_attr attr = {.attr_set = MOUNT_ATTR_IDMAP, .userns_fd = user};
  must(syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &attr, sizeof attr), "mount_setattr");
  must(umount2(in_directory("hold-idmap"), MNT_DETACH), "umount");
  must(syscall(SYS_move_mount, tree, "", AT_FDCWD, in_directory("hold-idmap"), MOVE_MOUNT_F_EMPTY_PATH), "move_mount");
  close(tree);
  close(user);
  kill(child, SIGKILL);
  waitpid(child, 0, 0);
}
static void ramfs_mount(void) {
  private_mounts();
  mkdir(in_directory("hold-ramfs"), 0700);
  must(mount("hold", in_directory("hold-ramfs"), "ramfs", 0, 0), "mount ramfs");
}
static void fuse_mount(void) {
  private_mounts();
  mkdir(in_directory("hold-fuse"), 0700);
  int fd = must(open("/dev/fuse", O_RDWR), "open /dev/fuse");
  char options[64];
  snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0", fd);
  must(mount("hold", in_directory("hold-fuse"), "fuse", 0, options), "mount fuse");
}
static void memory(void) {
  char *space = mmap(0, 64 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (space == MAP_FAILED) skip("mmap");
  memset(space, 1, 64 * MIB);
}
static void many_processes(void) {
  for (int i = 1; i < 200; i++) sleeper();
}
static void many_files(void) {
  for (int i = 0; i < 4000; i++)
    if (open("/dev/null", O_RDONLY) < 0) skip("open");
}

static void many_mappings(void) { // of two kinds in turn, or the kernel makes one of them
  int fd = must(open("/proc/self/exe", O_RDONLY), "open");
  for (int i = 0; i < 30000; i++)
    if (mmap(0, 4096, i % 2 ? PROT_READ : PROT_NONE, MAP_PRIVATE, fd, 0) == MAP_FAILED) skip("mmap");
}

static const struct { const char *name; void (*make)(void); } cases[] = {
#define CASE(name) {#name, name}
  CASE(clean), CASE(many_kinds), CASE(zombie), CASE(stopped), CASE(listening), CASE(udp), CASE(aio), CASE(small_ghost),
  CASE(seccomp_filter), CASE(pidfd_inside), CASE(bpf_array), CASE(sysv_shm), CASE(uts_own), CASE(io_uring),
  CASE(io_uring_mapped), CASE(device_fuse), CASE(device_kmsg), CASE(device_tun), CASE(device_block), CASE(device_mapped),
  CASE(console), CASE(serial), CASE(uffd), CASE(perf), CASE(bpf_prog), CASE(bpf_ringbuf), CASE(lazy_umount),
  CASE(overmounted), CASE(foreign_mount), CASE(foreign_program), CASE(tun_inside), CASE(packet_pipe_empty), CASE(foreign_unbound), CASE(elsewhere_unbound), CASE(foreign_udp),
  CASE(foreign_netlink), CASE(foreign_packet), CASE(inotify_sysfs), CASE(inotify_cgroup), CASE(inotify_deleted), CASE(inotify_file), CASE(inotify_directory), CASE(inotify_foreign), CASE(inotify_proc), CASE(fanotify),
  CASE(fanotify_mount), CASE(fanotify_fid), CASE(ext_tty), CASE(tty_inside), CASE(no_leader), CASE(flock_lock),
  CASE(posix_lock), CASE(ofd_lock), CASE(lease), CASE(ghost), CASE(ghost_sparse), CASE(ghost_mapped), CASE(link_remap),
  CASE(deleted_cwd), CASE(pidfd_outside), CASE(pidfd_dead), CASE(pidfd_thread), CASE(secretmem), CASE(landlock_fd),
  CASE(landlocked), CASE(seccomp_notify), CASE(mount_fd), CASE(detached_mount), CASE(message_queue), CASE(host_ns_fd), CASE(foreign_ns_fd),
  CASE(packet_pipe), CASE(hugetlb), CASE(tcp), CASE(tcp_pending), CASE(tcp_connecting), CASE(tcp_close_wait),
  CASE(tcp_unbound), CASE(mptcp), CASE(raw), CASE(ping), CASE(udp_corked), CASE(foreign_socket), CASE(foreign_unix),
  CASE(ext_unix_pair), CASE(ext_unix_stream), CASE(ext_unix_dgram), CASE(unix_pending), CASE(unix_half), CASE(unix_pending_outside), CASE(unix_unaccepted), CASE(unix_deleted),
  CASE(unix_fd_queued), CASE(netlink_socket), CASE(netlink_queued), CASE(packet), CASE(packet_ring), CASE(vsock), CASE(xdp),
  CASE(alg), CASE(ktls), CASE(traced), CASE(traced_outside), CASE(threads), CASE(d_state), CASE(nested_pid),
  CASE(nested_user), CASE(nested_uts), CASE(nested_ipc), CASE(nested_net), CASE(nested_mount), CASE(nested_cgroup),
  CASE(nested_time), CASE(shared_memory_space), CASE(sysv_shared), CASE(sem_undo), CASE(deadline), CASE(id_mapped),
  CASE(ramfs_mount), CASE(fuse_mount), CASE(perf_mapped), CASE(bpf_mapped), CASE(block_mapped), CASE(ext_unix_seqpacket),
  CASE(ext_unix_nameless), CASE(netlink_group), CASE(unix_credentials_queued), CASE(traced_thread), CASE(leader_ended),
  CASE(d_thread), CASE(no_exec_memory), CASE(guard_pages), CASE(ldt), CASE(memory), CASE(many_processes), CASE(many_files),
  CASE(many_mappings),
};

int main(int argc, char **argv) {
  root = getpid();
  arguments = argv;
  if (getenv("HOLD_DIR")) directory = getenv("HOLD_DIR");
  for (size_t i = 0; argc > 1 && i < sizeof cases / sizeof *cases; i++) {
    if (strcmp(cases[i].name, argv[1])) continue;
    cases[i].make();
    say("ready %d\n", root);
    sleep_for_ever();
  }
  say("skip no such case\n");
  return 1;
}
