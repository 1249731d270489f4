/* The operators on plain views: plans a list, runs a kernel over its chunks, folds partial results. */
#include "fm_ops.h"

#include <assert.h>
#include <unistd.h>

/* A store past the caches saves reading the line that it overwrites, but the next pass must fetch what it wrote from
 * memory. It pays once the four arrays of a step (weights, gradients, backup, momentum) exceed what the last-level
 * cache has to spare. A virtual machine is told the cache of a socket, or of several, while its neighbours use it too;
 * hence the cap (docs/performance.md). */
static bool exceeds_cache(int64_t bytes) {
  static int64_t limit = 0;
  if (limit == 0) {
    const int64_t cap = 32LL << 20, assumed = 16LL << 20;
    int64_t cache = assumed;
#ifdef _SC_LEVEL3_CACHE_SIZE
    cache = sysconf(_SC_LEVEL3_CACHE_SIZE) > 0 ? sysconf(_SC_LEVEL3_CACHE_SIZE) : assumed;
#endif
    limit = cache < cap ? cache : cap;
  }
  return 4 * bytes > limit;
}

typedef struct fm_run {
  fm_job job;
  fm_kernel *kernel;
} fm_run;

static void run_range(int64_t begin, int64_t end, void *context) {
  const fm_run *run = context;
  run->kernel(&run->job, begin, end);
}

static void run(fm_kernel *kernel, const fm_list *list, const fm_options *options, const fm_scalars *scalars,
                fm_parallel_for parallel_for) {
  int64_t elements = 0, bytes = 0;
  for (int64_t r = 0; r < list->count; r++) {
    const fm_row *row = &list->rows[r];
    elements += row->numel;
    bytes += row->numel * (row->fp64 ? 8 : (int64_t)fm_dtype_size(row->operand[FM_PARAM].dtype));
  }
  const int64_t chunks = list->first_chunk[list->count];
  fm_run r = {{list, options, scalars, exceeds_cache(bytes)}, kernel};
  if (elements <= FM_GRAIN * FM_CHUNK) { /* hundreds of biases are many chunks and little work: no thread is woken */
    run_range(0, chunks, &r);
  } else {
    parallel_for(0, chunks, FM_GRAIN, run_range, &r);
  }
}

/* ---- reductions ---- */

/* Neighbours are paired until one is left, an odd last one moving up unpaired: the tree depends on n alone, and the
 * error grows with log n. */
static fm_sum fold_partials(fm_sum *partials, int64_t n, int term) {
  for (; n > 1; n = (n + 1) / 2) {
    for (int64_t i = 0; i < n / 2; i++) {
      partials[i] = fm_fold(partials[2 * i], partials[2 * i + 1], term);
    }
    if (n % 2 == 1) {
      partials[n / 2] = partials[n - 1];
    }
  }
  const fm_sum none = {0.0, 0.0, 0.0, 0.0};
  return n ? partials[0] : none;
}

static fm_sum fold_row(const fm_list *list, int64_t r, int term) {
  const int64_t first = list->first_chunk[r];
  return fold_partials(list->partials + first, list->first_chunk[r + 1] - first, term);
}

static fm_sum reduce(int term, const fm_list *list, const fm_options *options, fm_parallel_for parallel_for) {
  run(fm_active_kernels->reduce[term], list, options, NULL, parallel_for);
  return fold_partials(list->partials, list->first_chunk[list->count], term);
}

double fm_norm(const fm_list *list, const fm_options *options, fm_parallel_for parallel_for) {
  if (options->q == 2.0) {
    return fm_sum_root(reduce(FM_TERM_SQUARE, list, options, parallel_for));
  }
  if (options->q == 1.0 && !fm_any_fp64(list)) {
    return reduce(FM_TERM_MAGNITUDE, list, options, parallel_for).mid;
  }
  const double m = reduce(FM_TERM_LARGEST, list, options, parallel_for).mid;
  if (fm_norm_is_largest(m, options->q)) {
    return m;
  }
  /* |x|^q would under- or overflow (p = 1.02 means q = 51), (|x| / m)^q does not */
  fm_options scaled = *options;
  scaled.norm = m;
  const fm_sum powers = reduce(FM_TERM_POWER, list, &scaled, parallel_for);
  return fm_norm_from_powers(m, powers.mid, options->q);
}

double fm_ties(const fm_list *list, const fm_options *options, fm_parallel_for parallel_for) {
  return reduce(FM_TERM_TIES, list, options, parallel_for).mid;
}

void fm_dot(const fm_list *list, const fm_options *options, double *result, fm_parallel_for parallel_for) {
  const int64_t chunks = list->first_chunk[list->count];
  const int count = fm_dot_sums(options->lists);
  assert(options->lists >= 2 && options->lists <= FM_DOT_LISTS);
  run(fm_active_kernels->dot, list, options, NULL, parallel_for);
  for (int plane = 0; plane < fm_dot_planes(options->lists); plane++) {
    const fm_sum sum = fold_partials(list->partials + plane * chunks, chunks, FM_TERM_DOT);
    const double four[FM_DOT_PLANE] = {sum.mid, sum.big, sum.small, sum.rest};
    for (int j = 0; j < FM_DOT_PLANE && plane * FM_DOT_PLANE + j < count; j++) {
      result[plane * FM_DOT_PLANE + j] = four[j];
    }
  }
}

void fm_pacgen(const fm_list *list, const fm_options *options, double *result, fm_parallel_for parallel_for) {
  run(fm_active_kernels->reduce[FM_TERM_PACGEN], list, options, NULL, parallel_for);
  for (int64_t r = 0; r < list->count; r++) {
    const fm_sum sum = fold_row(list, r, FM_TERM_PACGEN);
    result[2 * r] = fm_pacgen_of(sum);
    result[2 * r + 1] = sum.rest;
  }
}

void fm_row_norms(const fm_list *list, const fm_options *options, double *result, fm_parallel_for parallel_for) {
  run(fm_active_kernels->reduce[FM_TERM_SQUARE], list, options, NULL, parallel_for);
  for (int64_t r = 0; r < list->count; r++) {
    result[r] = fm_sum_root(fold_row(list, r, FM_TERM_SQUARE));
  }
}

/* ---- updates ---- */

fm_sum fm_run_update(fm_update update, const fm_list *list, const fm_options *options, const fm_scalars *scalars,
                     fm_parallel_for parallel_for) {
  const int tally = fm_shape_of(update).tally;
  const fm_sum none = {0.0, 0.0, 0.0, 0.0};
  assert(update < FM_UPDATE_COUNT);
  run(fm_active_kernels->update[update], list, options, scalars, parallel_for);
  return tally < 0 ? none : fold_partials(list->partials, list->first_chunk[list->count], tally);
}
