/*
 * The keeper's event loop: watched fds and timers over one epoll.
 *
 * A watch owns its fd. Whoever closes a watch in the middle of a batch of events can be sure that its handler is
 * not called any more; the memory around it must live until the batch is over, so it is given to loop_free_later().
 */
#pragma once

#include <sys/epoll.h>

#include "util.h"

struct watch {
  int fd; /* -1: closed */
  bool added;
  uint32_t events; /* asked for */
  void (*ready)(struct watch *watch, uint32_t events);
};

struct timer {
  uint64_t at_ms;
  bool armed;
  void (*fire)(struct timer *timer);
  struct timer *next;
};

int loop_open(void);
/* Events that the handler is called for; 0 keeps the watch without any (a hang-up is reported all the same). */
int watch_events(struct watch *watch, uint32_t events);
void watch_close(struct watch *watch);
void timer_start(struct timer *timer, uint64_t delay_ms, void (*fire)(struct timer *));
void timer_stop(struct timer *timer);
void loop_free_later(void *memory);
/* One round: `before` runs first, then the events, then the timers that are due. */
void loop_round(void (*before)(void));
