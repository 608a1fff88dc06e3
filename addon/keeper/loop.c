#include "loop.h"

#include <unistd.h>

static int epoll_fd = -1;
static struct timer *timers;
static void **garbage;
static size_t garbage_count, garbage_capacity;

int loop_open(void) {
  epoll_fd = epoll_create1(EPOLL_CLOEXEC);
  return epoll_fd < 0 ? -errno : 0;
}

int watch_events(struct watch *watch, uint32_t events) {
  if (watch->added && watch->events == events && !(events & EPOLLONESHOT)) return 0;
  struct epoll_event event = {.events = events, .data.ptr = watch};
  if (epoll_ctl(epoll_fd, watch->added ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, watch->fd, &event) < 0) return -errno;
  watch->added = true;
  watch->events = events;
  return 0;
}

void watch_close(struct watch *watch) {
  if (watch->fd < 0) return;
  /* Explicitly: a forked helper may hold a copy of the fd for a moment, and closing ours would leave it registered. */
  if (watch->added) epoll_ctl(epoll_fd, EPOLL_CTL_DEL, watch->fd, NULL);
  close(watch->fd);
  *watch = (struct watch){.fd = -1};
}

void timer_stop(struct timer *timer) {
  if (!timer->armed) return;
  timer->armed = false;
  for (struct timer **at = &timers; *at; at = &(*at)->next) {
    if (*at != timer) continue;
    *at = timer->next;
    return;
  }
}

void timer_start(struct timer *timer, uint64_t delay_ms, void (*fire)(struct timer *)) {
  timer_stop(timer);
  *timer = (struct timer){.at_ms = now_ms() + delay_ms, .armed = true, .fire = fire, .next = timers};
  timers = timer;
}

static int next_timeout(void) {
  uint64_t first = UINT64_MAX;
  for (struct timer *t = timers; t; t = t->next)
    if (t->at_ms < first) first = t->at_ms;
  if (first == UINT64_MAX) return -1;
  uint64_t now = now_ms();
  if (first <= now) return 0;
  return first - now > 3600000 ? 3600000 : (int)(first - now);
}

static void run_timers(void) {
  uint64_t now = now_ms();
  for (;;) {
    struct timer *due = timers;
    while (due && due->at_ms > now) due = due->next;
    if (!due) return;
    timer_stop(due);
    due->fire(due);
  }
}

void loop_free_later(void *memory) {
  if (garbage_count == garbage_capacity)
    garbage = reallocate(garbage, (garbage_capacity = garbage_capacity * 2 + 8) * sizeof *garbage);
  garbage[garbage_count++] = memory;
}

void loop_round(void (*before)(void)) {
  before();
  struct epoll_event events[32];
  int count = epoll_wait(epoll_fd, events, countof(events), next_timeout());
  for (int i = 0; i < count; i++) {
    struct watch *watch = events[i].data.ptr;
    if (watch->ready) watch->ready(watch, events[i].events);
  }
  run_timers();
  while (garbage_count > 0) free(garbage[--garbage_count]);
}
