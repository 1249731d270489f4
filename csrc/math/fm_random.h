/* Random numbers: Philox words and what is made of them, for C17 and CUDA alike; bits.h says what is allowed here.
 *
 * A number depends on (seed, draw, stream, tensor, element) alone: not on threads, blocks, instruction set or device.
 * The polynomials are minimax fits (Lawson's iteration on 4000 Chebyshev nodes in double, rounded to float); the errors
 * named are those of the fit, and tests/c/test_random.c measures what rounding adds. */
#ifndef FM_RANDOM_H
#define FM_RANDOM_H

#include "bits.h"

/* ---- Philox4x32-10 (Salmon et al. 2011), the counter-based generator of Random123 ---- */

typedef struct fm_quad {
  uint32_t word[4];
} fm_quad;

FM_HD fm_quad fm_philox(fm_quad counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
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
  out.word[0] = c0;
  out.word[1] = c1;
  out.word[2] = c2;
  out.word[3] = c3;
  return out;
}

/* Element i of a tensor owns lane i % 4 of quad i / 4. `step` is the draw in its lower half and the stream in its upper
 * one: 16 bits, above the 2^48 quads that a tensor can have. */
FM_HD fm_quad fm_random_quad(uint64_t seed, uint64_t step, uint32_t tensor, uint64_t quad) {
  fm_quad counter;
  counter.word[0] = (uint32_t)quad;
  counter.word[1] = (uint32_t)(quad >> 32) ^ (uint32_t)(step >> 32) << 16;
  counter.word[2] = tensor;
  counter.word[3] = (uint32_t)step;
  return fm_philox(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
}

/* ---- elementary functions in float ---- */

/* ln x for normal x > 0: x = 2^e m with m in [sqrt 1/2, sqrt 2), ln m = f - f^2 / 2 + f^3 P(f) to 1.4e-9. */
FM_HD float fm_ln(float x) {
  const uint32_t u = fm_bits_f32(x) - 0x3f3504f3u; /* sqrt 1/2 */
  const float e = (float)((int32_t)u >> 23);
  const float f = fm_f32_bits((u & 0x7fffffu) + 0x3f3504f3u) - 1.0F;
  float p = -0.076312028F;
  p = fmaf(p, f, 0.12854920F);
  p = fmaf(p, f, -0.13207889F);
  p = fmaf(p, f, 0.14190007F);
  p = fmaf(p, f, -0.16616523F);
  p = fmaf(p, f, 0.20001616F);
  p = fmaf(p, f, -0.25001060F);
  p = fmaf(p, f, 0.33333328F);
  const float square = f * f;
  /* ln 2 in two parts: e times the first, of 16 bits, is exact */
  const float low = fmaf(e, -2.12194440e-4F, fmaf(p * f, square, -0.5F * square));
  return fmaf(e, 0.693359375F, f + low);
}

/* 2^t for -126 <= t <= 126, relative error 2e-9 before rounding. */
FM_HD float fm_exp2f(float t) {
  const float n = (float)(int32_t)(t + (t < 0.0F ? -0.5F : 0.5F)), r = t - n;
  float p = 1.5353362e-4F;
  p = fmaf(p, r, 1.3398874e-3F);
  p = fmaf(p, r, 9.6184374e-3F);
  p = fmaf(p, r, 5.5503325e-2F);
  p = fmaf(p, r, 0.24022648F);
  p = fmaf(p, r, 0.69314720F);
  return fmaf(p, r, 1.0F) * fm_f32_bits((uint32_t)((int32_t)n + 127) << 23);
}

/* 2 Phi(a) - 1 for a >= 1: the mass of the normal law within a standard deviations. log2 erfc is nearly a parabola;
 * absolute error 4e-9, and 1 from a = 6 on, where 2e-9 is missing. */
FM_HD float fm_normal_mass(float a) {
  const float t = (a < 6.0F ? a : 6.0F) - 3.5F;
  float p = 3.8801058e-5F;
  p = fmaf(p, t, -7.3881400e-6F);
  p = fmaf(p, t, 1.0059088e-3F);
  p = fmaf(p, t, -5.4464803e-3F);
  p = fmaf(p, t, -0.68019652F);
  p = fmaf(p, t, -5.4121180F);
  p = fmaf(p, t, -11.069689F);
  const float mass = 1.0F - fm_exp2f(p); /* a branch of its own would keep a loop from being vectorised; so below */
  return a < 6.0F ? mass : 1.0F;
}

/* The inverse: sqrt 2 erfinv(y) for |y| <= 1 - 2^-23, relative error 1e-7 (after Giles 2010: a polynomial in
 * w = -ln(1 - y^2) for the middle, one in its root for the tails). */
FM_HD float fm_normal_quantile(float y) {
  const float w = -fm_ln((1.0F - y) * (1.0F + y));
  const bool middle = w < 5.0F;
  const float near = w - 2.5F, far = sqrtf(w > 0.0F ? w : 0.0F) - 3.0F, t = middle ? near : far;
  float p = middle ? 4.0354635e-8F : -2.2595916e-4F;
  p = fmaf(p, t, middle ? 4.8610393e-7F : 1.1669988e-4F);
  p = fmaf(p, t, middle ? -4.9905652e-6F : 1.8275091e-3F);
  p = fmaf(p, t, middle ? -6.2179927e-6F : -5.1711321e-3F);
  p = fmaf(p, t, middle ? 3.0915020e-4F : 8.1537090e-3F);
  p = fmaf(p, t, middle ? -1.7730102e-3F : -1.0785137e-2F);
  p = fmaf(p, t, middle ? -5.9081710e-3F : 1.3343159e-2F);
  p = fmaf(p, t, middle ? 0.34880266F : 1.4165813F);
  p = fmaf(p, t, middle ? 2.1233136F : 4.0064345F);
  return p * y;
}

/* ---- laws: mean 0 and size 1 ---- */

enum {
  FM_LAW_UNIFORM = 0,    /* on (-1, 1): the centre of one of 2^23 cells, never 0 or an end */
  FM_LAW_NORMAL = 1,     /* Box and Muller (1958) on the two words of a pair */
  FM_LAW_TRUNCATED = 2,  /* drawn as uniform; the cut is the element's own */
  FM_LAW_RADEMACHER = 3, /* -1 or 1 */
};

FM_HD float fm_uniform(uint32_t word) { return (float)(int32_t)(word >> 9) * 0x1p-22F - (1.0F - 0x1p-23F); }

FM_HD float fm_rademacher(uint32_t word) { return fm_f32_bits(0x3f800000u | (word & 0x80000000u)); }

/* 31 bits for the radius, which reaches 6.66; they are rounded to 24, but not where they are few and the radius large.
 */
FM_HD float fm_normal_radius(uint32_t word) {
  return sqrtf(-2.0F * fm_ln(((float)(int32_t)(word >> 1) + 0.5F) * 0x1p-31F));
}

/* cos and sin of a whole turn times word / 2^32: a quarter is chosen by the upper bits, t in [-1/2, 1/2) quarters is
 * left. sin(pi/2 t) to 6e-9, cos(pi/2 t) to 6e-11. */
FM_HD void fm_turn(uint32_t word, float *cosine, float *sine) {
  const uint32_t rounded = word + 0x20000000u, quarter = rounded >> 30;
  const float t = (float)((int32_t)(rounded & 0x3fffffffu) - 0x20000000) * 0x1p-30F, z = t * t;
  float s = -4.6056756e-3F;
  s = fmaf(s, z, 7.9681734e-2F);
  s = fmaf(s, z, -0.64596366F);
  s = fmaf(s, z, 1.5707963F) * t;
  float c = 9.0402167e-4F;
  c = fmaf(c, z, -2.0860288e-2F);
  c = fmaf(c, z, 0.25366924F);
  c = fmaf(c, z, -1.2337005F);
  c = fmaf(c, z, 1.0F);
  const bool odd = quarter & 1u;
  const uint32_t x = fm_bits_f32(odd ? s : c), y = fm_bits_f32(odd ? c : s);
  *cosine = fm_f32_bits(x ^ (quarter + 1u) << 30 >> 31 << 31); /* negative in the quarters 1 and 2 */
  *sine = fm_f32_bits(y ^ quarter >> 1 << 31);                 /* negative in 2 and 3 */
}

typedef struct fm_draws {
  float value[4];
} fm_draws;

FM_HD fm_draws fm_draw_quad(fm_quad words, int law) {
  fm_draws x;
  if (law == FM_LAW_NORMAL) {
    const float first = fm_normal_radius(words.word[0]), second = fm_normal_radius(words.word[2]);
    fm_turn(words.word[1], &x.value[0], &x.value[1]);
    fm_turn(words.word[3], &x.value[2], &x.value[3]);
    x.value[0] *= first;
    x.value[1] *= first;
    x.value[2] *= second;
    x.value[3] *= second;
    return x;
  }
  for (int l = 0; l < 4; l++) {
    x.value[l] = law == FM_LAW_RADEMACHER ? fm_rademacher(words.word[l]) : fm_uniform(words.word[l]);
  }
  return x;
}

#endif
