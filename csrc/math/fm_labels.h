/* Label noise: what one random word makes of one class label, for C17 and CUDA alike; fm_math.h says what is allowed
 * here.
 *
 * All is integer arithmetic on one uniform word of 32 bits, so a label's fate is the same bits everywhere.
 * Probabilities are numbers of words out of 2^32. Two forms serve every kind of noise:
 *
 *   moved   words below `threshold` move label y to (y + offset + r) mod C, where r is uniform on [0, span): offset 1
 *           and span C - 1 draw one of the other classes, offset 0 and span C any class, offset 1 and span 1 the next.
 *           The move has its probability to 2^-32, each r its own to 2^-30.
 *   table   row y of `bounds` and `targets` has `entries` each: the label becomes the target of the first whose
 *           bound the word is below. Bounds ascend, and the last is 2^32. */
#ifndef FM_LABELS_H
#define FM_LABELS_H

#include "fm_random.h"

typedef struct fm_label_noise {
  int64_t classes, ignored; /* labels outside of [0, classes) stay; other than `ignored` they are errors */
  uint64_t threshold;       /* at most 2^32 */
  uint32_t span, offset;
  uint32_t stretch, factor; /* of words below the threshold to all 32 bits; fm_label_noise_plan */
  int64_t entries;          /* 0: the first form */
  const int64_t *bounds, *targets;
} fm_label_noise;

/* Below the threshold a word becomes w = word 2^stretch, where threshold 2^stretch is in [2^31, 2^32), and then
 * w factor / 2^31, factor = 2^63 / (threshold 2^stretch): uniform on [0, 2^32) again. Products of 32 bits alone, which
 * every vector instruction set has. */
FM_HD void fm_label_noise_plan(fm_label_noise *n) {
  uint64_t least = n->threshold > 0 ? n->threshold : 1;
  n->stretch = 0;
  while (least < UINT64_C(1) << 31) {
    least *= 2;
    n->stretch++;
  }
  const uint64_t factor = (UINT64_C(1) << 63) / least;
  n->factor = factor <= UINT32_MAX ? (uint32_t)factor : UINT32_MAX;
}

/* For a label in [0, classes). */
FM_HD int64_t fm_label_moved(const fm_label_noise *n, int64_t label, uint32_t word) {
  const uint32_t even = (uint32_t)((uint64_t)(word << n->stretch) * n->factor >> 31);
  const uint32_t r = (uint32_t)((uint64_t)even * n->span >> 32);
  const int64_t to = label + (int64_t)n->offset + (int64_t)r;
  const int64_t wrapped = to >= n->classes ? to - n->classes : to;
  return word < n->threshold ? wrapped : label;
}

FM_HD int64_t fm_label_from_table(const fm_label_noise *n, int64_t label, uint32_t word) {
  const int64_t *bounds = n->bounds + label * n->entries;
  int64_t first = 0, count = n->entries - 1; /* the last entry needs no comparison */
  while (count > 0) {
    const int64_t half = (count + 1) / 2;
    const bool above = (int64_t)word >= bounds[first + half - 1];
    first = above ? first + half : first;
    count = above ? count - half : half - 1;
  }
  return n->targets[label * n->entries + first];
}

FM_HD bool fm_label_in_range(const fm_label_noise *n, int64_t label) { return (uint64_t)label < (uint64_t)n->classes; }

#endif
