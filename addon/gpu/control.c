/*
 * The thread that does what is asked of the process from outside: say what there is, quiesce, go on. PROTOCOL.md has the rules.
 *
 * Asked and answered through a memfd that is mapped and has no descriptor: nothing that a program which closes all its files could
 * close, nothing that CRIU couldn't take along (a socket with its other end outside is such a thing), and the numbers of the
 * program's own descriptors stay as they would be.
 */
#include "gpu.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#define TRACE_PERIOD_NS 200000000ull
#define POLL_NS 100000ull
#define MAX_CONTEXTS 256
#define MS 1000000ull

/* A wait for the devices is the driver's, and can't be broken off: it has a thread of its own, which outlasts a deadline. */
static struct {
  uint32_t busy;
  uint32_t done; /* a futex */
  int error;     /* the driver's first */
} synchronisation;

/*
 * How long a quiesced process still waits; 0: it has no lease. Counted down rather than a time on the clock, which is another one after a
 * restore on another machine.
 */
static uint64_t lease_left_ns, lease_looked_ns;

static int driver1(const char *name, uint64_t a) {
  void *target = driver_symbol(name);
  if (!target) return CUDA_ERROR_NOT_SUPPORTED;
  int (*function)(uint64_t);
  memcpy(&function, &target, sizeof function);
  return function(a);
}

/* Primary contexts by their devices, whoever made them: a handle of one, kept from before, might be of one that has been reset. */
static int synchronise_primaries(void) {
  void *symbols[] = {driver_symbol("cuDeviceGetCount"), driver_symbol("cuDevicePrimaryCtxGetState"),
                     driver_symbol("cuDevicePrimaryCtxRetain")};
  if (!symbols[0] || !symbols[1] || !symbols[2]) return CUDA_SUCCESS;
  int (*count_of)(int *), (*state_of)(int, unsigned *, int *), (*retain)(uint64_t *, int);
  memcpy(&count_of, &symbols[0], sizeof count_of);
  memcpy(&state_of, &symbols[1], sizeof state_of);
  memcpy(&retain, &symbols[2], sizeof retain);
  int count = 0, first_error = CUDA_SUCCESS;
  if (count_of(&count) != CUDA_SUCCESS) return CUDA_SUCCESS; /* before cuInit there is nothing to wait for */
  for (int device = 0; device < count; device++) {
    unsigned flags;
    int active = 0;
    uint64_t context = 0;
    if (state_of(device, &flags, &active) != CUDA_SUCCESS || !active || retain(&context, device) != CUDA_SUCCESS) continue;
    int error = driver1("cuCtxSetCurrent", context);
    if (!error) error = driver1("cuCtxSynchronize", 0);
    driver1("cuCtxSetCurrent", 0);
    const char *release = driver_symbol("cuDevicePrimaryCtxRelease_v2") ? "cuDevicePrimaryCtxRelease_v2" : "cuDevicePrimaryCtxRelease";
    driver1(release, (uint64_t)device);
    if (error && !first_error) first_error = error;
  }
  return first_error;
}

static void *synchronise(void *unused) {
  (void)unused;
  static uint64_t contexts[MAX_CONTEXTS];
  unsigned count = track_contexts(contexts, MAX_CONTEXTS);
  int first_error = CUDA_SUCCESS;
  for (unsigned i = 0; i < count; i++) {
    int error = driver1("cuCtxSetCurrent", contexts[i]);
    if (!error) error = driver1("cuCtxSynchronize", 0);
    if (error && !first_error) first_error = error;
  }
  driver1("cuCtxSetCurrent", 0);
  int error = synchronise_primaries();
  synchronisation.error = first_error ? first_error : error;
  __atomic_store_n(&synchronisation.busy, 0, __ATOMIC_RELEASE);
  __atomic_store_n(&synchronisation.done, 1, __ATOMIC_RELEASE);
  futex_wake(&synchronisation.done, false);
  return NULL;
}

static bool wait_for_calls(uint64_t until, struct mailbox *out) {
  const char *name = NULL;
  while ((out->calls_in_flight = gate_in_flight(&name))) {
    if (now_ns() >= until) {
      strncpy(out->call, name ? name : "", sizeof out->call - 1);
      return false;
    }
    sleep_ns(POLL_NS);
  }
  return true;
}

/* The gate is closed. Returns a status. */
static uint32_t wait_for_quiet(uint64_t until, struct mailbox *out) {
  if (!wait_for_calls(until, out)) return MAILBOX_CALLS_IN_FLIGHT;
  if (!driver_present()) return MAILBOX_OK;
  if (__atomic_exchange_n(&synchronisation.busy, 1, __ATOMIC_ACQ_REL)) return MAILBOX_WORK_IN_FLIGHT; /* an earlier one's wait goes on */
  synchronisation.done = 0;
  int failed = start_thread(synchronise, NULL);
  if (failed) {
    __atomic_store_n(&synchronisation.busy, 0, __ATOMIC_RELEASE);
    out->detail = (uint32_t)failed;
    return MAILBOX_NO_THREAD;
  }
  while (!__atomic_load_n(&synchronisation.done, __ATOMIC_ACQUIRE)) {
    uint64_t now = now_ns();
    if (now >= until) return MAILBOX_WORK_IN_FLIGHT;
    futex_wait(&synchronisation.done, 0, until - now, false);
  }
  out->detail = (uint32_t)synchronisation.error;
  return synchronisation.error ? MAILBOX_DRIVER_ERROR : MAILBOX_OK;
}

static void set_state(struct mailbox *out, uint32_t state) {
  __atomic_store_n(&out->state, state, __ATOMIC_RELEASE);
}

static void resume(struct mailbox *out) {
  lease_left_ns = 0;
  gate_open();
  set_state(out, MAILBOX_RUNNING);
}

static uint32_t quiesce(struct mailbox *out) {
  uint64_t now = now_ns();
  gate_close();
  set_state(out, MAILBOX_QUIESCING);
  uint32_t status = wait_for_quiet(now + out->deadline_ms * MS, out);
  if (status != MAILBOX_OK) {
    resume(out); /* all or nothing: a process that can't be quiesced runs on */
    return status;
  }
  set_state(out, MAILBOX_QUIESCED);
  lease_left_ns = out->lease_ms * MS;
  lease_looked_ns = now_ns();
  return MAILBOX_OK;
}

static void answer(struct mailbox *out, uint32_t request) {
  out->detail = 0;
  memset(out->call, 0, sizeof out->call);
  uint32_t status = MAILBOX_OK;
  switch (__atomic_load_n(&out->command, __ATOMIC_RELAXED)) {
    case MAILBOX_REPORT:
      break;
    case MAILBOX_QUIESCE:
      status = quiesce(out);
      break;
    case MAILBOX_RESUME:
      resume(out);
      break;
    default:
      status = MAILBOX_UNKNOWN_COMMAND;
  }
  if (process->tracing) trace_drain(); /* who asks finds the trace up to here in its file */
  out->calls_in_flight = gate_in_flight(NULL);
  out->trace_dropped = trace_dropped();
  track_report(out);
  out->status = status;
  __atomic_store_n(&out->answered, request, __ATOMIC_RELEASE);
  futex_wake(&out->answered, true);
}

static uint64_t patience(void) {
  uint64_t period = process->tracing ? TRACE_PERIOD_NS : 0;
  if (lease_left_ns == 0) return period;
  return period && period < lease_left_ns ? period : lease_left_ns;
}

static void look_at_lease(struct mailbox *mailbox) {
  if (lease_left_ns == 0) return;
  uint64_t now = now_ns(), gone = now > lease_looked_ns ? now - lease_looked_ns : 0;
  lease_looked_ns = now;
  if (gone < lease_left_ns) lease_left_ns -= gone;
  else resume(mailbox);
}

static void *control(void *argument) {
  struct mailbox *mailbox = argument;
  kernel(SYS_prctl, PR_SET_NAME, (long)"cedana-gpu", 0, 0, 0, 0);
  for (uint32_t seen = 0;;) {
    uint32_t request = __atomic_load_n(&mailbox->request, __ATOMIC_ACQUIRE);
    if (request != seen) answer(mailbox, seen = request);
    else futex_wait(&mailbox->request, seen, patience(), true);
    look_at_lease(mailbox);
    if (process->tracing) trace_drain();
  }
  return NULL;
}

/* There is something for it to do that nobody has asked for. */
void control_wake(void) {
  struct mailbox *mailbox = process->mailbox;
  if (mailbox) futex_wake(&mailbox->request, true);
}

/* Without a mailbox or a thread (a limit on processes, a seccomp filter) the program runs as it would; it only can't be asked. */
void control_begin(void) {
  lease_left_ns = 0;
  memset(&synchronisation, 0, sizeof synchronisation);
  long fd = kernel(SYS_memfd_create, (long)MAILBOX_NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING, 0, 0, 0, 0);
  if (fd < 0) return;
  long at = -1;
  if (kernel(SYS_ftruncate, fd, MAILBOX_BYTES, 0, 0, 0, 0) == 0 &&
      kernel(SYS_fcntl, fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL, 0, 0, 0) == 0)
    at = kernel(SYS_mmap, 0, MAILBOX_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  kernel(SYS_close, fd, 0, 0, 0, 0, 0);
  if (at < 0 && at > -4096) return;
  kernel(SYS_madvise, at, MAILBOX_BYTES, MADV_DONTFORK, 0, 0, 0);
  struct mailbox *mailbox = (struct mailbox *)at;
  mailbox->version = MAILBOX_VERSION;
  mailbox->pid = process->pid;
  __atomic_store_n(&mailbox->magic, MAILBOX_MAGIC, __ATOMIC_RELEASE);
  process->mailbox = mailbox;
  if (start_thread(control, mailbox) != 0) {
    kernel(SYS_munmap, at, MAILBOX_BYTES, 0, 0, 0, 0);
    process->mailbox = NULL;
  }
}
