/* x^y for finite x >= 0 and y > 0, of relative error below 1e-12 over the whole range of results, and its logarithm and
 * exponential: in double, by series, the same bits everywhere. */
#ifndef FM_POW_H
#define FM_POW_H

#include "bits.h"

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

#endif
