/* The gate: counts who is inside the driver, and keeps everybody out while the process is locked. */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "driver.h"

static _Atomic int closed, inside;

static void wait_while_closed(void) { syscall(SYS_futex, &closed, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0); }

void gate_enter(void) {
  for (;;) {
    inside++;
    if (!closed) return;
    inside--;
    wait_while_closed();
  }
}
void gate_leave(void) { inside--; }
void gate_close(void) { closed = 1; }
void gate_open(void) {
  closed = 0;
  syscall(SYS_futex, &closed, FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
}
int gate_inside(void) { return inside; }
