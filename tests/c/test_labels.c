/* fm_labels.h, and the kernels of every instruction set against it, element by element. */
#include "check.h"
#include "fm_label_ops.h"
#include "tests.h"

#include <assert.h>
#include <stdlib.h>

/* ---- shares of the words ---- */

/* The first word that moves label 0 by `least` or more; the moves ascend with the word. */
static uint64_t first_word(const fm_label_noise *n, int64_t least) {
  uint64_t low = 0, high = n->threshold;
  while (low < high) {
    const uint64_t middle = low + (high - low) / 2;
    if (fm_label_moved(n, 0, (uint32_t)middle) >= least) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

/* Every class has its share of the words, to four of 2^32. */
void test_label_shares(void) {
  const uint64_t thresholds[] = {1ull << 32, (1ull << 32) - 1, 1ull << 31, (1ull << 31) - 1,
                                 858993459,  1288490189,       5000,       7};
  const uint32_t spans[] = {1, 2, 9, 10, 999, 1000, 1u << 20, INT32_MAX - 1};
  for (size_t t = 0; t < sizeof thresholds / sizeof *thresholds; t++) {
    for (size_t s = 0; s < sizeof spans / sizeof *spans; s++) {
      fm_label_noise n = {.classes = INT32_MAX, .threshold = thresholds[t], .span = spans[s], .offset = 0};
      fm_label_noise_plan(&n);
      const uint32_t step = spans[s] < 1000 ? 1 : spans[s] / 997;
      for (uint32_t r = 0; r < spans[s] - step + 1; r += step) {
        const double share = (double)thresholds[t] * (double)step / (double)spans[s];
        const double found = (double)first_word(&n, (int64_t)r + step) - (double)first_word(&n, r);
        CHECK(fabs(found - share) <= 4.0, "threshold %llu, span %u: %u to %u have %.0f words, not %.2f",
              (unsigned long long)thresholds[t], spans[s], r, r + step, found, share);
      }
      const int64_t most = fm_label_moved(&n, 0, (uint32_t)(thresholds[t] - 1));
      CHECK(most < spans[s], "threshold %llu, span %u: moved by %lld", (unsigned long long)thresholds[t], spans[s],
            (long long)most);
    }
  }
}

/* ---- kernels ---- */

enum { SAMPLES = 29, CLASSES = 11, ENTRIES = 3 };

static uint64_t number_of(const fm_samples *s, int64_t at) {
  return s->index == NULL ? (uint64_t)at
                          : (uint64_t)s->index[at / s->inner] * (uint64_t)s->inner + (uint64_t)(at % s->inner);
}

static fm_quad quad_of(const fm_samples *s, uint64_t number) {
  return fm_random_quad(s->key[0], s->key[1], 0, number / 4);
}

static int64_t stated(const fm_label_job *job, int64_t at) {
  const int64_t y = job->labels[at];
  const uint64_t number = number_of(&job->samples, at);
  const uint32_t word = quad_of(&job->samples, number).word[number % 4];
  if (y < 0 || y >= CLASSES) {
    return y;
  }
  return job->noise.entries > 0 ? fm_label_from_table(&job->noise, y, word) : fm_label_moved(&job->noise, y, word);
}

static int64_t *more_integers(int64_t count) { return malloc((size_t)count * sizeof(int64_t)); }

static void check_labels(const fm_samples *samples, const fm_label_noise *noise) {
  const int64_t numel = samples->numel;
  const size_t bytes = (size_t)numel * sizeof(int64_t);
  int64_t *labels = more_integers(numel), *out = more_integers(numel), *want = more_integers(numel);
  for (int64_t i = 0; i < numel; i++) {
    labels[i] = i % 17 == 3 ? -100 : i % CLASSES;
  }
  fm_label_job job = {.samples = *samples, .noise = *noise, .labels = labels, .out = out};
  job.noise.ignored = -100;
  for (int64_t i = 0; i < numel; i++) {
    want[i] = stated(&job, i);
  }
  for (int s = 0; s < SPLITS; s++) {
    memset(out, 0x55, bytes);
    CHECK(fm_corrupt_labels(&job, splits[s]) == -1, "no label is out of range");
    CHECK(memcmp(out, want, bytes) == 0, "table %d, split %d, inner %lld, %s: labels", fm_active_kernels->isa, s,
          (long long)samples->inner, samples->index != NULL ? "index" : "positions");
  }
  assert(numel > 0);
  labels[numel - 1] = CLASSES;
  labels[numel / 2] = -1;
  CHECK(fm_corrupt_labels(&job, splits[0]) == numel / 2, "the first label out of range");
  free(labels);
  free(out);
  free(want);
}

static void check_draws(const fm_samples *samples, int law) {
  const size_t bytes = (size_t)samples->numel * sizeof(float);
  float *out = malloc(bytes), *want = malloc(bytes);
  for (int64_t i = 0; i < samples->numel; i++) {
    const uint64_t number = number_of(samples, i);
    want[i] = fm_draw_quad(quad_of(samples, number), law).value[number % 4];
  }
  const fm_draw_job job = {.samples = *samples, .law = law, .out = out};
  for (int s = 0; s < SPLITS; s++) {
    memset(out, 0x55, bytes);
    fm_draw_samples(&job, splits[s]);
    CHECK(memcmp(out, want, bytes) == 0, "table %d, split %d, inner %lld, law %d: draws", fm_active_kernels->isa, s,
          (long long)samples->inner, law);
  }
  free(out);
  free(want);
}

void test_label_kernels(void) {
  static const int64_t row_bounds[ENTRIES] = {1ll << 31, (1ll << 31) + 5, 1ll << 32};
  int64_t bounds[CLASSES * ENTRIES], targets[CLASSES * ENTRIES];
  for (int i = 0; i < CLASSES * ENTRIES; i++) {
    bounds[i] = row_bounds[i % ENTRIES];
    targets[i] = (i / ENTRIES + i % ENTRIES) % CLASSES;
  }
  fm_label_noise noises[3] = {{.classes = CLASSES, .threshold = 1ull << 32, .span = CLASSES - 1, .offset = 1},
                              {.classes = CLASSES, .threshold = 3000000000u, .span = CLASSES, .offset = 0},
                              {.classes = CLASSES, .entries = ENTRIES, .bounds = bounds, .targets = targets}};
  const uint64_t key[2] = {0x299f31d0a4093822u, 0xfffeull << 32 | 3};
  const int64_t inners[] = {1, 3, 31, 32, 33, 130}; /* elements of a sample: around where they get a block */
  int64_t index[SAMPLES];
  const fm_kernels *tables[MOST_TABLES];
  const int count = kernel_tables(tables);
  for (int t = 0; t < count; t++) {
    fm_active_kernels = tables[t];
    for (size_t k = 0; k < sizeof inners / sizeof *inners; k++) {
      for (int64_t i = 0; i < SAMPLES; i++) { /* near, equal and the largest */
        index[i] = i % 5 == 4 ? ((1ll << FM_SAMPLE_BITS) - 1) / inners[k] - i : i / 2 * 7;
      }
      for (int indexed = 0; indexed < 2; indexed++) {
        const fm_samples samples = {key, indexed ? index : NULL, inners[k], SAMPLES * inners[k]};
        for (int n = 0; n < 3; n++) {
          fm_label_noise_plan(&noises[n]);
          check_labels(&samples, &noises[n]);
        }
        check_draws(&samples, FM_LAW_UNIFORM);
        check_draws(&samples, FM_LAW_NORMAL);
        check_draws(&samples, FM_LAW_RADEMACHER);
      }
    }
  }
  fm_active_kernels = tables[count - 1];
}
