/* Random numbers for a block of elements. Included by kernels.c and labels.c.
 *
 * fm_philox written for vectors: gcc leaves the 32-bit multiplications of its ten rounds scalar. Words lie in 64-bit
 * lanes, since the vector multiplication takes the lower half of each and gives 64 bits; what XORs leave in the upper
 * halves never gets into a product. The quads of a vector are ordered so that the words come out in the order of the
 * elements from unpacking alone. */
#ifndef FM_PHILOX_SIMD_H
#define FM_PHILOX_SIMD_H

#include "vectorise.h"

enum { FM_ROUNDS = 10 };

#if defined(__AVX512F__)
typedef __m512i fm_vector;
#define FM_SET(x) _mm512_set1_epi64((long long)(x))
#define FM_QUADS _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7)
#define FM_ADD(a, b) _mm512_add_epi64(a, b)
#define FM_XOR(a, b) _mm512_xor_si512(a, b)
#define FM_UPPER(a) _mm512_srli_epi64(a, 32)
#define FM_MULTIPLY(a, b) _mm512_mul_epu32(a, b)
#define FM_PAIRS(a, b) _mm512_mask_blend_epi32(0xaaaa, a, _mm512_slli_epi64(b, 32))
#define FM_STORE(to, a) _mm512_storeu_si512(to, a)
#define FM_EVEN(a, b) _mm512_unpacklo_epi64(a, b)
#define FM_ODD(a, b) _mm512_unpackhi_epi64(a, b)
#elif defined(__AVX2__)
typedef __m256i fm_vector;
#define FM_SET(x) _mm256_set1_epi64x((long long)(x))
#define FM_QUADS _mm256_setr_epi64x(0, 2, 1, 3)
#define FM_ADD(a, b) _mm256_add_epi64(a, b)
#define FM_XOR(a, b) _mm256_xor_si256(a, b)
#define FM_UPPER(a) _mm256_srli_epi64(a, 32)
#define FM_MULTIPLY(a, b) _mm256_mul_epu32(a, b)
#define FM_PAIRS(a, b) _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xaa)
#define FM_STORE(to, a) _mm256_storeu_si256((__m256i *)(void *)(to), a)
#define FM_EVEN(a, b) _mm256_unpacklo_epi64(a, b)
#define FM_ODD(a, b) _mm256_unpackhi_epi64(a, b)
#elif defined(__SSE2__)
typedef __m128i fm_vector;
#define FM_SET(x) _mm_set1_epi64x((long long)(x))
#define FM_QUADS _mm_set_epi64x(1, 0)
#define FM_ADD(a, b) _mm_add_epi64(a, b)
#define FM_XOR(a, b) _mm_xor_si128(a, b)
#define FM_UPPER(a) _mm_srli_epi64(a, 32)
#define FM_MULTIPLY(a, b) _mm_mul_epu32(a, b)
#define FM_PAIRS(a, b) _mm_unpacklo_epi32(_mm_shuffle_epi32(a, 0x08), _mm_shuffle_epi32(b, 0x08))
#define FM_STORE(to, a) _mm_storeu_si128((__m128i *)(void *)(to), a)
#define FM_EVEN(a, b) _mm_unpacklo_epi64(a, b)
#define FM_ODD(a, b) _mm_unpackhi_epi64(a, b)
#endif

/* What is one for all blocks of a tensor. */
typedef struct fm_stream {
  uint64_t seed, step;
  uint32_t tensor;
#ifdef __SSE2__
  fm_vector keys[FM_ROUNDS][2]; /* in memory, where an XOR can read them */
#endif
} fm_stream;

FM_INLINE void open_stream(fm_stream *stream, const fm_options *o, uint32_t tensor) {
  stream->seed = o->seed;
  stream->step = o->step;
  stream->tensor = tensor;
#ifdef __SSE2__
  for (int round = 0; round < FM_ROUNDS; round++) {
    stream->keys[round][0] = FM_SET((uint32_t)o->seed + (uint32_t)round * 0x9E3779B9u);
    stream->keys[round][1] = FM_SET((uint32_t)(o->seed >> 32) + (uint32_t)round * 0xBB67AE85u);
  }
#endif
}

#ifdef __SSE2__
/* ABREAST vectors of quads at a time: a round is a chain of four instructions, and with two of them the multipliers
 * waited. */
enum { WIDTH = sizeof(fm_vector) / sizeof(uint64_t), ABREAST = 4, TOGETHER = WIDTH * ABREAST };

/* The words of the quads whose numbers the vectors hold. */
FM_INLINE void random_vectors(const fm_stream *stream, const fm_vector quads[ABREAST], uint32_t *words) {
  fm_vector c[ABREAST][4];
  for (int k = 0; k < ABREAST; k++) {
    c[k][0] = quads[k];
    c[k][1] = FM_XOR(FM_UPPER(c[k][0]), FM_SET(stream->step >> 32 << 16));
    c[k][2] = FM_SET(stream->tensor);
    c[k][3] = FM_SET(stream->step & 0xffffffffu);
  }
#pragma GCC unroll 10
  for (int round = 0; round < FM_ROUNDS; round++) {
#pragma GCC unroll 4
    for (int k = 0; k < ABREAST; k++) {
      fm_vector *v = c[k];
      const fm_vector m0 = FM_MULTIPLY(v[0], FM_SET(0xD2511F53u)), m1 = FM_MULTIPLY(v[2], FM_SET(0xCD9E8D57u));
      v[0] = FM_XOR(FM_XOR(FM_UPPER(m1), v[1]), stream->keys[round][0]);
      v[2] = FM_XOR(FM_XOR(FM_UPPER(m0), v[3]), stream->keys[round][1]);
      v[1] = m1;
      v[3] = m0;
    }
  }
  for (int k = 0; k < ABREAST; k++) {
    const fm_vector front = FM_PAIRS(c[k][0], c[k][1]), back = FM_PAIRS(c[k][2], c[k][3]);
    FM_STORE(words + 4 * k * WIDTH, FM_EVEN(front, back));
    FM_STORE(words + 4 * k * WIDTH + 2 * WIDTH, FM_ODD(front, back));
  }
}
#endif

/* The words of elements [at, at + FM_BLOCK) of a tensor; `at` is a multiple of 4. */
static void random_block(const fm_stream *stream, int64_t at, uint32_t *words) {
  const uint64_t quad = (uint64_t)at / 4;
#ifdef __SSE2__
  for (int q = 0; q < FM_BLOCK / 4; q += TOGETHER) {
    fm_vector quads[ABREAST];
    for (int k = 0; k < ABREAST; k++) {
      quads[k] = FM_ADD(FM_SET(quad + (uint64_t)(q + k * WIDTH)), FM_QUADS);
    }
    random_vectors(stream, quads, words + 4 * q);
  }
#else
  for (int q = 0; q < FM_BLOCK / 4; q++) {
    const fm_quad four = fm_random_quad(stream->seed, stream->step, stream->tensor, quad + (uint64_t)q);
    memcpy(words + 4 * q, four.word, sizeof four.word);
  }
#endif
}

/* The draws of FM_BLOCK elements from `at`, a multiple of 4. */
static void draw_block(const fm_stream *stream, int law, int64_t at, float *draws) {
  uint32_t words[FM_BLOCK];
  random_block(stream, at, words);
  if (law == FM_LAW_NORMAL) {
    FM_INDEPENDENT
    for (int i = 0; i < FM_BLOCK; i += 2) {
      const float radius = fm_normal_radius(words[i]);
      float cosine, sine;
      fm_turn(words[i + 1], &cosine, &sine);
      draws[i] = cosine * radius;
      draws[i + 1] = sine * radius;
    }
  } else if (law == FM_LAW_RADEMACHER) {
    for (int i = 0; i < FM_BLOCK; i++) {
      draws[i] = fm_rademacher(words[i]);
    }
  } else {
    for (int i = 0; i < FM_BLOCK; i++) {
      draws[i] = fm_uniform(words[i]);
    }
  }
}

#endif
