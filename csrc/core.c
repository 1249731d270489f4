/* The operators on plain views: plans a list, runs a kernel over its chunks, folds partial results. */
#include "fm_ops.h"

#include <unistd.h>

int64_t fm_list_plan(fm_list *list) {
  int64_t chunks = 0;
  for (int64_t r = 0; r < list->count; r++) {
    list->first_chunk[r] = chunks;
    chunks += (list->rows[r].operand[0].numel + FM_CHUNK - 1) / FM_CHUNK;
  }
  list->first_chunk[list->count] = chunks;
  return chunks;
}

/* A store past the caches saves reading the line that it overwrites, but the next pass must fetch what it wrote from
 * memory. It pays once the four arrays of a step (weights, gradients, backup, momentum) exceed the last-level cache. A
 * virtual machine is told the whole socket's cache while its neighbours use it too: on such a one with 480 MiB on
 * paper, 67 MB of arrays ran 1.2 times slower with streaming stores and 268 MB ran 1.25 times faster; hence the cap. */
static bool exceeds_cache(int64_t bytes) {
  static int64_t limit = 0;
  if (limit == 0) {
    const int64_t cap = 128LL << 20, assumed = 32LL << 20;
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

static void run(fm_kernel *kernel, const fm_list *list, const fm_options *options, fm_parallel_for parallel_for) {
  int64_t elements = 0, bytes = 0;
  for (int64_t r = 0; r < list->count; r++) {
    const fm_view *first = &list->rows[r].operand[0];
    elements += first->numel;
    bytes += first->numel * (int64_t)fm_dtype_size(first->dtype);
  }
  const int64_t chunks = list->first_chunk[list->count];
  fm_run r = {{list, options, exceeds_cache(bytes)}, kernel};
  if (elements <= FM_GRAIN * FM_CHUNK) { /* hundreds of biases are many chunks and little work: no thread is woken */
    run_range(0, chunks, &r);
  } else {
    parallel_for(0, chunks, FM_GRAIN, run_range, &r);
  }
}

/* ---- reductions ---- */

/* Neighbours are paired until one is left, an odd last one moving up unpaired: the tree depends on n alone, and the
 * error grows with log n. The three components of a partial fold side by side. */
static fm_sum fold_partials(double *partials, int64_t n) {
  for (; n > 1; n = (n + 1) / 2) {
    for (int64_t i = 0; i < n / 2; i++) {
      for (int k = 0; k < 3; k++) {
        partials[3 * i + k] = partials[6 * i + k] + partials[6 * i + 3 + k];
      }
    }
    if (n % 2 == 1) {
      for (int k = 0; k < 3; k++) {
        partials[3 * (n / 2) + k] = partials[3 * (n - 1) + k];
      }
    }
  }
  fm_sum total = {n ? partials[0] : 0.0, n ? partials[1] : 0.0, n ? partials[2] : 0.0};
  return total;
}

static fm_sum reduce(fm_kernel *kernel, const fm_list *list, const fm_options *options, fm_parallel_for parallel_for) {
  run(kernel, list, options, parallel_for);
  return fold_partials(list->partials, list->first_chunk[list->count]);
}

/* The largest |T g|; NaN if any is NaN. A maximum needs no tree: it rounds nothing. */
static double largest(const fm_list *list, const fm_options *options, fm_parallel_for parallel_for) {
  run(fm_active_kernels->largest, list, options, parallel_for);
  double m = 0.0;
  for (int64_t i = 0; i < list->first_chunk[list->count]; i++) {
    double x = list->partials[3 * i];
    m = x > m || x != x ? x : m;
  }
  return m;
}

double fm_norm(const fm_list *list, const fm_options *options, fm_parallel_for parallel_for) {
  if (options->q == 2.0) {
    return fm_sum_root(reduce(fm_active_kernels->square_sum, list, options, parallel_for));
  }
  double m = largest(list, options, parallel_for);
  if (isinf(options->q) || !(m > 0.0) || !isfinite(m)) {
    return m;
  }
  /* |x|^q would under- or overflow (p = 1.02 means q = 51), (|x| / m)^q does not: Foret et al.'s Eq. 2, max-scaled */
  fm_options scaled = *options;
  scaled.norm = m;
  double sum = reduce(fm_active_kernels->power_sum, list, &scaled, parallel_for).mid;
  return m * (options->q == 1.0 ? sum : fm_pow(sum, 1.0 / options->q));
}

double fm_ties(const fm_list *list, const fm_options *options, fm_parallel_for parallel_for) {
  return reduce(fm_active_kernels->ties, list, options, parallel_for).mid;
}

/* ---- element-wise operators ---- */

void fm_sam_ascend(const fm_list *list, const fm_options *options, fm_parallel_for parallel_for) {
  run(fm_active_kernels->ascend, list, options, parallel_for);
}

void fm_restore(const fm_list *list, const fm_options *options, fm_parallel_for parallel_for) {
  run(fm_active_kernels->restore, list, options, parallel_for);
}

void fm_restore_sgd(const fm_list *list, const fm_options *options, fm_parallel_for parallel_for) {
  run(fm_active_kernels->restore_sgd, list, options, parallel_for);
}

void fm_restore_adam(const fm_list *list, const fm_options *options, fm_parallel_for parallel_for) {
  run(fm_active_kernels->restore_adam, list, options, parallel_for);
}
