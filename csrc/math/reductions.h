/* The reductions: what an element adds to the sum of a chunk (a term), how sums are folded, and what becomes of the
 * last one: norms, ties, inner products and PACGen's sum. */
#ifndef FM_REDUCTIONS_H
#define FM_REDUCTIONS_H

#include "options.h"
#include "pow.h"

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

/* Whether partial results have more than their first number. `fp64`: of float64. */
FM_HD bool fm_has_parts(int term, bool fp64) {
  return (term == FM_TERM_SQUARE && fp64) || term == FM_TERM_PACGEN || term == FM_TERM_NOISE || term == FM_TERM_DOT;
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
  const double raw = fma(o->lipschitz * lipschitz, n, o->curvature_scale * h);
  const double c = raw < 0.0 ? raw - raw : raw; /* 0, and NaN of -inf */
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
FM_HD void fm_pacgen_normalise(fm_sum *lane) {
  const double x = lane->big, y = lane->small;
  lane->big = lane->small = 0.0;
  lane->mid = fm_multiply(&lane->big, x) - fm_multiply(&lane->small, y);
}

FM_HD double fm_pacgen_of(fm_sum s) {
  const double ln2 = 0.6931471805599453;
  return s.rest != s.rest ? s.rest : 0.5 * ln2 * (s.mid + fm_log2((1.0 + s.big) / (1.0 + s.small)));
}

/* What |T g| = x adds to the sums. `fp64`: x comes from float64 and its square may leave the range. */
FM_HD fm_sum fm_term(double x, int term, bool fp64, const fm_options *o) {
  fm_sum t;
  t.big = t.small = t.rest = 0.0;
  if (term == FM_TERM_SQUARE && fp64) {
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

#endif
