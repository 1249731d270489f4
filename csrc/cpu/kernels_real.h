/* The loops of kernels.c for one type of arithmetic. Included twice: FM_REAL is float (float32, bfloat16 and float16
 * tensors) or double (float64 tensors, with float32 gradients or state allowed); FM_NATIVE is its fm_dtype. */

/* One block of every value, and the scratch that strided tensors are gathered in. */
typedef struct FM_NAME(fm_blocks) {
  FM_REAL value[FM_VALUES][FM_BLOCK];
  FM_REAL sink[FM_BLOCK]; /* what is written to an absent operand */
  double scratch[FM_BLOCK];
} FM_NAME(fm_blocks);

/* ---- load and store ---- */

/* Whether the elements lie in memory as the arithmetic takes them. */
FM_INLINE bool FM_NAME(is_native)(const fm_view *v) { return v->dtype == FM_NATIVE && v->layout == NULL; }

/* The values of an operand. */
static const FM_REAL *FM_NAME(load)(const fm_view *v, int64_t at, int64_t n, FM_REAL *block, double *scratch) {
  const char *raw = raw_block(v, at, n, (char *)scratch);
  if (FM_NAME(is_native)(v)) {
    return (const FM_REAL *)(const void *)raw;
  }
  if (v->dtype == FM_NATIVE) {
    memcpy(block, raw, (size_t)n * sizeof *block);
  } else if (v->dtype == FM_F32) {
    const float *from = (const float *)(const void *)raw;
    for (int64_t i = 0; i < n; i++) {
      block[i] = (FM_REAL)from[i];
    }
  } else {
    const uint16_t *from = (const uint16_t *)(const void *)raw;
    if (v->dtype == FM_BF16) {
      for (int64_t i = 0; i < n; i++) {
        block[i] = (FM_REAL)fm_bf16_to_f32(from[i]);
      }
    } else {
      for (int64_t i = 0; i < n; i++) {
        block[i] = (FM_REAL)fm_f16_to_f32(from[i]);
      }
    }
  }
  return block;
}

/* Where to compute a result: the tensor itself if its elements need no conversion and no streaming store. */
FM_INLINE FM_REAL *FM_NAME(target)(const fm_view *v, int64_t at, FM_REAL *block, bool streaming) {
  const bool direct = FM_NAME(is_native)(v) && !streaming;
  return direct ? (FM_REAL *)(void *)v->data + at : block;
}

/* Takes a result from `target` to the tensor. `random` (one word per element, or NULL) rounds 16-bit types by chance.
 */
static void FM_NAME(store)(const fm_view *v, int64_t at, int64_t n, const FM_REAL *block, double *scratch,
                           const uint32_t *random, bool streaming) {
  const char *raw = (const char *)block;
  if (v->dtype == FM_NATIVE) {
    if (v->layout == NULL && raw == v->data + at * (int64_t)sizeof *block) {
      return;
    }
  } else if (v->dtype == FM_F32) {
    float *to = (float *)(void *)scratch;
    for (int64_t i = 0; i < n; i++) {
      to[i] = (float)block[i];
    }
    raw = (const char *)scratch;
  } else {
    uint16_t *to = (uint16_t *)(void *)scratch;
    if (random != NULL) {
      for (int64_t i = 0; i < n; i++) {
        float x = (float)block[i];
        to[i] = v->dtype == FM_BF16 ? fm_f32_to_bf16_random(x, random[i]) : fm_f32_to_f16_random(x, random[i]);
      }
    } else if (v->dtype == FM_BF16) {
      for (int64_t i = 0; i < n; i++) {
        to[i] = fm_f32_to_bf16((float)block[i]);
      }
    } else {
      for (int64_t i = 0; i < n; i++) {
        to[i] = fm_f32_to_f16((float)block[i]);
      }
    }
    raw = (const char *)scratch;
  }
  put_raw(v, at, n, raw, streaming);
}

#include "reduce_real.h"
#include "update_real.h"
