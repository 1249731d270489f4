/* bfloat16 and float16: to float and back, to nearest or by chance. In integers, since compilers have no vectorised
 * conversion for either, and these vectorise. */
#ifndef FM_FLOAT16_H
#define FM_FLOAT16_H

#include "bits.h"

/* ---- conversions ---- */

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

#endif
