/* What every file of csrc/math stands on: FM_HD, which marks a function of C17 and of CUDA alike, and the bits of a
 * number.
 *
 * Only + - * / fma sqrt, integer operations and selects appear in this folder: each is correctly rounded everywhere, so
 * the same inputs give the same bits on every instruction set and on the GPU. Build with -ffp-contract=off (nvcc:
 * -fmad=false); a contraction would round once where the text rounds twice. No libm beyond fma and sqrt: log and exp
 * differ between glibc versions, and those of pow.h and fm_random.h do not. */
#ifndef FM_BITS_H
#define FM_BITS_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define FM_HD static __host__ __device__ __forceinline__
#elif defined(FM_EMULATE) || defined(__SANITIZE_ADDRESS__)
#define FM_HD static inline
#else
#define FM_HD static inline __attribute__((always_inline)) /* a call in a loop keeps it from being vectorised */
#endif

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

#endif
