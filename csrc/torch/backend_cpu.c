/* The CPU backend: the core's operators on torch's threads. */
#include "backend.h"
#include "threads.h"

#include <stdatomic.h>
#include <unistd.h>

/* Torch's own threads, so their number and pool are those that the user set. */
static void on_torch_threads(int64_t begin, int64_t end, int64_t grain, fm_range_fn fn, void *context) {
  torch_parallel_for(begin, end, grain, fn, context);
}

/* Whether this process was forked from one that has run kernels. It has one thread, and GNU's OpenMP, on which torch
 * runs, would wait for the others of its parent for ever. */
static bool is_forked(void) {
  static _Atomic int64_t first_user = 0;
  const int64_t own = getpid();
  int64_t known = 0;
  return !atomic_compare_exchange_strong(&first_user, &known, own) && known != own;
}

/* The core's parallel_for. */
static void torch_threads(int64_t begin, int64_t end, int64_t grain, fm_range_fn fn, void *context) {
  uint32_t threads = 1;
  if (is_forked()) {
    if (begin < end) {
      fn(begin, end, context);
    }
    return;
  }
  torch_get_num_threads(&threads);
  fm_steal_work(on_torch_threads, threads, begin, end, grain, fn, context);
}

static bool run(fm_args *args, fm_operator op, fm_update update, const fm_list *list, const fm_options *options,
                const fm_scalars *scalars, double *result) {
  fm_options o = *options;
  fm_read_scalars(&o, scalars);
  for (int64_t r = 0; r < (scalars->each ? list->count : 1); r++) {
    fm_read_own_scalars(&o, scalars, r);
    if (o.rho < 0.0) {
      return fm_fail(args, "rho: %g given, but a radius must not be negative", o.rho);
    }
    if (o.scale < 0.0 && o.sizing == FM_SIZE_CURVATURE) {
      return fm_fail(args, "scale: %g given, but it must not be negative where curvatures size the noise", o.scale);
    }
    if (scalars->each && scalars->scale != NULL && !(o.gamma >= 0.0 && o.eps >= 0.0)) {
      return fm_fail(args, "scale: (gamma, eps) = (%g, %g) given, but they must not be negative", o.gamma, o.eps);
    }
  }
  if (o.lipschitz < 0.0) {
    return fm_fail(args, "lipschitz_constant: %g given, but it must not be negative", o.lipschitz);
  }
  fm_sum sum = {0.0, 0.0, 0.0, 0.0};
  switch (op) {
    case FM_OP_NORM: *result = fm_norm(list, &o, torch_threads); break;
    case FM_OP_TIES: *result = fm_ties(list, &o, torch_threads); break;
    case FM_OP_DOT: fm_dot(list, &o, result, torch_threads); break;
    case FM_OP_PACGEN: fm_pacgen(list, &o, result, torch_threads); break;
    case FM_OP_ROW_NORMS: fm_row_norms(list, &o, result, torch_threads); break;
    case FM_OP_UPDATE: sum = fm_run_update(update, list, &o, scalars, torch_threads); break;
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
    .best_isa = fm_best_isa,
    .run = run,
    .corrupt_labels = corrupt_labels,
    .draw_samples = draw_samples,
};
