#include "lists.h"

#include <stdlib.h>

double uniform(uint64_t index, uint32_t stream) {
  return (double)fm_random_quad(20260101, index, stream, 0).word[0] * 0x1p-32 * 2.0 - 1.0;
}

/* ---- elements ---- */

static char *element(const fm_view *v, int64_t i) {
  int64_t offset = v->layout == NULL ? i : 0;
  for (int d = v->layout == NULL ? -1 : v->layout->dims - 1; d >= 0; d--) {
    offset += i % v->layout->size[d] * v->layout->stride[d];
    i /= v->layout->size[d];
  }
  return v->data + offset * (int64_t)fm_dtype_size(v->dtype);
}

void put(const fm_view *v, int64_t i, double x) {
  const float single = (float)x;
  const uint16_t half = v->dtype == FM_BF16 ? fm_f32_to_bf16(single) : fm_f32_to_f16(single);
  memcpy(element(v, i),
         v->dtype == FM_F64   ? (const void *)&x
         : v->dtype == FM_F32 ? (const void *)&single
                              : (const void *)&half,
         fm_dtype_size(v->dtype));
}

double get(const fm_view *v, int64_t i) {
  const char *from = element(v, i);
  double x = 0;
  float single = 0;
  uint16_t half = 0;
  switch (v->dtype) {
    case FM_F64: memcpy(&x, from, sizeof x); return x;
    case FM_F32: memcpy(&single, from, sizeof single); return (double)single;
    default: memcpy(&half, from, sizeof half);
  }
  return (double)(v->dtype == FM_BF16 ? fm_bf16_to_f32(half) : fm_f16_to_f32(half));
}

/* Bytes from the first to the last element of a view. */
static size_t span(const fm_view *v, int64_t numel) {
  int64_t last = numel - 1;
  for (int d = 0; numel > 0 && v->layout != NULL && d < v->layout->dims; d++) {
    last = (d == 0 ? 0 : last) + (v->layout->size[d] - 1) * v->layout->stride[d];
  }
  return (size_t)(last + 1) * fm_dtype_size(v->dtype);
}

/* ---- lists ---- */

/* Second moments, Lipschitz constants: what is not negative in use. */
static bool is_magnitude(int operand) {
  return operand == FM_SQUARE || operand == FM_LARGEST || operand == FM_LIPSCHITZ;
}

fm_list make_list_of(const int64_t *sizes, int64_t count, fm_dtype dtype, unsigned operands, unsigned exact) {
  fm_list list = {.rows = calloc((size_t)count + 1, sizeof *list.rows), .count = count};
  list.first_chunk = malloc((size_t)(count + 1) * sizeof *list.first_chunk);
  for (int64_t r = 0; r < count; r++) {
    fm_row *row = &list.rows[r];
    for (int k = 0; k < FM_MAX_OPERANDS; k++) {
      if (!(operands & FM_BIT(k))) {
        continue;
      }
      fm_view *v = &row->operand[k];
      *v = (fm_view){.dtype = (exact & FM_BIT(k)) || r % 2 == 0 ? dtype : FM_F32};
      v->data = malloc(span(v, sizes[r]) + 1);
      for (int64_t i = 0; i < sizes[r]; i++) {
        const double x = uniform((uint64_t)i, (uint32_t)(r * FM_MAX_OPERANDS + k));
        put(v, i, is_magnitude(k) ? fabs(x) : x);
      }
    }
    row->numel = sizes[r];
    row->fp64 = dtype == FM_F64;
    row->traits = (fm_traits){(int)(r % 4), 0.3, 0.7};
  }
  fm_list_plan(&list);
  list.partials = malloc((size_t)(list.first_chunk[count] + 1) * sizeof *list.partials);
  return list;
}

fm_list make_list(fm_dtype dtype, unsigned operands, unsigned exact) {
  static const int64_t sizes[] = {0, 1, 5, 127, 128, 129, 1023, 1024, 1025, 4095, 4096, 4097, 0, 13000};
  return make_list_of(sizes, sizeof sizes / sizeof *sizes, dtype, operands, exact);
}

static void *copy_of(const void *bytes, size_t count) { return memcpy(malloc(count + 1), bytes, count); }

fm_list copy_list(const fm_list *list) {
  fm_list copy = {.rows = copy_of(list->rows, (size_t)list->count * sizeof *list->rows), .count = list->count};
  copy.first_chunk = copy_of(list->first_chunk, (size_t)(list->count + 1) * sizeof *list->first_chunk);
  for (int64_t r = 0; r < list->count; r++) {
    for (int k = 0; k < FM_MAX_OPERANDS; k++) {
      fm_view *v = &copy.rows[r].operand[k];
      v->data = v->data != NULL ? copy_of(v->data, span(v, list->rows[r].numel)) : NULL;
    }
  }
  copy.partials = malloc((size_t)(list->first_chunk[list->count] + 1) * sizeof *copy.partials);
  return copy;
}

void free_list(fm_list *list) {
  for (int64_t r = 0; r < list->count; r++) {
    for (int k = 0; k < FM_MAX_OPERANDS; k++) {
      free(list->rows[r].operand[k].data);
    }
  }
  free(list->rows);
  free(list->first_chunk);
  free(list->partials);
}

void stride_row(fm_row *row, const fm_layout *layout, unsigned strided) {
  for (int k = 0; k < FM_MAX_OPERANDS; k++) {
    const fm_view from = row->operand[k];
    if (from.data == NULL || !(strided & FM_BIT(k))) {
      continue;
    }
    fm_view *v = &row->operand[k];
    v->layout = layout;
    const size_t bytes = span(v, row->numel);
    v->data = memset(malloc(bytes + 1), 0xa5, bytes);
    for (int64_t i = 0; i < row->numel; i++) {
      memcpy(element(v, i), element(&from, i), fm_dtype_size(v->dtype));
    }
    free(from.data);
  }
}

uint64_t hash_bytes(const void *bytes, size_t count, uint64_t hash) {
  const uint8_t *byte = bytes;
  for (size_t i = 0; i < count; i++) {
    hash = (hash ^ byte[i]) * 0x100000001b3u;
  }
  return hash;
}

uint64_t hash_list(const fm_list *list) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (int64_t r = 0; r < list->count; r++) {
    for (int k = 0; k < FM_MAX_OPERANDS; k++) {
      const fm_view *v = &list->rows[r].operand[k];
      hash = v->data != NULL ? hash_bytes(v->data, span(v, list->rows[r].numel), hash) : hash;
    }
  }
  return hash;
}

/* ---- updates ---- */

/* Of the weights' noise one half is capped; a few weights move by less than min_step. */
fm_options some_options(void) {
  return (fm_options){.q = 2,
                      .eta = 0.01,
                      .norm = 7.5,
                      .rho = 0.5,
                      .eps = 0.05,
                      .seed = 0x123456789abcdef0u,
                      .step = 3ull << 32 | 6,
                      .lr = 0.1,
                      .momentum = 0.9,
                      .dampening = 0.25,
                      .weight_decay = 0.01,
                      .beta1 = 0.9,
                      .beta2 = 0.99,
                      .adam_eps = 1e-8,
                      .nesterov = true,
                      .scale = 0.2,
                      .lipschitz = 0.7,
                      .curvature_scale = 1.7,
                      .gamma = 0.6,
                      .source_scale = 2.5,
                      .decay = 0.9,
                      .lipschitz_decay = 0.4,
                      .min_step = 0.03,
                      .correction_before = 1.7,
                      .correction_after = 1.3,
                      .coefficient = {0.7, -1.3, 0.4}};
}

#define SGD (FM_BIT(FM_PARAM) | FM_AT_OLD | FM_SGD_STATE)
#define ADAM (FM_BIT(FM_PARAM) | FM_AT_OLD | FM_ADAM_STATE)
#define LION (FM_BIT(FM_PARAM) | FM_AT_OLD | FM_LION_STATE)
#define BLEND (FM_BIT(FM_PARAM) | FM_BIT(FM_GRAD) | FM_BIT(FM_THIRD))
#define WITHOUT(operands, operand) ((operands) & ~FM_BIT(operand))

static int ascents(update_case *cases) {
  const unsigned operands = FM_BIT(FM_PARAM) | FM_AT_OLD;
  const double exponents[] = {2.0, 1.0, 1.5, INFINITY};
  int n = 0;
  for (int e = 0; e < 4; e++) {
    cases[n] = (update_case){"ascend", FM_ASCEND, operands, some_options()};
    cases[n++].options.q = exponents[e];
  }
  for (int e = 0; e < 4; e += 2) {
    cases[n] = (update_case){"ascend by chance", FM_ASCEND, operands, some_options()};
    cases[n].options.random = true;
    cases[n++].options.q = exponents[e];
  }
  cases[n] = (update_case){"ascend nowhere", FM_ASCEND, operands, some_options()};
  cases[n++].options.norm = INFINITY;
  return n;
}

static int steps(update_case *cases) {
  fm_options plain = some_options(), amsgrad = some_options();
  plain.maximize = plain.decoupled = plain.first_step = true;
  plain.nesterov = false;
  amsgrad.amsgrad = true;
  int n = 0;
  cases[n++] = (update_case){"restore", FM_RESTORE, EXACT, plain};
  cases[n++] = (update_case){"restore_sgd", FM_RESTORE_SGD, SGD, amsgrad};
  cases[n++] = (update_case){"restore_sgd first", FM_RESTORE_SGD, SGD, plain};
  cases[n++] = (update_case){"restore_sgd plain", FM_RESTORE_SGD, WITHOUT(SGD, FM_BUFFER), plain};
  cases[n++] = (update_case){"restore_adam amsgrad", FM_RESTORE_ADAM, ADAM, amsgrad};
  cases[n++] = (update_case){"restore_adam", FM_RESTORE_ADAM, WITHOUT(ADAM, FM_LARGEST), plain};
  cases[n++] = (update_case){"restore_lion", FM_RESTORE_LION, LION, amsgrad};
  cases[n++] = (update_case){"restore_lion maximize", FM_RESTORE_LION, LION, plain};
  cases[n++] = (update_case){"restore_lion_curvature", FM_RESTORE_LION_CURVATURE, LION | FM_AVERAGES, amsgrad};
  cases[n++] = (update_case){"restore_sgd_curvature", FM_RESTORE_SGD_CURVATURE, SGD | FM_AVERAGES, amsgrad};
  cases[n++] = (update_case){"restore_adam_curvature amsgrad", FM_RESTORE_ADAM_CURVATURE, ADAM | FM_AVERAGES, amsgrad};
  cases[n++] = (update_case){"restore_adam_curvature", FM_RESTORE_ADAM_CURVATURE,
                             WITHOUT(WITHOUT(ADAM | FM_AVERAGES, FM_LARGEST), FM_LIPSCHITZ), plain};
  plain.correction_before = 0.0;
  cases[n++] = (update_case){"restore_sgd_curvature first", FM_RESTORE_SGD_CURVATURE,
                             WITHOUT(SGD | FM_AVERAGES, FM_BUFFER), plain};
  return n;
}

/* A coefficient of 0 leaves its term out. */
static int combinations(update_case *cases) {
  const fm_options options = some_options();
  int n = 0;
  cases[n++] = (update_case){"save", FM_SAVE, EXACT, options};
  cases[n++] = (update_case){"axpy", FM_AXPY, WITHOUT(BLEND, FM_THIRD), options};
  cases[n++] = (update_case){"axpy with backup", FM_AXPY, EXACT | FM_BIT(FM_GRAD), options};
  cases[n++] = (update_case){"blend", FM_BLEND, BLEND, options};
  cases[n++] = (update_case){"blend of two", FM_BLEND, WITHOUT(BLEND, FM_THIRD), options};
  for (int k = 0; k < 3; k++) {
    cases[n] = (update_case){"blend without a term", FM_BLEND, BLEND, options};
    cases[n++].options.coefficient[k] = 0.0;
  }
  return n;
}

static int noises(update_case *cases) {
  const struct {
    const char *name;
    int sizing, law;
    unsigned sizes;
  } kinds[] = {{"noise", FM_SIZE_NEIGHBOURHOOD, FM_LAW_UNIFORM, 0},
               {"noise truncated", FM_SIZE_NEIGHBOURHOOD, FM_LAW_TRUNCATED, 0},
               {"noise by curvature", FM_SIZE_CURVATURE, FM_LAW_NORMAL, FM_AVERAGES},
               {"noise by curvature truncated", FM_SIZE_CURVATURE, FM_LAW_TRUNCATED, FM_BIT(FM_CURVATURE)},
               {"noise of given sizes", FM_SIZE_GIVEN, FM_LAW_RADEMACHER, FM_BIT(FM_CURVATURE)},
               {"noise of given sizes truncated", FM_SIZE_GIVEN, FM_LAW_TRUNCATED, FM_BIT(FM_CURVATURE)}};
  int n = 0;
  for (; n < (int)(sizeof kinds / sizeof *kinds); n++) {
    cases[n] = (update_case){kinds[n].name, FM_SCALED_NOISE, EXACT | kinds[n].sizes, some_options()};
    cases[n].options.sizing = kinds[n].sizing;
    cases[n].options.law = kinds[n].law;
  }
  return n;
}

static int averages(update_case *cases) {
  const unsigned all = FM_BIT(FM_PARAM) | FM_AT_OLD | FM_AVERAGES;
  const struct {
    const char *name;
    int source;
    unsigned operands;
  } kinds[] = {{"average of squares", FM_SOURCE_SQUARE, all},
               {"average", FM_SOURCE_PLAIN, WITHOUT(all, FM_LIPSCHITZ)},
               {"average of probed", FM_SOURCE_PROBED, all},
               {"average alone", FM_SOURCE_PLAIN, FM_BIT(FM_GRAD) | FM_BIT(FM_CURVATURE)}};
  int n = 0;
  for (; n < (int)(sizeof kinds / sizeof *kinds); n++) {
    cases[n] = (update_case){kinds[n].name, FM_AVERAGE, kinds[n].operands, some_options()};
    cases[n].options.source = kinds[n].source;
  }
  return n;
}

static int probes(update_case *cases) {
  const int laws[] = {FM_LAW_UNIFORM, FM_LAW_NORMAL, FM_LAW_RADEMACHER};
  for (int n = 0; n < 3; n++) {
    cases[n] = (update_case){"probe", FM_PROBE, FM_BIT(FM_PARAM), some_options()};
    cases[n].options.law = laws[n];
  }
  return 3;
}

int form_of(const update_case *c, const fm_row *row) {
  return fm_form(c->update, &c->options, &row->traits, fm_present(row));
}

int update_cases(update_case cases[MOST_CASES]) {
  int n = ascents(cases);
  n += steps(cases + n);
  n += combinations(cases + n);
  n += noises(cases + n);
  n += averages(cases + n);
  n += probes(cases + n);
  return n;
}
