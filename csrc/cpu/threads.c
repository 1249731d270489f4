/* Work stealing: each thread its own share first, the same in every pass, so that a core finds in its cache what it has
 * read before (the ascent the gradients of the norm); then what the others have left. A static schedule would wait for
 * the slowest thread, be it on a core whose sibling serves another tenant or on an efficiency core. */
#include "threads.h"

#include <stdalign.h>
#include <stdatomic.h>

/* A range is cut into so many pieces: enough for a hundred threads to end together, and few, since each starts with
 * memory that nothing has asked for yet. More threads than pieces would have nothing to do. */
enum { FM_PIECES = 256, FM_MOST_SHARES = FM_PIECES };

/* What is left of a part of a range. */
typedef struct fm_share {
  alignas(64) _Atomic int64_t next; /* threads that count on one cache line wait for each other */
  int64_t end;
} fm_share;

/* A range, a share of it for each thread. */
typedef struct fm_schedule {
  fm_share share[FM_MOST_SHARES];
  int64_t shares, piece;
  fm_range_fn fn;
  void *context;
} fm_schedule;

static void finish_share(const fm_schedule *schedule, fm_share *share) {
  int64_t at = 0;
  while ((at = atomic_fetch_add_explicit(&share->next, schedule->piece, memory_order_relaxed)) < share->end) {
    schedule->fn(at, at + schedule->piece < share->end ? at + schedule->piece : share->end, schedule->context);
  }
}

/* For threads [begin, end). */
static void take_shares(int64_t begin, int64_t end, void *context) {
  fm_schedule *schedule = context;
  for (int64_t own = begin; own < end; own++) {
    for (int64_t k = 0; k < schedule->shares; k++) {
      finish_share(schedule, &schedule->share[(own + k) % schedule->shares]);
    }
  }
}

void fm_steal_work(fm_parallel_for on_threads, int64_t threads, int64_t begin, int64_t end, int64_t grain,
                   fm_range_fn fn, void *context) {
  const int64_t count = end - begin, useful = (count + grain - 1) / grain, piece = count / FM_PIECES;
  fm_schedule schedule; /* large, of which the first shares are used */
  schedule.fn = fn;
  schedule.context = context;
  schedule.piece = piece > grain ? piece : grain;
  schedule.shares = threads < useful ? threads : useful;
  schedule.shares = schedule.shares < FM_MOST_SHARES ? schedule.shares : FM_MOST_SHARES;
  for (int64_t t = 0; t < schedule.shares; t++) {
    atomic_init(&schedule.share[t].next, begin + count * t / schedule.shares);
    schedule.share[t].end = begin + count * (t + 1) / schedule.shares;
  }
  on_threads(0, schedule.shares, 1, take_shares, &schedule);
}
