/*
 * Streams: each is a thread with a queue, so that what is asynchronous really is late. The null stream of a context waits for the
 * context's other (blocking) streams and they for it, by tasks that wait, as the real one does.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "driver.h"

struct task {
  task_fn run;
  void *argument;
  struct task *next;
};

struct CUstream_st {
  CUcontext context;
  unsigned flags;
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  struct task *first, **last;
  uint64_t submitted, completed;
  bool ending;
  pthread_t thread;
  struct CUstream_st *next;
};

struct CUevent_st {
  pthread_mutex_t mutex;
  struct CUstream_st *stream; /* of the last record; NULL: never recorded */
  uint64_t target;
  struct timespec at;
};

__thread bool per_thread_default;
static __thread struct CUstream_st *own_default;
static pthread_mutex_t list_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct CUstream_st *streams;

static void *work(void *argument) {
  struct CUstream_st *stream = argument;
  pthread_mutex_lock(&stream->mutex);
  for (;;) {
    while (!stream->first && !stream->ending) pthread_cond_wait(&stream->changed, &stream->mutex);
    if (!stream->first) break;
    struct task *task = stream->first;
    stream->first = task->next;
    if (!stream->first) stream->last = &stream->first;
    pthread_mutex_unlock(&stream->mutex);
    task->run(task->argument);
    free(task->argument);
    free(task);
    pthread_mutex_lock(&stream->mutex);
    stream->completed++;
    pthread_cond_broadcast(&stream->changed);
  }
  pthread_mutex_unlock(&stream->mutex);
  return NULL;
}

struct CUstream_st *stream_new(CUcontext context, unsigned flags) {
  struct CUstream_st *stream = calloc(1, sizeof *stream);
  if (!stream) return NULL;
  stream->context = context;
  stream->flags = flags;
  stream->last = &stream->first;
  pthread_mutex_init(&stream->mutex, NULL);
  pthread_cond_init(&stream->changed, NULL);
  if (pthread_create(&stream->thread, NULL, work, stream)) {
    free(stream);
    return NULL;
  }
  pthread_mutex_lock(&list_mutex);
  stream->next = streams;
  streams = stream;
  pthread_mutex_unlock(&list_mutex);
  return stream;
}

CUresult stream_resolve(CUstream given, struct CUstream_st **found) {
  CUcontext context;
  TRY(current_context(&context));
  if (given == CU_STREAM_PER_THREAD || (given == NULL && per_thread_default)) {
    if (!own_default || own_default->context != context) own_default = stream_new(context, 0);
    *found = own_default;
    return own_default ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
  }
  if (given == NULL || given == CU_STREAM_LEGACY) {
    *found = context->null_stream;
    return CUDA_SUCCESS;
  }
  pthread_mutex_lock(&list_mutex);
  struct CUstream_st *at = streams;
  while (at && at != given) at = at->next;
  pthread_mutex_unlock(&list_mutex);
  *found = at;
  return at ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

/* ---- waiting for another stream's tasks, by a task ---- */
struct wait {
  struct CUstream_st *stream;
  uint64_t target;
};

static void wait_until_completed(struct CUstream_st *stream, uint64_t target) {
  pthread_mutex_lock(&stream->mutex);
  while (stream->completed < target) pthread_cond_wait(&stream->changed, &stream->mutex);
  pthread_mutex_unlock(&stream->mutex);
}
static void run_wait(void *argument) {
  struct wait *wait = argument;
  wait_until_completed(wait->stream, wait->target);
}
static uint64_t submitted(struct CUstream_st *stream) {
  pthread_mutex_lock(&stream->mutex);
  uint64_t count = stream->submitted;
  pthread_mutex_unlock(&stream->mutex);
  return count;
}

static CUresult push(struct CUstream_st *stream, task_fn run, void *argument) {
  struct task *task = calloc(1, sizeof *task);
  if (!task) return CUDA_ERROR_OUT_OF_MEMORY;
  task->run = run;
  task->argument = argument;
  pthread_mutex_lock(&stream->mutex);
  *stream->last = task;
  stream->last = &task->next;
  stream->submitted++;
  pthread_cond_broadcast(&stream->changed);
  pthread_mutex_unlock(&stream->mutex);
  return CUDA_SUCCESS;
}

static CUresult push_wait(struct CUstream_st *stream, struct CUstream_st *other, uint64_t target) {
  struct wait *wait = malloc(sizeof *wait);
  if (!wait) return CUDA_ERROR_OUT_OF_MEMORY;
  *wait = (struct wait){other, target};
  return push(stream, run_wait, wait);
}

CUresult stream_push(struct CUstream_st *stream, task_fn run, void *argument) {
  /* One at a time: two that wait for each other must agree who came first. */
  static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER;
  CUresult result = CUDA_SUCCESS;
  pthread_mutex_lock(&order);
  struct CUstream_st *null_stream = stream->context->null_stream;
  if (stream == null_stream) {
    pthread_mutex_lock(&list_mutex);
    for (struct CUstream_st *at = streams; at && !result; at = at->next)
      if (at != stream && at->context == stream->context && !(at->flags & CU_STREAM_NON_BLOCKING) && at->submitted > at->completed)
        result = push_wait(stream, at, submitted(at));
    pthread_mutex_unlock(&list_mutex);
  } else if (!(stream->flags & CU_STREAM_NON_BLOCKING) && null_stream && null_stream->submitted > null_stream->completed) {
    result = push_wait(stream, null_stream, submitted(null_stream));
  }
  if (!result) result = push(stream, run, argument);
  pthread_mutex_unlock(&order);
  if (result) free(argument);
  return result;
}

CUresult stream_drain(struct CUstream_st *stream) {
  wait_until_completed(stream, submitted(stream));
  return CUDA_SUCCESS;
}

CUresult streams_drain(CUcontext context) {
  for (struct CUstream_st *at = streams; at; at = at->next)
    if (!context || at->context == context) stream_drain(at);
  return CUDA_SUCCESS;
}

bool streams_idle(void) {
  bool idle = true;
  pthread_mutex_lock(&list_mutex);
  for (struct CUstream_st *at = streams; at; at = at->next) {
    pthread_mutex_lock(&at->mutex);
    idle &= at->submitted == at->completed;
    pthread_mutex_unlock(&at->mutex);
  }
  pthread_mutex_unlock(&list_mutex);
  return idle;
}

API(cuStreamCreate, (CUstream * stream, unsigned flags), (stream, flags)) {
  CUcontext context;
  TRY(current_context(&context));
  if (!stream || flags > 1) return CUDA_ERROR_INVALID_VALUE;
  *stream = stream_new(context, flags);
  return *stream ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
API(cuStreamCreateWithPriority, (CUstream * stream, unsigned flags, int priority), (stream, flags, priority)) {
  (void)priority;
  return do_cuStreamCreate(stream, flags);
}
API(cuStreamDestroy_v2, (CUstream given), (given)) {
  struct CUstream_st *stream;
  if (!given || given == CU_STREAM_LEGACY || given == CU_STREAM_PER_THREAD) return CUDA_ERROR_INVALID_HANDLE;
  TRY(stream_resolve(given, &stream));
  /* Its memory stays: an event or a waiting task may still point to it. */
  pthread_mutex_lock(&list_mutex);
  for (struct CUstream_st **at = &streams; *at; at = &(*at)->next)
    if (*at == stream) {
      *at = stream->next;
      break;
    }
  pthread_mutex_unlock(&list_mutex);
  pthread_mutex_lock(&stream->mutex);
  stream->ending = true;
  pthread_cond_broadcast(&stream->changed);
  pthread_mutex_unlock(&stream->mutex);
  pthread_join(stream->thread, NULL);
  return CUDA_SUCCESS;
}
API_STREAM(cuStreamSynchronize, _ptsz, (CUstream given), (given)) {
  struct CUstream_st *stream;
  TRY(stream_resolve(given, &stream));
  if (stream == stream->context->null_stream) return streams_drain(stream->context);
  return stream_drain(stream);
}
API_STREAM(cuStreamQuery, _ptsz, (CUstream given), (given)) {
  struct CUstream_st *stream;
  TRY(stream_resolve(given, &stream));
  pthread_mutex_lock(&stream->mutex);
  bool idle = stream->completed == stream->submitted;
  pthread_mutex_unlock(&stream->mutex);
  return idle ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
API_STREAM(cuStreamWaitEvent, _ptsz, (CUstream given, CUevent event, unsigned flags), (given, event, flags)) {
  struct CUstream_st *stream;
  (void)flags;
  TRY(stream_resolve(given, &stream));
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  pthread_mutex_lock(&event->mutex);
  struct CUstream_st *other = event->stream;
  uint64_t target = event->target;
  pthread_mutex_unlock(&event->mutex);
  return other && other != stream ? push_wait(stream, other, target) : CUDA_SUCCESS;
}

struct host_call {
  CUhostFn function;
  void *argument;
};
static void run_host_call(void *argument) {
  struct host_call *call = argument;
  call->function(call->argument);
}
API_STREAM(cuLaunchHostFunc, _ptsz, (CUstream given, CUhostFn function, void *argument), (given, function, argument)) {
  struct CUstream_st *stream;
  TRY(stream_resolve(given, &stream));
  struct host_call *call = malloc(sizeof *call);
  if (!function || !call) return CUDA_ERROR_INVALID_VALUE;
  *call = (struct host_call){function, argument};
  return stream_push(stream, run_host_call, call);
}

API(cuEventCreate, (CUevent * event, unsigned flags), (event, flags)) {
  CUcontext context;
  (void)flags;
  TRY(current_context(&context));
  if (!event || !(*event = calloc(1, sizeof **event))) return CUDA_ERROR_OUT_OF_MEMORY;
  pthread_mutex_init(&(*event)->mutex, NULL);
  return CUDA_SUCCESS;
}
API(cuEventDestroy_v2, (CUevent event), (event)) {
  return event ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; /* a task may still write its time */
}
struct record { CUevent event; };
static void run_record(void *argument) {
  CUevent event = ((struct record *)argument)->event;
  pthread_mutex_lock(&event->mutex);
  clock_gettime(CLOCK_MONOTONIC, &event->at);
  pthread_mutex_unlock(&event->mutex);
}
API_STREAM(cuEventRecord, _ptsz, (CUevent event, CUstream given), (event, given)) {
  struct CUstream_st *stream;
  TRY(stream_resolve(given, &stream));
  struct record *record = malloc(sizeof *record);
  if (!event || !record) return CUDA_ERROR_INVALID_HANDLE;
  record->event = event;
  TRY(stream_push(stream, run_record, record));
  pthread_mutex_lock(&event->mutex);
  event->stream = stream;
  event->target = submitted(stream);
  pthread_mutex_unlock(&event->mutex);
  return CUDA_SUCCESS;
}
static bool event_done(CUevent event) {
  if (!event->stream) return true;
  pthread_mutex_lock(&event->stream->mutex);
  bool done = event->stream->completed >= event->target;
  pthread_mutex_unlock(&event->stream->mutex);
  return done;
}
API(cuEventSynchronize, (CUevent event), (event)) {
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  if (event->stream) wait_until_completed(event->stream, event->target);
  return CUDA_SUCCESS;
}
API(cuEventQuery, (CUevent event), (event)) {
  if (!event) return CUDA_ERROR_INVALID_HANDLE;
  return event_done(event) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
API(cuEventElapsedTime_v2, (float *ms, CUevent from, CUevent to), (ms, from, to)) {
  if (!ms || !from || !to || !from->stream || !to->stream) return CUDA_ERROR_INVALID_HANDLE;
  if (!event_done(from) || !event_done(to)) return CUDA_ERROR_NOT_READY;
  *ms = (float)(to->at.tv_sec - from->at.tv_sec) * 1e3f + (float)(to->at.tv_nsec - from->at.tv_nsec) / 1e6f;
  return CUDA_SUCCESS;
}
API(cuEventElapsedTime, (float *ms, CUevent from, CUevent to), (ms, from, to)) {
  return do_cuEventElapsedTime_v2(ms, from, to);
}
