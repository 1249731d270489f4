/* The loops of label noise. Compiled once per instruction set, as kernels.c is: the same bits from each.
 *
 * Elements whose numbers follow on one another share the words of quads; elements with numbers of their own have a quad
 * each, of which they use one word. */
#include "fm_label_ops.h"

#include "philox_simd.h"

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static fm_stream stream_of(const fm_samples *s) {
  fm_stream stream;
  const fm_options o = {.seed = s->key[0], .step = s->key[1]};
  open_stream(&stream, &o, 0);
  return stream;
}

/* ---- elements [at, at + count) and where their words come from ---- */

/* At most FM_BLOCK elements: the words of a block from `number` on, whose first `lead` are not theirs, or (`alone`) one
 * word each of quads of their own. */
typedef struct fm_part {
  int count, lead;
  bool alone;
  uint64_t number;
} fm_part;

enum { FM_QUADS_OF_BLOCK = FM_BLOCK / 4, FM_FEW = FM_QUADS_OF_BLOCK };

/* The part that element `at` begins, up to `end`. Where a sample has few elements, they do not share a block. */
static fm_part part_from(const fm_samples *s, int64_t at, int64_t end) {
  fm_part part = {.alone = s->index != NULL && s->inner < FM_FEW};
  if (part.alone) {
    part.count = (int)min64(end - at, FM_QUADS_OF_BLOCK);
    return part;
  }
  part.number = (uint64_t)at;
  if (s->index != NULL) {
    const int64_t sample = at / s->inner, within = at - sample * s->inner;
    end = min64(end, at + s->inner - within);
    part.number = (uint64_t)s->index[sample] * (uint64_t)s->inner + (uint64_t)within;
  }
  part.lead = (int)(part.number % 4);
  part.number -= (uint64_t)part.lead;
  part.count = (int)min64(end - at, FM_BLOCK - part.lead);
  return part;
}

/* Numbers of elements without a common block; at most FM_QUADS_OF_BLOCK of them. */
static void numbers_of(const fm_samples *s, int64_t at, int count, uint64_t *numbers) {
  int64_t sample = at / s->inner, within = at - sample * s->inner;
  for (int i = 0; i < count; i++) {
    numbers[i] = (uint64_t)s->index[sample] * (uint64_t)s->inner + (uint64_t)within;
    within++;
    if (within == s->inner) {
      within = 0;
      sample++;
    }
  }
}

/* The words of FM_QUADS_OF_BLOCK quads, in the order of `quads`. */
static void random_quads(const fm_stream *stream, const uint64_t *quads, uint32_t *words) {
#ifdef __SSE2__
  uint64_t places[WIDTH], ordered[FM_QUADS_OF_BLOCK];
  FM_STORE(places, FM_QUADS);
  for (int q = 0; q < FM_QUADS_OF_BLOCK; q++) {
    ordered[q] = quads[q / WIDTH * WIDTH + (int)places[q % WIDTH]];
  }
  for (int q = 0; q < FM_QUADS_OF_BLOCK; q += TOGETHER) {
    fm_vector of[ABREAST];
    memcpy(of, ordered + q, sizeof of);
    random_vectors(stream, of, words + 4 * q);
  }
#else
  for (int q = 0; q < FM_QUADS_OF_BLOCK; q++) {
    const fm_quad four = fm_random_quad(stream->seed, stream->step, stream->tensor, quads[q]);
    memcpy(words + 4 * q, four.word, sizeof four.word);
  }
#endif
}

/* The numbers of elements alone, and the words of their quads. */
static void words_alone(const fm_samples *s, const fm_stream *stream, int64_t at, int count, uint32_t *four,
                        uint64_t *numbers) {
  uint64_t quads[FM_QUADS_OF_BLOCK] = {0};
  numbers_of(s, at, count, numbers);
  for (int i = 0; i < count; i++) {
    quads[i] = numbers[i] / 4;
  }
  random_quads(stream, quads, four);
}

/* ---- labels ---- */

/* A number as wide as a label tells whether any is out of range, or the loop would not be vectorised. */
static bool out_of_range(const fm_label_job *job, int64_t begin, int64_t end) {
  const fm_label_noise own = job->noise;
  int64_t wrong = 0;
  for (int64_t i = begin; i < end; i++) {
    const int64_t label = job->labels[i];
    wrong |= (fm_label_in_range(&own, label) ? 0 : 1) & (label != own.ignored ? 1 : 0);
  }
  return wrong != 0;
}

/* Labels that are ignored stay. */
FM_INLINE void move_block(const fm_label_noise *noise, const int64_t *restrict labels, const uint32_t *restrict words,
                          int64_t *restrict out, int n) {
  const fm_label_noise own = *noise;
  for (int i = 0; i < n; i++) {
    const int64_t label = labels[i], moved = fm_label_moved(&own, label, words[i]);
    out[i] = fm_label_in_range(&own, label) ? moved : label;
  }
}

static void look_up_block(const fm_label_noise *noise, const int64_t *labels, const uint32_t *words, int64_t *out,
                          int n) {
  for (int i = 0; i < n; i++) {
    const bool within = fm_label_in_range(noise, labels[i]);
    out[i] = within ? fm_label_from_table(noise, labels[i], words[i]) : labels[i];
  }
}

static void corrupt(const fm_label_job *job, int64_t begin, int64_t end) {
  const fm_stream stream = stream_of(&job->samples);
  for (int64_t at = begin; at < end;) {
    uint32_t words[FM_BLOCK];
    const fm_part part = part_from(&job->samples, at, end);
    if (part.alone) {
      uint32_t four[FM_BLOCK];
      uint64_t numbers[FM_QUADS_OF_BLOCK];
      words_alone(&job->samples, &stream, at, part.count, four, numbers);
      for (int i = 0; i < part.count; i++) {
        words[i] = four[4 * i + (int)(numbers[i] % 4)];
      }
    } else {
      random_block(&stream, (int64_t)part.number, words);
    }
    (job->noise.entries > 0 ? look_up_block : move_block)(&job->noise, job->labels + at, words + part.lead,
                                                          job->out + at, part.count);
    at += part.count;
  }
}

/* ---- draws ---- */

static void draw(const fm_draw_job *job, int64_t begin, int64_t end) {
  const fm_stream stream = stream_of(&job->samples);
  for (int64_t at = begin; at < end;) {
    const fm_part part = part_from(&job->samples, at, end);
    if (part.alone) {
      uint32_t four[FM_BLOCK];
      uint64_t numbers[FM_QUADS_OF_BLOCK];
      words_alone(&job->samples, &stream, at, part.count, four, numbers);
      for (int i = 0; i < part.count; i++) {
        fm_quad words;
        memcpy(words.word, four + 4 * i, sizeof words.word);
        job->out[at + i] = fm_draw_quad(words, job->law).value[numbers[i] % 4];
      }
    } else {
      float draws[FM_BLOCK];
      draw_block(&stream, job->law, (int64_t)part.number, draws);
      memcpy(job->out + at, draws + part.lead, (size_t)part.count * sizeof *draws);
    }
    at += part.count;
  }
}

/* fm_kernels_base_labels beside fm_kernels_base */
#define FM_JOIN(a, b) a##b
#define FM_LABELS_NAME(kernels) FM_JOIN(kernels, _labels)

const fm_label_kernels FM_LABELS_NAME(FM_KERNELS_NAME) = {
    .out_of_range = out_of_range, .labels = corrupt, .draws = draw};
