/* Work stealing: every element once, whatever runs the threads. */
#include "check.h"
#include "tests.h"
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

typedef struct visits {
  _Atomic int *count;
  int64_t begin, end, grain;
  _Atomic int short_pieces; /* of fewer elements than the grain: each thread's last one may be */
} visits;

static void visit(int64_t begin, int64_t end, void *context) {
  visits *seen = context;
  CHECK(begin < end && begin >= seen->begin && end <= seen->end, "[%lld, %lld)", (long long)begin, (long long)end);
  if (end - begin < seen->grain) {
    atomic_fetch_add(&seen->short_pieces, 1);
  }
  for (int64_t i = begin; i < end; i++) {
    atomic_fetch_add(&seen->count[i - seen->begin], 1);
  }
}

static void check_once(fm_parallel_for on_threads, int64_t threads, int64_t begin, int64_t size, int64_t grain) {
  visits seen = {.begin = begin, .end = begin + size, .grain = grain};
  seen.count = calloc((size_t)size + 1, sizeof *seen.count);
  fm_steal_work(on_threads, threads, begin, begin + size, grain, visit, &seen);
  for (int64_t i = 0; i < size; i++) {
    CHECK(seen.count[i] == 1, "%lld threads, %lld elements by %lld: element %lld %d times", (long long)threads,
          (long long)size, (long long)grain, (long long)i, seen.count[i]);
  }
  CHECK(seen.short_pieces <= threads, "%lld threads: %d short pieces", (long long)threads, seen.short_pieces);
  free((void *)seen.count);
}

/* One thread that runs all shares, forwards, backwards and in parts: the first one steals all. */
void test_stealing(void) {
  const int64_t threads[] = {1, 2, 3, 255, 256, 257, 1000}, sizes[] = {0, 1, 15, 16, 17, 255, 5000, 100003};
  for (int s = 0; s < SPLITS; s++) {
    for (size_t t = 0; t < sizeof threads / sizeof *threads; t++) {
      for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        check_once(splits[s], threads[t], 0, sizes[k], FM_GRAIN);
        check_once(splits[s], threads[t], 12345, sizes[k], 1);
      }
    }
  }
}

typedef struct thread_call {
  fm_range_fn fn;
  void *context;
  int64_t thread;
} thread_call;

static void *run_thread(void *argument) {
  const thread_call *call = argument;
  call->fn(call->thread, call->thread + 1, call->context);
  return NULL;
}

static void on_real_threads(int64_t begin, int64_t end, int64_t grain, fm_range_fn fn, void *context) {
  enum { MOST = 8 };
  pthread_t thread[MOST];
  thread_call call[MOST];
  (void)grain;
  for (int64_t t = begin; t < end && t < MOST; t++) {
    call[t] = (thread_call){fn, context, t};
    CHECK(pthread_create(&thread[t], NULL, run_thread, &call[t]) == 0, "no thread");
  }
  for (int64_t t = begin; t < end && t < MOST; t++) {
    pthread_join(thread[t], NULL);
  }
}

void test_concurrent_stealing(void) {
  for (int64_t threads = 1; threads <= 8; threads++) {
    check_once(on_real_threads, threads, 7, 50000, 1);
    check_once(on_real_threads, threads, 0, 129, FM_GRAIN);
  }
}
