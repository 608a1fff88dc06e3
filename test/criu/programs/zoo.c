// zoo: a process that has one of everything that CRIU keeps in an image of its own, so that a dump of it has as many
// kinds of images as there can be. Every argument is a kind that the machine may lack ("-net", "-time" …) and that is left
// out. Says "ready" and closes its stdio when all is set up, and sleeps. The process to dump is its child: the first of a pid namespace.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/netlink.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/sem.h>
#include <sys/sendfile.h>
#include <sys/shm.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void fail(const char *what) {
  dprintf(2, "zoo: %s: %s\n", what, strerror(errno));
  _exit(1);
}
#define must(call) ({ __typeof__(call) result_ = (call); if ((long)result_ == -1) fail(#call); result_; })

static int without(int argc, char **argv, const char *kind) {
  for (int i = 1; i < argc; i++)
    if (!strcmp(argv[i], kind)) return 1;
  return 0;
}

static void *idle(void *name) {
  prctl(PR_SET_NAME, name);
  for (;;) pause();
  return 0;
}

static void files(int odd) {
  int ghost = must(open("ghost", O_RDWR | O_CREAT | O_TRUNC, 0640));
  must(write(ghost, "kept in a deleted file", 22));
  // A hole makes CRIU store it in chunks.
  int sparse = must(open("sparse", O_RDWR | O_CREAT | O_TRUNC, 0600));
  must(pwrite(sparse, "end", 3, 300000));
  must(unlink("ghost"));
  must(unlink("sparse"));
  must(open("plain", O_RDWR | O_CREAT | O_APPEND, 0600));
  must(open(".", O_RDONLY | O_DIRECTORY));
  if (odd) must(open("not utf-8: \xff\xfe", O_RDWR | O_CREAT, 0600));
  must(open("/dev/null", O_RDWR));
  int locked = must(open("locked", O_RDWR | O_CREAT, 0600));
  must(flock(locked, LOCK_EX));
  int memfd = must(memfd_create("zoo", MFD_ALLOW_SEALING));
  must(ftruncate(memfd, 8192));
  must(write(memfd, "in a memfd", 10));
  must(fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK));

  int ends[2];
  must(pipe2(ends, O_NONBLOCK));
  must(write(ends[1], "in a pipe", 9));
  must(mkfifo("fifo", 0600));
  int fifo = must(open("fifo", O_RDWR));
  must(write(fifo, "in a fifo", 9));

  int event = must(eventfd(7, EFD_NONBLOCK));
  int poll = must(epoll_create1(0));
  struct epoll_event interest = {.events = EPOLLIN, .data.u64 = 0xfedcba9876543210};
  must(epoll_ctl(poll, EPOLL_CTL_ADD, event, &interest));
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGUSR2);
  must(signalfd(-1, &set, 0));
  int timer = must(timerfd_create(CLOCK_MONOTONIC, 0));
  struct itimerspec hour = {.it_interval = {3600, 1}, .it_value = {3600, 2}};
  must(timerfd_settime(timer, 0, &hour, 0));
  int watch = must(inotify_init1(IN_NONBLOCK));
  must(inotify_add_watch(watch, "plain", IN_MODIFY | IN_ATTRIB));
}

static void terminal(void) {
  int master = must(posix_openpt(O_RDWR | O_NOCTTY));
  int unlock = 0, number;
  must(ioctl(master, TIOCSPTLCK, &unlock));
  must(ioctl(master, TIOCGPTN, &number));
  char path[32];
  snprintf(path, sizeof path, "/dev/pts/%d", number);
  must(open(path, O_RDWR | O_NOCTTY));
  must(write(master, "typed\n", 6));
}

static void sockets(int net) {
  int pair[2];
  must(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair));
  must(send(pair[0], "in a socket", 11, 0));
  must(send(pair[0], "and more", 8, 0));
  struct sockaddr_un abstract = {.sun_family = AF_UNIX};
  // With bytes that text must quote: NUL, =, and one beyond ASCII.
  int length = snprintf(abstract.sun_path, sizeof abstract.sun_path, "%czoo=%d.\xe9", 0, getpid());
  int named = must(socket(AF_UNIX, SOCK_STREAM, 0));
  must(bind(named, (void *)&abstract, offsetof(struct sockaddr_un, sun_path) + length));
  must(listen(named, 3));
  struct sockaddr_in loopback = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  int tcp = must(socket(AF_INET, SOCK_STREAM, 0));
  socklen_t size = sizeof loopback;
  must(bind(tcp, (void *)&loopback, size));
  must(listen(tcp, 5));
  must(getsockname(tcp, (void *)&loopback, &size));
  int udp6 = must(socket(AF_INET6, SOCK_DGRAM, 0));
  struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_ANY_INIT};
  must(bind(udp6, (void *)&any, sizeof any));
  must(socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE));
  if (!net) return;
  must(socket(AF_PACKET, SOCK_RAW | SOCK_NONBLOCK, htons(3)));
  struct ifreq lo = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
  must(ioctl(tcp, SIOCSIFFLAGS, &lo));
  int client = must(socket(AF_INET, SOCK_STREAM, 0));
  must(connect(client, (void *)&loopback, sizeof loopback));
  int server = must(accept(tcp, 0, 0));
  must(send(server, "on its way", 10, 0));
  int arrived = 0;
  while (arrived < 10) must(ioctl(client, FIONREAD, &arrived));
}

static void systemV(void) {
  int queue = must(msgget(1234, IPC_CREAT | 0600));
  struct { long type; char text[13]; } message = {5, "in a message"};
  must(msgsnd(queue, &message, 13, 0));
  must(msgsnd(queue, &message, 3, 0));
  int set = must(semget(1235, 3, IPC_CREAT | 0600));
  unsigned short values[] = {1, 2, 65535 / 2};
  must(semctl(set, 0, SETALL, values));
  int segment = must(shmget(1236, 10000, IPC_CREAT | 0600));
  char *memory = must(shmat(segment, 0, 0));
  strcpy(memory, "in a segment");
}

static void limits(void) {
  timer_t timer;
  struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1};
  struct itimerspec hour = {.it_interval = {3600, 0}, .it_value = {3600, 0}};
  must(timer_create(CLOCK_MONOTONIC, &event, &timer));
  must(timer_settime(timer, 0, &hour, 0));
  struct itimerval real = {.it_interval = {7200, 0}, .it_value = {7200, 0}};
  must(setitimer(ITIMER_REAL, &real, 0));
  signal(SIGHUP, SIG_IGN);
  sigset_t blocked;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGUSR1);
  must(sigprocmask(SIG_BLOCK, &blocked, 0));
  must(raise(SIGUSR1)); // stays pending
}

static void filter(void) {
  struct sock_filter allow[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
  struct sock_fprog program = {.len = 1, .filter = allow};
  must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
  must(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
}

static void copy(const char *from, const char *to) {
  int source = must(open(from, O_RDONLY | O_CLOEXEC)), target = must(open(to, O_WRONLY | O_CREAT | O_CLOEXEC, 0755));
  while (must(sendfile(target, source, 0, 1 << 20)) > 0) {}
  close(source);
  close(target);
}

static int be_a_zoo(int argc, char **argv, int net) {
  if (without(argc, argv, "-inside")) {
    if (!without(argc, argv, "-terminal")) terminal();
    must(sethostname("zoo", 3));
    systemV();
  }
  sockets(net);
  files(!without(argc, argv, "-odd"));
  limits();
  pthread_t thread;
  if (pthread_create(&thread, 0, idle, "second thread")) fail("pthread_create");
  char *shared = must(mmap(0, 65536, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  char *private = must(mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  memset(shared, 'x', 5000);
  for (int i = 0; i < 1 << 20; i += 8192) private[i] = i >> 13; // every second page
  if (!must(fork())) {
    setpgid(0, 0);
    must(syscall(SYS_close_range, 0, 2, 0));
    for (;;) pause();
  }
  if (!must(fork())) _exit(3); // a zombie
  if (!without(argc, argv, "-seccomp")) filter();
  siginfo_t zombie;
  must(waitid(P_ALL, 0, &zombie, WEXITED | WNOWAIT));
  must(write(1, "ready\n", 6));
  must(syscall(SYS_close_range, 0, 2, 0)); // they are of outside
  for (;;) pause();
}

int main(int argc, char **argv) {
  int net = !without(argc, argv, "-net");
  if (without(argc, argv, "-inside")) return be_a_zoo(argc, argv, net);
  must(syscall(SYS_close_range, 3, ~0U, 0)); // what our callers left open
  int namespaces = CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNS | CLONE_NEWPID;
  if (net) namespaces |= CLONE_NEWNET;
  if (!without(argc, argv, "-namespaces")) {
    must(unshare(namespaces));
    must(mount(0, "/", 0, MS_REC | MS_PRIVATE, 0));
  }
  pid_t init = must(fork());
  if (init) {
    int status;
    must(waitpid(init, &status, 0));
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
  }
  must(setsid());
  if (!without(argc, argv, "-namespaces")) {
    char directory[4096], root[4200];
    must((long)getcwd(directory, sizeof directory));
    // A root of our own: CRIU must know every mount below the root, and the machine's are not ours.
    snprintf(root, sizeof root, "%s/root", directory);
    must(mkdir(root, 0755));
    must(mount("zoo", root, "tmpfs", 0, "mode=0755"));
    must(chdir(root));
    const char *made[] = {"proc", "dev", "dev/pts", "tmp", "work"};
    for (unsigned i = 0; i < sizeof made / sizeof *made; i++) must(mkdir(made[i], 0755));
    must(mount("proc", "proc", "proc", 0, 0));
    must(mount("devpts", "dev/pts", "devpts", 0, "newinstance,ptmxmode=0666,mode=0620"));
    must(mknod("dev/null", S_IFCHR | 0666, 1 << 8 | 3));
    must(symlink("pts/ptmx", "dev/ptmx"));
    copy("/proc/self/exe", "zoo");
    must(mkdir("old", 0755));
    must(syscall(SYS_pivot_root, ".", "old"));
    must(umount2("/old", MNT_DETACH));
    must(chdir("/work"));
    argv[0] = "-inside";
    // The program must be a file of the new root.
    char *arguments[16] = {"zoo"};
    memcpy(arguments + 1, argv, argc * sizeof *argv);
    must(execv("/zoo", arguments));
  }
  return be_a_zoo(argc, argv, net);
}
