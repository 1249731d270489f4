/* The core's interface for what is drawn by samples: label noise, and noise for soft labels and regression targets. */
#ifndef FM_LABEL_OPS_H
#define FM_LABEL_OPS_H

#include "fm_labels.h"
#include "fm_ops.h"

/* Which random numbers the elements own. `inner` elements belong to each sample (the pixels of a mask, the classes of a
 * soft label); element k of sample s has number s * inner + k. A sample's number is its entry in `index` or, where that
 * is NULL, its position. */
typedef struct fm_samples {
  const uint64_t *key; /* seed and step, where the kernel runs */
  const int64_t *index;
  int64_t inner, numel; /* elements of all samples */
} fm_samples;

enum { FM_SAMPLE_BITS = 50 }; /* numbers of elements: four in each of 2^48 quads */

typedef struct fm_label_job {
  fm_samples samples;
  fm_label_noise noise;
  const int64_t *labels;
  int64_t *out;
} fm_label_job;

/* Draws of a law of size 1. */
typedef struct fm_draw_job {
  fm_samples samples;
  int law; /* not FM_LAW_TRUNCATED */
  float *out;
} fm_draw_job;

/* What one thread runs: elements [begin, end). The first returns whether a label is neither in range nor ignored. */
typedef bool fm_range_check_fn(const fm_label_job *job, int64_t begin, int64_t end);
typedef void fm_label_fn(const fm_label_job *job, int64_t begin, int64_t end);
typedef void fm_draw_fn(const fm_draw_job *job, int64_t begin, int64_t end);

/* One table for each instruction set, compiled from csrc/cpu/labels.c. */
typedef struct fm_label_kernels {
  fm_range_check_fn *out_of_range;
  fm_label_fn *labels;
  fm_draw_fn *draws;
} fm_label_kernels;

/* The position of the first label out of range, with nothing written, or -1 and `out` is filled. */
int64_t fm_corrupt_labels(const fm_label_job *job, fm_parallel_for parallel_for);

void fm_draw_samples(const fm_draw_job *job, fm_parallel_for parallel_for);

#endif
