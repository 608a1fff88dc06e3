/*
 * Finding and starting cedanad (PROTOCOL.md, "Starting cedanad").
 *
 * One cedanad per run directory and mount namespace. Whoever finds nobody listening takes a lock, makes the listening
 * socket itself and executes cedanad with it; cedanad holds the lock as long as it lives, and the lock file
 * has its pid. So clients queue in the backlog, and two starters can't start two.
 */
#pragma once

#include "util.h"

/* Set by the keeper: cedanad becomes a child of our parent, not ours. */
extern bool daemon_as_sibling;
/* The socket's path, in static memory. */
const char *daemon_socket(void);
const char *daemon_log(void);
/* How long callers wait for a cedanad: 10 s, or CEDANA_KEEPER_PATIENCE_MS. */
uint64_t daemon_patience_ms(void);
/* An fd (NONBLOCK, CLOEXEC); -ECONNREFUSED or -ENOENT: nobody listens; -EAGAIN: too many wait. */
int daemon_connect(void);
/*
 * Starts cedanad unless somebody else is about to (-EBUSY: connect again soon) or has (an fd of a connection).
 * *pid: the process started, else 0.
 */
int daemon_start(pid_t *pid);
/*
 * A pidfd of the process that holds the lock, for whoever must kill a cedanad that has never said its pid. -ENOENT: nobody
 * holds it, or it is not the process that the lock file names.
 */
int daemon_lock_holder(pid_t *pid);
/* Ends a cedanad that hangs, and says so in its log. */
void daemon_kill(int pidfd, pid_t pid, uint64_t waited_ms);
/* A line for people in cedanad's log. */
void daemon_log_line(const char *text, ...) __attribute__((format(printf, 1, 2)));

/* For callers that may block: connects, starting cedanad when `start`, until the deadline. */
int daemon_connect_blocking(bool start, uint64_t deadline);
