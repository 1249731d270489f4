/* Label noise over torch's threads: chooses the kernels of this processor and gathers what they found. */
#include "fm_label_ops.h"

#include <stdatomic.h>

extern const fm_label_kernels fm_kernels_base_labels;
#ifdef FM_X86
extern const fm_label_kernels fm_kernels_v3_labels, fm_kernels_v4_labels;
#endif

enum { FM_SAMPLE_GRAIN = FM_GRAIN * FM_CHUNK };

static const fm_label_kernels *active(void) {
#ifdef FM_X86
  if (fm_active_kernels->isa == 4) {
    return &fm_kernels_v4_labels;
  }
  if (fm_active_kernels->isa == 3) {
    return &fm_kernels_v3_labels;
  }
#endif
  return &fm_kernels_base_labels;
}

typedef struct fm_label_run {
  const fm_label_job *job;
  const fm_label_kernels *kernels;
  atomic_bool out_of_range;
} fm_label_run;

static void check_labels(int64_t begin, int64_t end, void *context) {
  fm_label_run *run = context;
  if (run->kernels->out_of_range(run->job, begin, end)) {
    atomic_store_explicit(&run->out_of_range, true, memory_order_relaxed);
  }
}

static void run_labels(int64_t begin, int64_t end, void *context) {
  const fm_label_run *run = context;
  run->kernels->labels(run->job, begin, end);
}

int64_t fm_corrupt_labels(const fm_label_job *job, fm_parallel_for parallel_for) {
  fm_label_run run = {.job = job, .kernels = active()};
  atomic_init(&run.out_of_range, false);
  parallel_for(0, job->samples.numel, FM_SAMPLE_GRAIN, check_labels, &run);
  if (atomic_load(&run.out_of_range)) {
    int64_t first = 0;
    while (fm_label_in_range(&job->noise, job->labels[first]) || job->labels[first] == job->noise.ignored) {
      first++;
    }
    return first;
  }
  parallel_for(0, job->samples.numel, FM_SAMPLE_GRAIN, run_labels, &run);
  return -1;
}

typedef struct fm_draw_run {
  const fm_draw_job *job;
  const fm_label_kernels *kernels;
} fm_draw_run;

static void run_draws(int64_t begin, int64_t end, void *context) {
  const fm_draw_run *run = context;
  run->kernels->draws(run->job, begin, end);
}

void fm_draw_samples(const fm_draw_job *job, fm_parallel_for parallel_for) {
  fm_draw_run run = {job, active()};
  parallel_for(0, job->samples.numel, FM_SAMPLE_GRAIN, run_draws, &run);
}
