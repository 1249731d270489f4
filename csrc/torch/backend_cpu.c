/* The CPU backend: the core's operators on torch's threads. */
#include "backend.h"

#include <stdalign.h>
#include <stdatomic.h>

/* A range is dealt out in so many pieces: enough for a hundred threads to end together, and few, since each starts
 * with memory that nothing has asked for yet. More threads than pieces would have nothing to do. */
enum { FM_PIECES = 256, FM_MOST_SHARES = FM_PIECES };

/* What is left of a part of a range. */
typedef struct fm_share {
  alignas(64) _Atomic int64_t next; /* threads that count on one cache line wait for each other */
  int64_t end;
} fm_share;

/* A range, a share of it for each thread. */
typedef struct fm_deal {
  fm_share share[FM_MOST_SHARES];
  int64_t shares, piece;
  fm_range_fn fn;
  void *context;
} fm_deal;

static void finish_share(const fm_deal *deal, fm_share *share) {
  int64_t at = 0;
  while ((at = atomic_fetch_add_explicit(&share->next, deal->piece, memory_order_relaxed)) < share->end) {
    deal->fn(at, at + deal->piece < share->end ? at + deal->piece : share->end, deal->context);
  }
}

/* For threads [begin, end): each its own share, then what the others have left. */
static void take_shares(int64_t begin, int64_t end, void *context) {
  fm_deal *deal = context;
  for (int64_t own = begin; own < end; own++) {
    for (int64_t k = 0; k < deal->shares; k++) {
      finish_share(deal, &deal->share[(own + k) % deal->shares]);
    }
  }
}

/* The core's parallel_for runs on torch's own threads, so their number and pool are those that the user set. torch
 * would give each a share and wait for the slowest: a core whose sibling serves another tenant takes 1.5 times as long,
 * an efficiency core 2 to 3 times. Here a thread that has done its share helps out with the others', piece after piece.
 * Its share comes first, since it is the same in every pass: where each core has a cache of its own, the ascent finds
 * there the gradients that the norm has read. On two cores of an EPYC with a cache each (160 ns from one to the other)
 * the loops of a step of EfficientNet-B0 take 2.5 ms, with pieces for whichever thread came next 3.3; on two cores of
 * one cache (27 ns) the same. */
static void torch_threads(int64_t begin, int64_t end, int64_t grain, fm_range_fn fn, void *context) {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  const int64_t count = end - begin, useful = (count + grain - 1) / grain, piece = count / FM_PIECES;
  fm_deal deal; /* 16 KB, of which the first shares are used */
  deal.fn = fn;
  deal.context = context;
  deal.piece = piece > grain ? piece : grain;
  deal.shares = threads < useful ? threads : useful;
  deal.shares = deal.shares < FM_MOST_SHARES ? deal.shares : FM_MOST_SHARES;
  for (int64_t t = 0; t < deal.shares; t++) {
    atomic_init(&deal.share[t].next, begin + count * t / deal.shares);
    deal.share[t].end = begin + count * (t + 1) / deal.shares;
  }
  torch_parallel_for(0, deal.shares, 1, take_shares, &deal);
}

static bool run(fm_args *args, fm_operator op, fm_update update, const fm_list *list, const fm_options *options,
                const fm_scalars *scalars, double *result) {
  fm_options o = *options;
  fm_read_scalars(&o, scalars);
  if (o.rho < 0.0) {
    return fm_fail(args, "rho: %g given, but a radius must not be negative", o.rho);
  }
  if (o.scale < 0.0 && o.sizing == FM_SIZE_CURVATURE) {
    return fm_fail(args, "scale: %g given, but it must not be negative where curvatures size the noise", o.scale);
  }
  if (o.lipschitz < 0.0) {
    return fm_fail(args, "lipschitz_constant: %g given, but it must not be negative", o.lipschitz);
  }
  fm_sum sum = {0.0, 0.0, 0.0, 0.0};
  switch (op) {
    case FM_OP_NORM: *result = fm_norm(list, &o, torch_threads); break;
    case FM_OP_TIES: *result = fm_ties(list, &o, torch_threads); break;
    case FM_OP_PACGEN: fm_pacgen(list, &o, result, torch_threads); break;
    case FM_OP_ROW_NORMS: fm_row_norms(list, &o, result, torch_threads); break;
    case FM_OP_UPDATE: sum = fm_run_update(update, list, &o, torch_threads); break;
  }
  if (op == FM_OP_UPDATE && result != NULL) {
    result[0] = sum.mid;
    if (update == FM_SCALED_NOISE) {
      result[1] = sum.big;
      result[2] = sum.small;
    }
  }
  return true;
}

/* The numbers of elements must fit into what counts them. */
static bool check_index(fm_args *args, const fm_samples *s) {
  const int64_t most = ((INT64_C(1) << FM_SAMPLE_BITS) - 1) / s->inner;
  for (int64_t i = 0; s->index != NULL && i < s->numel / s->inner; i++) {
    if (s->index[i] < 0 || s->index[i] > most) {
      return fm_fail(args, "index[%lld] is %lld; give the number of the sample, from 0 to %lld", (long long)i,
                     (long long)s->index[i], (long long)most);
    }
  }
  return true;
}

static bool corrupt_labels(fm_args *args, const fm_label_job *job) {
  if (!check_index(args, &job->samples)) {
    return false;
  }
  const int64_t at = fm_corrupt_labels(job, torch_threads);
  return at < 0 || fm_fail(args,
                           "labels: element %lld is %lld, but there are %lld classes, from 0 on, and %lld is ignored; "
                           "mend the label, or give ignore_index",
                           (long long)at, (long long)job->labels[at], (long long)job->noise.classes,
                           (long long)job->noise.ignored);
}

static bool draw_samples(fm_args *args, const fm_draw_job *job) {
  if (!check_index(args, &job->samples)) {
    return false;
  }
  fm_draw_samples(job, torch_threads);
  return true;
}

static int64_t partials(int64_t chunks) { return chunks; }

static int isa(void) { return fm_active_kernels->isa; }

const fm_backend fm_this_backend = {
    .dispatch_keys = {"CPU", "SparseCPU", "SparseCsrCPU"},
    .defines_operators = true,
    .device_type = aoti_torch_device_type_cpu,
    .partials = partials,
    .isa = isa,
    .run = run,
    .corrupt_labels = corrupt_labels,
    .draw_samples = draw_samples,
};
