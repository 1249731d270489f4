/* Random numbers for a block of elements. Included by kernels.c.
 *
 * fm_philox written for vectors: gcc 12 leaves the 32-bit multiplications of its ten rounds scalar (2.1 ns an element
 * on AVX2, against 0.7 with these). Words lie in 64-bit lanes, since the vector multiplication takes the lower half of
 * each and gives 64 bits; what XORs leave in the upper halves never gets into a product. */
#ifndef FM_DRAW_BLOCK_H
#define FM_DRAW_BLOCK_H

enum { FM_QUADS = FM_BLOCK / 4 };

/* The words of a block, lane by lane, so that what is made of them vectorises too. */
typedef struct fm_words {
  uint32_t lane[4][FM_QUADS];
} fm_words;

#if defined(__AVX512F__)
typedef __m512i fm_vector;
#define FM_SET(x) _mm512_set1_epi64((long long)(x))
#define FM_STEPS _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)
#define FM_ADD(a, b) _mm512_add_epi64(a, b)
#define FM_XOR(a, b) _mm512_xor_si512(a, b)
#define FM_UPPER(a) _mm512_srli_epi64(a, 32)
#define FM_MULTIPLY(a, b) _mm512_mul_epu32(a, b)
FM_INLINE void put_words(uint32_t *to, fm_vector words) {
  _mm256_storeu_si256((__m256i *)(void *)to, _mm512_cvtepi64_epi32(words));
}
#elif defined(__AVX2__)
typedef __m256i fm_vector;
#define FM_SET(x) _mm256_set1_epi64x((long long)(x))
#define FM_STEPS _mm256_setr_epi64x(0, 1, 2, 3)
#define FM_ADD(a, b) _mm256_add_epi64(a, b)
#define FM_XOR(a, b) _mm256_xor_si256(a, b)
#define FM_UPPER(a) _mm256_srli_epi64(a, 32)
#define FM_MULTIPLY(a, b) _mm256_mul_epu32(a, b)
FM_INLINE void put_words(uint32_t *to, fm_vector words) {
  const __m256i packed = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128((__m128i *)(void *)to, _mm256_castsi256_si128(packed));
}
#elif defined(__SSE2__)
typedef __m128i fm_vector;
#define FM_SET(x) _mm_set1_epi64x((long long)(x))
#define FM_STEPS _mm_set_epi64x(1, 0)
#define FM_ADD(a, b) _mm_add_epi64(a, b)
#define FM_XOR(a, b) _mm_xor_si128(a, b)
#define FM_UPPER(a) _mm_srli_epi64(a, 32)
#define FM_MULTIPLY(a, b) _mm_mul_epu32(a, b)
FM_INLINE void put_words(uint32_t *to, fm_vector words) {
  _mm_storel_epi64((__m128i *)(void *)to, _mm_shuffle_epi32(words, 0x88));
}
#endif

/* The words of quads [quad, quad + FM_QUADS) of a tensor. */
static void random_block(const fm_options *o, uint32_t tensor, uint64_t quad, fm_words *words) {
#ifdef __SSE2__
  /* ABREAST vectors at a time: a round is a chain of four instructions, and with two of them the multipliers waited. */
  enum { WIDTH = sizeof(fm_vector) / sizeof(uint64_t), ROUNDS = 10, ABREAST = 4 };
  fm_vector keys[ROUNDS][2]; /* in memory, where an XOR can read them */
  for (int round = 0; round < ROUNDS; round++) {
    keys[round][0] = FM_SET((uint32_t)o->seed + (uint32_t)round * 0x9E3779B9u);
    keys[round][1] = FM_SET((uint32_t)(o->seed >> 32) + (uint32_t)round * 0xBB67AE85u);
  }
  for (int q = 0; q < FM_QUADS; q += ABREAST * WIDTH) {
    fm_vector c[ABREAST][4];
    for (int k = 0; k < ABREAST; k++) {
      c[k][0] = FM_ADD(FM_SET(quad + (uint64_t)(q + k * WIDTH)), FM_STEPS);
      c[k][1] = FM_XOR(FM_UPPER(c[k][0]), FM_SET(o->step >> 32 << 16));
      c[k][2] = FM_SET(tensor);
      c[k][3] = FM_SET(o->step & 0xffffffffu);
    }
#pragma GCC unroll 10
    for (int round = 0; round < ROUNDS; round++) {
#pragma GCC unroll 4
      for (int k = 0; k < ABREAST; k++) {
        fm_vector *v = c[k];
        const fm_vector m0 = FM_MULTIPLY(v[0], FM_SET(0xD2511F53u)), m1 = FM_MULTIPLY(v[2], FM_SET(0xCD9E8D57u));
        v[0] = FM_XOR(FM_XOR(FM_UPPER(m1), v[1]), keys[round][0]);
        v[2] = FM_XOR(FM_XOR(FM_UPPER(m0), v[3]), keys[round][1]);
        v[1] = m1;
        v[3] = m0;
      }
    }
    for (int k = 0; k < ABREAST; k++) {
      for (int l = 0; l < 4; l++) {
        put_words(&words->lane[l][q + k * WIDTH], c[k][l]);
      }
    }
  }
#else
  for (int q = 0; q < FM_QUADS; q++) {
    const fm_quad lanes = fm_random_quad(o->seed, o->step, tensor, quad + (uint64_t)q);
    for (int l = 0; l < 4; l++) {
      words->lane[l][q] = lanes.lane[l];
    }
  }
#endif
}

/* The draws of FM_BLOCK elements from `at`, a multiple of 4. */
static void draw_block(const fm_options *o, int law, uint32_t tensor, int64_t at, float *draws) {
  fm_words words;
  float lane[4][FM_QUADS];
  random_block(o, tensor, (uint64_t)at / 4, &words);
  for (int l = 0; l < 4; l += 2) {
    if (law == FM_LAW_NORMAL) {
#pragma GCC ivdep
      for (int q = 0; q < FM_QUADS; q++) {
        const float radius = fm_normal_radius(words.lane[l][q]);
        float cosine, sine;
        fm_turn(words.lane[l + 1][q], &cosine, &sine);
        lane[l][q] = cosine * radius;
        lane[l + 1][q] = sine * radius;
      }
    } else if (law == FM_LAW_RADEMACHER) {
      for (int q = 0; q < FM_QUADS; q++) {
        lane[l][q] = fm_rademacher(words.lane[l][q]);
        lane[l + 1][q] = fm_rademacher(words.lane[l + 1][q]);
      }
    } else {
      for (int q = 0; q < FM_QUADS; q++) {
        lane[l][q] = fm_uniform(words.lane[l][q]);
        lane[l + 1][q] = fm_uniform(words.lane[l + 1][q]);
      }
    }
  }
  for (int q = 0; q < FM_QUADS; q++) {
    for (int l = 0; l < 4; l++) {
      draws[4 * q + l] = lane[l][q];
    }
  }
}

#endif
