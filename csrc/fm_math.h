/* The per-element mathematics of every operator, for C17 and CUDA alike.
 *
 * Only + - * / fma sqrt, integer operations and selects appear here: each is correctly rounded everywhere, so the same
 * inputs give the same bits on every instruction set and on the GPU. Build with -ffp-contract=off (nvcc: -fmad=false);
 * a contraction would round once where the text rounds twice. No libm beyond fma and sqrt: log and exp differ between
 * glibc versions, and fm_pow below does not. */
#ifndef FM_MATH_H
#define FM_MATH_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define FM_HD static __host__ __device__ __forceinline__
#else
#define FM_HD static inline
#endif

/* Adaptive conventions T(w) of ASAM and its relatives (Kwon et al. 2021, arXiv 2102.11600, and two others in use). */
enum {
  FM_SCALE_NONE = 0,       /* T = 1 */
  FM_SCALE_ASAM = 1,       /* T = |w| + eta; tensors of one dimension or none are left unscaled */
  FM_SCALE_DAVDA54 = 2,    /* T = |w| */
  FM_SCALE_BIG_VISION = 3, /* T = |w| on the perturbation only: the norm and its powers see g itself */
};

/* ---- bit casts ---- */

FM_HD uint32_t fm_bits_f32(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

FM_HD float fm_f32_bits(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

FM_HD uint64_t fm_bits_f64(double x) {
  uint64_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

FM_HD double fm_f64_bits(uint64_t u) {
  double x;
  memcpy(&x, &u, sizeof x);
  return x;
}

/* ---- 16-bit types, in integers: gcc 12 has no vectorised conversion for either, and these vectorise ---- */

FM_HD float fm_bf16_to_f32(uint16_t h) { return fm_f32_bits((uint32_t)h << 16); }

/* Round to nearest even; every NaN becomes 0x7fc0, as in torch. */
FM_HD uint16_t fm_f32_to_bf16(float x) {
  uint32_t u = fm_bits_f32(x);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

FM_HD float fm_f16_to_f32(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
  uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13;
  /* Re-bias 15 -> 127. Infinity and NaN need the largest exponent instead; a subnormal h is h * 2^-24 exactly, which
   * the multiplication of the (normal) number 2^-14 + h * 2^-24 minus 2^-14 yields without a branch. */
  uint32_t normal = magnitude + ((127u - 15u) << 23);
  uint32_t special = magnitude | 0x7f800000u;
  float subnormal = fm_f32_bits(magnitude + (113u << 23)) - fm_f32_bits(113u << 23);
  uint32_t bits = magnitude >= (31u << 23) ? special : normal;
  bits = magnitude < (1u << 23) ? fm_bits_f32(subnormal) : bits;
  return fm_f32_bits(sign | bits);
}

/* Round to nearest even. NaN becomes a quiet NaN of the same sign: 0x7e00 | sign, as in torch. */
FM_HD uint16_t fm_f32_to_f16(float x) {
  uint32_t u = fm_bits_f32(x);
  uint32_t sign = (u >> 16) & 0x8000u;
  uint32_t a = u & 0x7fffffffu;
  /* normal: re-bias 127 -> 15 and round 13 bits away; a carry may run into the exponent and up to infinity */
  uint32_t normal = (a - ((127u - 15u) << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  /* subnormal: adding 0.5 aligns the last bit of x with 2^-24, and the addition itself rounds to nearest even */
  uint32_t subnormal = fm_bits_f32(fm_f32_bits(a) + 0.5f) - fm_bits_f32(0.5f);
  uint32_t h = a < 0x38800000u ? subnormal : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h; /* 65520 and above round to infinity */
  h = a > 0x7f800000u ? 0x7e00u : h;
  return (uint16_t)(sign | h);
}

/* ---- stochastic rounding: up with the probability of the part that is cut off, so the mean is x ---- */

FM_HD uint16_t fm_f32_to_bf16_random(float x, uint32_t random) {
  uint32_t u = fm_bits_f32(x);
  uint32_t finite = (u + (random >> 16)) >> 16; /* an exact x has 16 zero bits there and never moves */
  return (u & 0x7fffffffu) >= 0x7f800000u ? fm_f32_to_bf16(x) : (uint16_t)finite;
}

FM_HD uint16_t fm_f32_to_f16_random(float x, uint32_t random) {
  uint32_t u = fm_bits_f32(x);
  uint32_t sign = (u >> 16) & 0x8000u;
  uint32_t a = u & 0x7fffffffu;
  uint32_t normal = (a - ((127u - 15u) << 23) + (random >> 19)) >> 13;
  /* Below 2^-14 the step is 2^-24 throughout: count steps (exact in float, less than 2^10 and 13 bits of fraction kept)
   * and add a uniform 13-bit fraction before cutting. */
  float tiny = a < 0x38800000u ? fm_f32_bits(a) : 0.0f;
  uint32_t subnormal = (uint32_t)(int32_t)(tiny * 16777216.0f + (float)(random >> 19) * 0x1p-13f);
  uint32_t h = a < 0x38800000u ? subnormal : normal;
  h = h > 0x7c00u ? 0x7c00u : h;
  return a >= 0x477ff000u ? fm_f32_to_f16(x) : (uint16_t)(sign | h);
}

/* ---- Philox4x32-10 (Salmon et al. 2011), the counter-based generator of Random123 ---- */

typedef struct fm_quad {
  uint32_t lane[4];
} fm_quad;

FM_HD fm_quad fm_philox(fm_quad counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.lane[0], c1 = counter.lane[1], c2 = counter.lane[2], c3 = counter.lane[3];
  for (int round = 0; round < 10; round++) {
    uint64_t m0 = (uint64_t)0xD2511F53u * c0, m1 = (uint64_t)0xCD9E8D57u * c2;
    uint32_t n0 = (uint32_t)(m1 >> 32) ^ c1 ^ key0, n2 = (uint32_t)(m0 >> 32) ^ c3 ^ key1;
    c1 = (uint32_t)m1;
    c3 = (uint32_t)m0;
    c0 = n0;
    c2 = n2;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  fm_quad out;
  out.lane[0] = c0;
  out.lane[1] = c1;
  out.lane[2] = c2;
  out.lane[3] = c3;
  return out;
}

/* Element i of a tensor owns lane i % 4 of quad i / 4, so its value depends on (seed, step, tensor, i) alone: not on
 * threads, blocks, instruction set or device. */
FM_HD fm_quad fm_random_quad(uint64_t seed, uint64_t step, uint32_t tensor, uint64_t quad) {
  fm_quad counter;
  counter.lane[0] = (uint32_t)quad;
  counter.lane[1] = (uint32_t)(quad >> 32);
  counter.lane[2] = tensor;
  counter.lane[3] = (uint32_t)step;
  return fm_philox(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
}

/* ---- x^y for finite x >= 0 and y > 0, relative error below 1e-12 over the whole range of results ---- */

FM_HD double fm_log2(double x) {
  const double log2e = 1.4426950408889634;
  double shift = x < 0x1p-1022 ? 54.0 : 0.0; /* subnormals are scaled into the normal range first */
  uint64_t u = fm_bits_f64(x < 0x1p-1022 ? x * 0x1p54 : x);
  int64_t above = (u & 0xfffffffffffffu) > 0x6a09e667f3bcdu; /* mantissa above sqrt 2: take m in [sqrt 1/2, sqrt 2) */
  double exponent = (double)((int64_t)(u >> 52) - 1023 + above);
  double m = fm_f64_bits((u & 0xfffffffffffffu) | ((uint64_t)(1023 - above) << 52));
  /* ln m = 2 atanh s with |s| < 0.1716; the first term left out, 2 s^23 / 23, is below 3e-19 */
  double s = (m - 1.0) / (m + 1.0), z = s * s;
  double series = 1.0 / 21.0;
  for (int k = 19; k >= 1; k -= 2) {
    series = series * z + 1.0 / k;
  }
  return exponent - shift + 2.0 * s * series * log2e;
}

FM_HD double fm_exp2(double t) {
  const double ln2 = 0.6931471805599453;
  t = t < -1100.0 ? -1100.0 : t > 1100.0 ? 1100.0 : t;
  int64_t n = (int64_t)(t + (t < 0.0 ? -0.5 : 0.5));
  double r = (t - (double)n) * ln2; /* |r| < 0.3466; the first Taylor term left out, r^14 / 14!, is below 5e-18 */
  double series = 1.0;
  for (int k = 13; k >= 1; k--) {
    series = series * r / k + 1.0;
  }
  /* 2^n in two factors: n reaches below the smallest normal exponent */
  int64_t half = n / 2;
  return series * fm_f64_bits((uint64_t)(half + 1023) << 52) * fm_f64_bits((uint64_t)(n - half + 1023) << 52);
}

FM_HD double fm_pow(double x, double y) { return x > 0.0 ? fm_exp2(y * fm_log2(x)) : 0.0; }

/* base^n for a whole n >= 0 by squaring: exact for n = 1, and the error grows with log n only. Adam's bias correction
 * subtracts the result from 1, which would magnify an error of fm_pow. */
FM_HD double fm_pow_int(double base, int64_t n) {
  double result = 1.0;
  for (; n > 0; n >>= 1) {
    result = n & 1 ? result * base : result;
    base *= base;
  }
  return result;
}

/* ---- sums of squares that neither overflow nor underflow ---- */

/* Blue's three ranges (1978; as in LAPACK's dnrm2): terms are scaled so that their squares stay normal numbers.
 * float32, bfloat16 and float16 never leave the middle: the square of any of them is an exact normal float64. */
#define FM_BLUE_SMALL 0x1p-511
#define FM_BLUE_BIG 0x1p486
#define FM_BLUE_SCALE_SMALL 0x1p537
#define FM_BLUE_SCALE_BIG 0x1p-538

typedef struct fm_sum {
  double mid, big, small;
} fm_sum;

FM_HD double fm_sum_root(fm_sum s) {
  if (s.big > 0.0) {
    double mid = s.mid > 0.0 || s.mid != s.mid ? s.mid * FM_BLUE_SCALE_BIG * FM_BLUE_SCALE_BIG : 0.0;
    return sqrt(s.big + mid) / FM_BLUE_SCALE_BIG;
  }
  if (s.small > 0.0) {
    double low = sqrt(s.small) / FM_BLUE_SCALE_SMALL;
    if (!(s.mid > 0.0 || s.mid != s.mid)) {
      return low;
    }
    double high = sqrt(s.mid);
    double large = low > high ? low : high, ratio = (low > high ? high : low) / large;
    return high != high ? high : large * sqrt(1.0 + ratio * ratio);
  }
  return sqrt(s.mid);
}

/* ---- what the operators are asked to do ---- */

typedef struct fm_options {
  double q, eta, norm;
  double rho, eps; /* ascend */
  bool random;     /* ascend: stochastic rounding of 16-bit parameters by (seed, step) */
  uint64_t seed, step;
  double lr, momentum, dampening, weight_decay; /* the base steps */
  double beta1, beta2, adam_eps;
  bool nesterov, maximize, first_step, decoupled, amsgrad;
} fm_options;

/* The numbers that change from step to step, where the kernels read them: on a GPU their values are unknown to the
 * host. */
typedef struct fm_scalars {
  const double *norm, *rho, *lr;
  const uint64_t *key; /* seed, step; NULL to round to nearest */
} fm_scalars;

FM_HD void fm_read_scalars(fm_options *o, const fm_scalars *s) {
  o->norm = s->norm ? *s->norm : o->norm;
  o->rho = s->rho ? *s->rho : o->rho;
  o->lr = s->lr ? *s->lr : o->lr;
  o->random = s->key != NULL;
  o->seed = s->key ? s->key[0] : 0;
  o->step = s->key ? s->key[1] : 0;
}

/* ---- terms of the reductions ---- */

enum { FM_TERM_SQUARE, FM_TERM_POWER, FM_TERM_LARGEST, FM_TERM_TIES };

FM_HD double fm_larger(double a, double b) { return b > a || b != b ? b : a; /* NaN wins */ }

/* What |T g| = x adds to the sums. `wide`: x comes from float64 and its square may leave the range. */
FM_HD fm_sum fm_term(double x, int term, bool wide, const fm_options *o) {
  fm_sum t;
  t.big = t.small = 0.0;
  if (term == FM_TERM_SQUARE && wide) {
    const bool big = x > FM_BLUE_BIG, small = x < FM_BLUE_SMALL;
    const double scaled = x * (big ? FM_BLUE_SCALE_BIG : small ? FM_BLUE_SCALE_SMALL : 1.0), square = scaled * scaled;
    t.mid = big || small ? 0.0 : square;
    t.big = big ? square : 0.0;
    t.small = small ? square : 0.0;
  } else if (term == FM_TERM_SQUARE) {
    t.mid = x * x;
  } else if (term == FM_TERM_POWER) {
    t.mid = o->q == 1.0 ? x / o->norm : fm_pow(x / o->norm, o->q);
  } else if (term == FM_TERM_TIES) {
    t.mid = x == o->norm ? 1.0 : 0.0;
  } else {
    t.mid = x;
  }
  return t;
}

FM_HD fm_sum fm_fold(fm_sum a, fm_sum b, int term) {
  fm_sum t;
  t.mid = term == FM_TERM_LARGEST ? fm_larger(a.mid, b.mid) : a.mid + b.mid;
  t.big = a.big + b.big;
  t.small = a.small + b.small;
  return t;
}

/* Whether `largest`, the norm for q = infinity, already is the norm for any q: nothing but zeros, or not finite. */
FM_HD bool fm_norm_is_largest(double largest, double q) { return isinf(q) || !(largest > 0.0) || !isfinite(largest); }

/* The norm from S = sum (|x| / largest)^q: Foret et al.'s Eq. 2, max-scaled. */
FM_HD double fm_norm_from_powers(double largest, double sum, double q) {
  return largest * (q == 1.0 ? sum : fm_pow(sum, 1.0 / q));
}

/* ---- the update rules, once for float and once for double ---- */

/* T(w) in double, as the norm sees it. */
FM_HD double fm_scaling_wide(double w, int scaling, double eta) {
  return scaling == FM_SCALE_NONE ? 1.0 : scaling == FM_SCALE_ASAM ? fabs(w) + eta : fabs(w);
}

#define FM_REAL float
#define FM_NAME(name) name##_f32
#define FM_FMA fmaf
#define FM_SQRT sqrtf
#define FM_ABS fabsf
#include "fm_formulas.h"
#undef FM_REAL
#undef FM_NAME
#undef FM_FMA
#undef FM_SQRT
#undef FM_ABS

#define FM_REAL double
#define FM_NAME(name) name##_f64
#define FM_FMA fma
#define FM_SQRT sqrt
#define FM_ABS fabs
#include "fm_formulas.h"
#undef FM_REAL
#undef FM_NAME
#undef FM_FMA
#undef FM_SQRT
#undef FM_ABS

#endif
