#include "lists.h"

#include <stdlib.h>

double uniform(uint64_t index, uint32_t stream) {
  return (double)fm_random_quad(20260101, index, stream, 0).lane[0] * 0x1p-32 * 2.0 - 1.0;
}

void put(const fm_view *v, int64_t i, double x) {
  char *to = v->data + i * (int64_t)fm_dtype_size(v->dtype);
  const float single = (float)x;
  const uint16_t half = v->dtype == FM_BF16 ? fm_f32_to_bf16(single) : fm_f32_to_f16(single);
  memcpy(to,
         v->dtype == FM_F64   ? (const void *)&x
         : v->dtype == FM_F32 ? (const void *)&single
                              : (const void *)&half,
         fm_dtype_size(v->dtype));
}

double get(const fm_view *v, int64_t i) {
  const char *from = v->data + i * (int64_t)fm_dtype_size(v->dtype);
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

fm_list make_list_of(const int64_t *sizes, int64_t count, fm_dtype dtype, int operands, unsigned exact) {
  fm_list list = {.rows = calloc((size_t)count, sizeof *list.rows), .count = count};
  list.first_chunk = malloc((size_t)(count + 1) * sizeof *list.first_chunk);
  for (int64_t r = 0; r < count; r++) {
    for (int k = 0; k < operands; k++) {
      const fm_dtype type = (exact >> k & 1u) || r % 2 == 0 ? dtype : FM_F32;
      fm_view *v = &list.rows[r].operand[k];
      *v = (fm_view){malloc((size_t)sizes[r] * fm_dtype_size(type) + 1), NULL, sizes[r], type};
      for (int64_t i = 0; i < sizes[r]; i++) {
        const double x = uniform((uint64_t)i, (uint32_t)(r * FM_MAX_OPERANDS + k));
        put(v, i,
            k == FM_ADAM_SQUARE || k == FM_ADAM_LARGEST ? fabs(x) : x); /* Adam's second moments are not negative */
      }
    }
    list.rows[r].wide = dtype == FM_F64;
    list.rows[r].scaling = (int)(r % 4);
    list.rows[r].bias_correction1 = 0.3;
    list.rows[r].root_bias_correction = 0.7;
  }
  fm_list_plan(&list);
  list.partials = malloc((size_t)list.first_chunk[count] * sizeof *list.partials);
  return list;
}

fm_list make_list(fm_dtype dtype, int operands, unsigned exact) {
  static const int64_t sizes[] = {0, 1, 5, 127, 128, 129, 1023, 1024, 1025, 4095, 4096, 4097, 0, 13000};
  return make_list_of(sizes, sizeof sizes / sizeof *sizes, dtype, operands, exact);
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

uint64_t hash_list(const fm_list *list) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (int64_t r = 0; r < list->count; r++) {
    for (int k = 0; k < FM_MAX_OPERANDS; k++) {
      const fm_view *v = &list->rows[r].operand[k];
      for (size_t i = 0; v->data != NULL && i < (size_t)v->numel * fm_dtype_size(v->dtype); i++) {
        hash = (hash ^ (uint8_t)v->data[i]) * 0x100000001b3u;
      }
    }
  }
  return hash;
}

fm_options some_options(void) {
  return (fm_options){.q = 2,
                      .eta = 0.01,
                      .norm = 7.5,
                      .rho = 0.5,
                      .eps = 1e-12,
                      .seed = 12345,
                      .step = 6,
                      .lr = 0.1,
                      .momentum = 0.9,
                      .dampening = 0.25,
                      .weight_decay = 0.01,
                      .beta1 = 0.9,
                      .beta2 = 0.99,
                      .adam_eps = 1e-8,
                      .nesterov = true,
                      .amsgrad = true};
}
