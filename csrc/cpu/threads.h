/* Work stealing on somebody else's threads. */
#ifndef FM_THREADS_H
#define FM_THREADS_H

#include "fm_ops.h"

/* Runs fn over [begin, end) in pieces of `grain` or more, by at most `threads` threads. on_threads(0, n, 1, f, x) must
 * call f on disjoint ranges that cover [0, n), as many at a time as it likes. */
void fm_steal_work(fm_parallel_for on_threads, int64_t threads, int64_t begin, int64_t end, int64_t grain,
                   fm_range_fn fn, void *context);

#endif
