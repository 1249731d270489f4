/* The per-element mathematics of every operator, for C17 and CUDA alike.
 *
 * Only + - * / fma sqrt, integer operations and selects appear here: each is correctly rounded everywhere, so the same
 * inputs give the same bits on every instruction set and on the GPU. Build with -ffp-contract=off (nvcc: -fmad=false);
 * a contraction would round once where the text rounds twice. No libm beyond fma and sqrt: log and exp differ between
 * glibc versions, and fm_pow below does not. */
#ifndef FM_MATH_H
#define FM_MATH_H

#include "fm_random.h"

/* Adaptive conventions T(w) of ASAM and its relatives (Kwon et al. 2021, arXiv 2102.11600, and two others in use). */
enum {
  FM_SCALE_NONE = 0,       /* T = 1 */
  FM_SCALE_ASAM = 1,       /* T = |w| + eta; tensors of one dimension or none are left unscaled */
  FM_SCALE_DAVDA54 = 2,    /* T = |w| */
  FM_SCALE_BIG_VISION = 3, /* T = |w| on the perturbation only: the norm and its powers see g itself */
};

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

/* ---- partial results ---- */

/* What a chunk adds to a reduction, by term:
 *   squares of float64   mid, big and small: Blue's three ranges (1978; as in LAPACK's dnrm2), scaled so that their
 *                        squares stay normal numbers. float32, bfloat16 and float16 never leave the middle: the square
 *                        of any of them is an exact normal float64
 *   PACGen               a product of X / Y as 2^mid (1 + big) / (1 + small), and in rest how many elements are capped
 *   noise                mid: sum of sizes, big: capped, small: not finite
 *   dot                  four sums of products
 *   all others           mid alone
 * Zeros are neutral in each. */
typedef struct fm_sum {
  double mid, big, small, rest;
} fm_sum;

#define FM_BLUE_SMALL 0x1p-511
#define FM_BLUE_BIG 0x1p486
#define FM_BLUE_SCALE_SMALL 0x1p537
#define FM_BLUE_SCALE_BIG 0x1p-538

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

/* Where each value of a tensor is found: the operands that an operator has not are absent. */
enum {
  FM_PARAM,
  FM_OLD, /* the backup */
  FM_GRAD,
  FM_BUFFER,            /* SGD's momentum */
  FM_MEAN = FM_BUFFER,  /* Adam's and Lion's */
  FM_THIRD = FM_BUFFER, /* blend's third list */
  FM_SQUARE,
  FM_LARGEST,   /* amsgrad only */
  FM_CURVATURE, /* an average of the Hessian's diagonal, or sizes that are given */
  FM_LIPSCHITZ, /* of the Hessian, per element */
  FM_MAX_OPERANDS,
  FM_DRAW = FM_MAX_OPERANDS, /* a random number of the element */
  FM_TALLY,                  /* three values that are added up beside the update */
  FM_SLOTS = FM_TALLY + 3,
};

/* How the size of the noise is given. */
enum { FM_SIZE_NEIGHBOURHOOD, FM_SIZE_CURVATURE, FM_SIZE_GIVEN };

/* What a curvature average is fed with. */
enum { FM_SOURCE_SQUARE, FM_SOURCE_PLAIN, FM_SOURCE_PROBED };

typedef struct fm_options {
  double q, eta, norm;
  double rho, eps; /* ascend; eps is the neighbourhood's too */
  bool random;     /* ascend: stochastic rounding of 16-bit parameters by (seed, step) */
  uint64_t seed, step;
  double lr, momentum, dampening, weight_decay; /* the base steps */
  double beta1, beta2, adam_eps;
  bool nesterov, maximize, first_step, decoupled, amsgrad;
  double scale;                             /* noise, and axpy's factor */
  double lipschitz, curvature_scale, gamma; /* noise and PACGen */
  double source_scale, decay, lipschitz_decay, min_step, correction_before, correction_after; /* curvature */
  double coefficient[3]; /* blend: of what is written, FM_GRAD and FM_THIRD */
  int sizing, law, source;
  int lists; /* dot: 2 to FM_DOT_LISTS */
} fm_options;

/* The numbers that change from step to step, where the kernels read them: on a GPU their values are unknown to the
 * host. */
typedef struct fm_scalars {
  const double *norm, *rho, *lr, *scale, *lipschitz, *curvature_scale;
  const double *corrections;  /* before and after */
  const double *coefficients; /* blend: three */
  const uint64_t *key;        /* seed, step; NULL to round to nearest */
} fm_scalars;

FM_HD void fm_read_scalars(fm_options *o, const fm_scalars *s) {
  o->norm = s->norm ? *s->norm : o->norm;
  o->rho = s->rho ? *s->rho : o->rho;
  o->lr = s->lr ? *s->lr : o->lr;
  o->scale = s->scale ? *s->scale : o->scale;
  o->lipschitz = s->lipschitz ? *s->lipschitz : o->lipschitz;
  o->curvature_scale = s->curvature_scale ? *s->curvature_scale : o->curvature_scale;
  o->correction_before = s->corrections ? s->corrections[0] : o->correction_before;
  o->correction_after = s->corrections ? s->corrections[1] : o->correction_after;
  for (int k = 0; k < 3; k++) {
    o->coefficient[k] = s->coefficients ? s->coefficients[k] : o->coefficient[k];
  }
  o->random = s->key != NULL;
  o->seed = s->key ? s->key[0] : 0;
  o->step = s->key ? s->key[1] : 0;
}

/* What differs from tensor to tensor. */
typedef struct fm_traits {
  int scaling;                 /* T(w): ASAM leaves biases and norm layers unscaled */
  double bias_correction1;     /* Adam: 1 - beta1^step */
  double root_bias_correction; /* Adam: square root of 1 - beta2^step */
} fm_traits;

/* ---- terms of the reductions ---- */

/* A plain sum of magnitudes is a norm where it cannot overflow: of anything but float64. */
enum {
  FM_TERM_SQUARE,
  FM_TERM_MAGNITUDE,
  FM_TERM_POWER,
  FM_TERM_LARGEST,
  FM_TERM_TIES,
  FM_TERM_PACGEN,
  FM_TERM_NOISE,
  FM_TERM_DOT
};

/* Whether partial results have more than their first number. `wide`: of float64. */
FM_HD bool fm_has_parts(int term, bool wide) {
  return (term == FM_TERM_SQUARE && wide) || term == FM_TERM_PACGEN || term == FM_TERM_NOISE || term == FM_TERM_DOT;
}

/* ---- inner products ---- */

/* dot sums the products of every pair (a, b), a <= b, of 2 to FM_DOT_LISTS lists: the upper triangle of their Gram
 * matrix, row by row. Four of the sums share a fm_sum, which makes one plane of partial results. A product of two
 * numbers of 32 bits or fewer is exact in double; one of float64 rounds, and can leave the range. */
enum { FM_DOT_LISTS = 4, FM_DOT_SUMS = FM_DOT_LISTS * (FM_DOT_LISTS + 1) / 2, FM_DOT_PLANE = 4 };

FM_HD int fm_dot_sums(int lists) { return lists * (lists + 1) / 2; }

FM_HD int fm_dot_planes(int lists) { return (fm_dot_sums(lists) + FM_DOT_PLANE - 1) / FM_DOT_PLANE; }

/* The lists of sum `pair`. */
FM_HD int fm_dot_a(int lists, int pair) {
  return pair < lists ? 0 : pair < 2 * lists - 1 ? 1 : pair < 3 * lists - 3 ? 2 : 3;
}

FM_HD int fm_dot_b(int lists, int pair) {
  const int a = fm_dot_a(lists, pair);
  return pair - a * (2 * lists - a - 1) / 2;
}

/* A NaN of either stays, as in torch.maximum. */
FM_HD float fm_larger_f32(float a, float b) { return b > a || b != b ? b : a; }
FM_HD double fm_larger_f64(double a, double b) { return b > a || b != b ? b : a; }

/* m in [1, 2) of a normal number 2^e m. */
FM_HD double fm_mantissa(uint64_t bits) { return fm_f64_bits((bits & 0xfffffffffffffu) | 0x3ff0000000000000u); }

/* Multiplies *mantissa - 1 (in [0, 1)) by a normal factor > 0 and returns the power of two that leaves it there. The
 * exponent becomes a double by the bits of 2^52 + exponent, which vectorises where a conversion does not. */
FM_HD double fm_multiply(double *mantissa, double factor) {
  const uint64_t u = fm_bits_f64((1.0 + *mantissa) * factor);
  *mantissa = fm_mantissa(u) - 1.0;
  return fm_f64_bits(u >> 52 | 0x4330000000000000u) - (0x1p52 + 1023.0);
}

/* One weight's part of PACGen's sum, (|w| + N) max(sqrt c, 1 / N) squared: X / Y = (|w| + N)^2 max(c N^2, 1) / N^2,
 * and 1 in `capped` if the maximum is 1. X and Y stay products, so that no element needs a division, a root or a
 * logarithm. X >= Y, and a NaN of any input is one of X. */
typedef struct fm_ratio {
  double x, y, reach, capped;
} fm_ratio;

FM_HD fm_ratio fm_pacgen_ratio(double w, double h, double lipschitz, const fm_options *o) {
  const double magnitude = fabs(w), n = fma(o->gamma, magnitude, o->eps), square = n * n;
  const double raw = fma(o->lipschitz * lipschitz, n, o->curvature_scale * h), c = raw < 0.0 ? 0.0 : raw;
  const double curved = c * square, reach = magnitude + n;
  const bool above = !(curved <= 1.0); /* a NaN is, and gets into X; one comparison serves both choices */
  const fm_ratio ratio = {reach * reach * (above ? curved : 1.0), square, reach, above ? 0.0 : 1.0};
  return ratio;
}

/* Adds a weight to a lane that holds mantissas - 1 of its products, in `mid` the exponent of their ratio and in `rest`
 * the count of capped weights. What is not finite (a mantissa below 2 times X is) or below the squares of float64 makes
 * `rest` a NaN; a weight of 0 without neighbourhood adds nothing: X and Y are 0. */
FM_HD void fm_pacgen_term(fm_sum *to, double w, double h, double lipschitz, const fm_options *o) {
  const fm_ratio r = fm_pacgen_ratio(w, h, lipschitz, o);
  const double least = r.reach < 0x1p-1022 ? r.reach : 0x1p-1022;
  const bool tiny = r.y < 0x1p-1022; /* X too, or `rest` is NaN */
  to->rest = fma(r.x + r.x, 0.0, to->rest + (r.y < least ? NAN : r.capped));
  to->mid += fm_multiply(&to->big, tiny ? 1.0 : r.x) - fm_multiply(&to->small, tiny ? 1.0 : r.y);
}

/* The same where a lane has at most FM_PRODUCTS weights and their products stay in float64, to the same bits in half
 * the time: a lane holds 1 + the products and, in `mid`, the sum of all X. */
enum { FM_PRODUCTS = 16 };

FM_HD void fm_pacgen_product(fm_sum *to, double w, double h, double lipschitz, const fm_options *o) {
  const fm_ratio r = fm_pacgen_ratio(w, h, lipschitz, o);
  to->mid += r.x;
  to->big *= r.x;
  to->small *= r.y;
  to->rest += r.capped;
}

/* Whether all products on the way were normal numbers: none is above (2^40)^16, and none was below 2^-1022 if the last,
 * after at most 15 factors of 2^40, is 2^-400 or more; those of X are the larger. A NaN is neither. */
FM_HD bool fm_pacgen_normal(const fm_sum *lane) { return lane->mid <= 0x1p40 && lane->small >= 0x1p-400; }

/* Makes such a lane what fm_pacgen_term would have left. */
FM_HD void fm_pacgen_settle(fm_sum *lane) {
  const double x = lane->big, y = lane->small;
  lane->big = lane->small = 0.0;
  lane->mid = fm_multiply(&lane->big, x) - fm_multiply(&lane->small, y);
}

FM_HD double fm_pacgen_of(fm_sum s) {
  const double ln2 = 0.6931471805599453;
  return s.rest != s.rest ? s.rest : 0.5 * ln2 * (s.mid + fm_log2((1.0 + s.big) / (1.0 + s.small)));
}

/* What |T g| = x adds to the sums. `wide`: x comes from float64 and its square may leave the range. */
FM_HD fm_sum fm_term(double x, int term, bool wide, const fm_options *o) {
  fm_sum t;
  t.big = t.small = t.rest = 0.0;
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
  t.rest = a.rest + b.rest;
  if (term == FM_TERM_PACGEN) {
    t.big = a.big;
    t.small = a.small;
    t.mid = a.mid + b.mid;
    t.mid += fm_multiply(&t.big, 1.0 + b.big) - fm_multiply(&t.small, 1.0 + b.small);
    return t;
  }
  t.mid = term == FM_TERM_LARGEST ? fm_larger_f64(a.mid, b.mid) : a.mid + b.mid;
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

/* ---- the updates ---- */

#define FM_BIT(slot) (1u << (slot))
#define FM_SGD_STATE FM_BIT(FM_BUFFER)
#define FM_ADAM_STATE (FM_BIT(FM_MEAN) | FM_BIT(FM_SQUARE) | FM_BIT(FM_LARGEST))
#define FM_AVERAGES (FM_BIT(FM_CURVATURE) | FM_BIT(FM_LIPSCHITZ))
#define FM_AT_OLD (FM_BIT(FM_OLD) | FM_BIT(FM_GRAD))
#define FM_LION_STATE FM_BIT(FM_MEAN)

/* Bytes that an update moves as they are, before its rule. */
typedef enum fm_copy { FM_COPY_NOTHING, FM_COPY_TO_BACKUP, FM_COPY_FROM_BACKUP } fm_copy;

/* How the forms of an update are told apart, each compiled for itself: the kind, how many forms there are, which one it
 * is by the options `o`, the traits `t` and the operands that are `present`, and which slots a form has not. */
enum { FM_FORM_ANY_POWER = 4, FM_FORMS = 8 };
#define FM_FORM_KINDS(X)                                                                 \
  X(FM_ONE_FORM, 1, 0, 0)                                                                \
  X(FM_FORM_BY_SCALING, FM_FORMS, t->scaling + (o->q == 2.0 ? 0 : FM_FORM_ANY_POWER), 0) \
  X(FM_FORM_BY_OPTIONAL, 2, (present & optional) != 0, form != 0 ? 0 : optional)         \
  X(FM_FORM_BY_SIZING, 6, 2 * o->sizing + (o->law == FM_LAW_TRUNCATED),                  \
    form / 2 == FM_SIZE_CURVATURE ? 0                                                    \
    : form / 2 == FM_SIZE_GIVEN   ? FM_BIT(FM_LIPSCHITZ)                                 \
                                  : FM_AVERAGES)                                         \
  X(FM_FORM_BY_SOURCE, 3, o->source, form == FM_SOURCE_PROBED ? 0 : FM_BIT(FM_DRAW))

typedef enum fm_form_kind {
#define FM_ENUMERATOR(kind, count, which, absent) kind,
  FM_FORM_KINDS(FM_ENUMERATOR)
#undef FM_ENUMERATOR
} fm_form_kind;

/* Every update: its name, what an element's rule reads and writes, the kind of its forms and the operands that it can
 * do without, what is tallied over the elements (a FM_TERM_..., or -1) and what is copied. The loops of the CPU and of
 * the GPU are made from this table; the rules are in fm_formulas.h, fm_apply. */
#define FM_UPDATES(X)                                                                                                  \
  X(FM_ASCEND, ascend, FM_BIT(FM_PARAM) | FM_BIT(FM_GRAD), FM_BIT(FM_PARAM), FM_FORM_BY_SCALING, 0, -1,                \
    FM_COPY_TO_BACKUP)                                                                                                 \
  X(FM_SAVE, save, 0, 0, FM_ONE_FORM, 0, -1, FM_COPY_TO_BACKUP)                                                        \
  X(FM_RESTORE, restore, 0, 0, FM_ONE_FORM, 0, -1, FM_COPY_FROM_BACKUP)                                                \
  X(FM_AXPY, axpy, FM_BIT(FM_PARAM) | FM_BIT(FM_GRAD), FM_BIT(FM_PARAM), FM_FORM_BY_OPTIONAL, FM_BIT(FM_OLD), -1,      \
    FM_COPY_TO_BACKUP)                                                                                                 \
  X(FM_BLEND, blend, FM_BIT(FM_PARAM) | FM_BIT(FM_GRAD) | FM_BIT(FM_THIRD), FM_BIT(FM_PARAM), FM_FORM_BY_OPTIONAL,     \
    FM_BIT(FM_THIRD), -1, FM_COPY_NOTHING)                                                                             \
  FM_BASE_STEPS(X)                                                                                                     \
  X(FM_SCALED_NOISE, scaled_noise, FM_BIT(FM_PARAM) | FM_AVERAGES | FM_BIT(FM_DRAW), FM_BIT(FM_PARAM),                 \
    FM_FORM_BY_SIZING, 0, FM_TERM_NOISE, FM_COPY_TO_BACKUP)                                                            \
  X(FM_AVERAGE, average, FM_BIT(FM_PARAM) | FM_AT_OLD | FM_AVERAGES | FM_BIT(FM_DRAW), FM_AVERAGES, FM_FORM_BY_SOURCE, \
    0, FM_TERM_LARGEST, FM_COPY_NOTHING)                                                                               \
  X(FM_PROBE, probe, FM_BIT(FM_DRAW), FM_BIT(FM_PARAM), FM_ONE_FORM, 0, -1, FM_COPY_NOTHING)

/* The base steps: name, state, and which of that a step can do without. Each is two updates, of which the second,
 * FM_..._CURVATURE, also averages the squared gradient and tallies the largest difference quotient in the same pass:
 * a base that is added here learns curvature too. */
#define FM_BASE_STEPS(X)                                                            \
  FM_BASE_STEP(X, FM_RESTORE_SGD, restore_sgd, FM_SGD_STATE, FM_SGD_STATE)          \
  FM_BASE_STEP(X, FM_RESTORE_ADAM, restore_adam, FM_ADAM_STATE, FM_BIT(FM_LARGEST)) \
  FM_BASE_STEP(X, FM_RESTORE_LION, restore_lion, FM_LION_STATE, 0)
#define FM_BASE_STEP(X, update, name, state, optional)                                                                 \
  X(update, name, FM_AT_OLD | (state), FM_BIT(FM_PARAM) | (state), FM_FORM_OF_BASE(optional), optional, -1,            \
    FM_COPY_NOTHING)                                                                                                   \
  X(update##_CURVATURE, name##_curvature, FM_AT_OLD | (state) | FM_AVERAGES, FM_BIT(FM_PARAM) | (state) | FM_AVERAGES, \
    FM_FORM_OF_BASE(optional), optional, FM_TERM_LARGEST, FM_COPY_NOTHING)
#define FM_FORM_OF_BASE(optional) ((optional) != 0 ? FM_FORM_BY_OPTIONAL : FM_ONE_FORM)

typedef enum fm_update {
#define FM_ENUMERATOR(update, ...) update,
  FM_UPDATES(FM_ENUMERATOR)
#undef FM_ENUMERATOR
      FM_UPDATE_COUNT
} fm_update;

/* The base step that learns curvature too. */
FM_HD fm_update fm_with_curvature(fm_update base) { return (fm_update)(base + 1); }

typedef struct fm_shape {
  unsigned reads, writes, optional;
  fm_form_kind forms;
  int tally;
  fm_copy copy;
} fm_shape;

FM_HD fm_shape fm_shape_of(fm_update update) {
  fm_shape shape = {0, 0, 0, FM_ONE_FORM, -1, FM_COPY_NOTHING};
  switch (update) {
#define FM_CASE(update, name, its_reads, its_writes, its_forms, its_optional, its_tally, its_copy) \
  case update:                                                                                     \
    shape.reads = (its_reads);                                                                     \
    shape.writes = (its_writes);                                                                   \
    shape.optional = (its_optional);                                                               \
    shape.forms = (its_forms);                                                                     \
    shape.tally = (its_tally);                                                                     \
    shape.copy = (its_copy);                                                                       \
    break;
    FM_UPDATES(FM_CASE)
#undef FM_CASE
    default: break;
  }
  return shape;
}

/* The form of an update for a tensor. `present`: FM_BIT of each operand that there is. */
FM_HD int fm_form(fm_update update, const fm_options *o, const fm_traits *t, unsigned present) {
  const fm_shape shape = fm_shape_of(update);
  const unsigned optional = shape.optional;
  (void)o;
  (void)t;
  switch (shape.forms) {
#define FM_CASE(kind, count, which, absent) \
  case kind: return (which);
    FM_FORM_KINDS(FM_CASE)
#undef FM_CASE
  }
  return 0;
}

FM_HD int fm_form_count(fm_update update) {
  switch (fm_shape_of(update).forms) {
#define FM_CASE(kind, count, which, absent) \
  case kind: return (count);
    FM_FORM_KINDS(FM_CASE)
#undef FM_CASE
  }
  return 0;
}

/* The slots that a form has not. */
FM_HD unsigned fm_absent(fm_update update, int form) {
  const fm_shape shape = fm_shape_of(update);
  const unsigned optional = shape.optional;
  switch (shape.forms) {
#define FM_CASE(kind, count, which, absent) \
  case kind: return (absent);
    FM_FORM_KINDS(FM_CASE)
#undef FM_CASE
  }
  return 0;
}

/* The shape of a form: without a backup nothing is copied. */
FM_HD fm_shape fm_shape_of_form(fm_update update, int form) {
  const unsigned absent = fm_absent(update, form);
  fm_shape shape = fm_shape_of(update);
  shape.reads &= ~absent;
  shape.writes &= ~absent;
  shape.copy = absent & FM_BIT(FM_OLD) ? FM_COPY_NOTHING : shape.copy;
  return shape;
}

/* The law of an update's draws. */
FM_HD int fm_law_of(fm_update update, const fm_options *o) { return update == FM_AVERAGE ? FM_LAW_RADEMACHER : o->law; }

/* What is read where an operand is absent. */
FM_HD double fm_default(int operand) { return operand == FM_LIPSCHITZ ? 1.0 : 0.0; }

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
#define FM_HUGE INFINITY
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
