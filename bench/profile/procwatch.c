// procwatch: what processes begin and end, with the kernel's times, until stdin ends. Costs the watched nothing: the kernel's process
// connector tells (CONFIG_PROC_EVENTS, CAP_NET_ADMIN), nobody is traced or slowed down.
//
// One line each, fields separated by tabs, times in nanoseconds of CLOCK_MONOTONIC:
//   fork TIME PARENT CHILD
//   exec TIME PID ARGV     arguments separated by 0x1f
//   exit TIME PID
//   log PID LINE           of CRIU's log, after its exit: it is opened as soon as CRIU has it, for its directory goes with the work
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/cn_proc.h>
#include <linux/connector.h>
#include <linux/netlink.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define LOGS 16
static struct {
  int pid, fd;
} logs[LOGS];

static void die(const char *what) {
  fprintf(stderr, "procwatch: %s: %s\n", what, strerror(errno));
  exit(1);
}

static int subscribe(void) {
  int fd = socket(PF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, NETLINK_CONNECTOR), room = 8 << 20;
  struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = CN_IDX_PROC};
  if (fd < 0 || bind(fd, (void *)&address, sizeof address) < 0) die("process connector");
  setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
  char text[NLMSG_SPACE(sizeof(struct cn_msg) + sizeof(enum proc_cn_mcast_op))] = {0};
  struct nlmsghdr *header = (void *)text;
  struct cn_msg *message = NLMSG_DATA(header);
  header->nlmsg_len = NLMSG_LENGTH(sizeof *message + sizeof(enum proc_cn_mcast_op));
  header->nlmsg_type = NLMSG_DONE;
  message->id.idx = CN_IDX_PROC;
  message->id.val = CN_VAL_PROC;
  message->len = sizeof(enum proc_cn_mcast_op);
  memcpy(message->data, &(enum proc_cn_mcast_op){PROC_CN_MCAST_LISTEN}, sizeof(enum proc_cn_mcast_op));
  if (send(fd, header, header->nlmsg_len, 0) < 0) die("listen to the process connector");
  return fd;
}

static void exec_event(unsigned long long time, int pid) {
  char path[64], argv[4096];
  snprintf(path, sizeof path, "/proc/%d/cmdline", pid);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t n = fd < 0 ? 0 : read(fd, argv, sizeof argv - 1);
  if (fd >= 0) close(fd);
  if (n < 0) n = 0;
  for (ssize_t i = 0; i < n; i++)
    if (!argv[i] || argv[i] == '\n' || argv[i] == '\t') argv[i] = argv[i] ? ' ' : 0x1f;
  argv[n] = 0;
  printf("exec\t%llu\t%d\t%s\n", time, pid, argv);
  /* "criu swrk 3", "/usr/sbin/criu swrk 3", or what it calls itself soon after: "criu: dump --rpc -t 123" */
  char *end = strpbrk(argv, "\x1f:"), *name;
  if (!end) return;
  *end = 0;
  name = strrchr(argv, '/') ? strrchr(argv, '/') + 1 : argv;
  for (int i = 0; !strcmp(name, "criu") && i < LOGS; i++)
    if (!logs[i].pid) {
      logs[i].pid = pid;
      logs[i].fd = -1;
      return;
    }
}

/* CRIU's log among its files, once it is there. */
static void find_log(int slot) {
  char path[64], target[4096];
  snprintf(path, sizeof path, "/proc/%d/fd", logs[slot].pid);
  DIR *directory = opendir(path);
  if (!directory) return;
  for (struct dirent *entry; logs[slot].fd < 0 && (entry = readdir(directory));) {
    ssize_t n = readlinkat(dirfd(directory), entry->d_name, target, sizeof target - 1);
    if (n < 4) continue;
    target[n] = 0;
    if (!strcmp(target + n - 4, ".log")) logs[slot].fd = openat(dirfd(directory), entry->d_name, O_RDONLY | O_CLOEXEC);
  }
  closedir(directory);
}

static void print_log(int slot) {
  FILE *file = logs[slot].fd < 0 ? NULL : fdopen(logs[slot].fd, "r");
  char *line = NULL;
  size_t size = 0;
  while (file && getline(&line, &size, file) > 0) {
    line[strcspn(line, "\n")] = 0;
    printf("log\t%d\t%s\n", logs[slot].pid, line);
  }
  free(line);
  if (file) fclose(file);
  logs[slot].pid = 0;
}

static void take(const struct proc_event *event) {
  unsigned long long time = event->timestamp_ns;
  if (event->what == PROC_EVENT_FORK && event->event_data.fork.child_pid == event->event_data.fork.child_tgid)
    printf("fork\t%llu\t%d\t%d\n", time, event->event_data.fork.parent_tgid, event->event_data.fork.child_pid);
  if (event->what == PROC_EVENT_EXEC) exec_event(time, event->event_data.exec.process_tgid);
  if (event->what != PROC_EVENT_EXIT || event->event_data.exit.process_pid != event->event_data.exit.process_tgid) return;
  printf("exit\t%llu\t%d\n", time, event->event_data.exit.process_pid);
  for (int i = 0; i < LOGS; i++)
    if (logs[i].pid == event->event_data.exit.process_pid) print_log(i);
}

int main(void) {
  int fd = subscribe();
  puts("ready");
  fflush(stdout);
  for (;;) {
    int unfound = 0;
    for (int i = 0; i < LOGS; i++) {
      if (logs[i].pid && logs[i].fd < 0) find_log(i);
      unfound |= logs[i].pid && logs[i].fd < 0;
    }
    struct pollfd ready[] = {{.fd = fd, .events = POLLIN}, {.fd = 0, .events = POLLIN}};
    if (poll(ready, 2, unfound ? 1 : -1) < 0 && errno != EINTR) die("poll");
    if (ready[0].revents) {
      char text[8192];
      ssize_t n = recv(fd, text, sizeof text, MSG_DONTWAIT);
      if (n < 0 && errno == ENOBUFS) fprintf(stderr, "procwatch: events were lost\n");
      for (struct nlmsghdr *header = (void *)text; n > 0 && NLMSG_OK(header, n); header = NLMSG_NEXT(header, n))
        take((void *)((struct cn_msg *)NLMSG_DATA(header))->data);
    }
    if (ready[1].revents && !ready[0].revents) return fflush(stdout) ? 1 : 0;
  }
}
