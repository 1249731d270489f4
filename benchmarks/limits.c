/* What the machine allows: the memory traffic of one SAM step over flat arrays, with the least arithmetic that makes
 * it.
 *
 * sam_step.py compiles this file with -O3 -march=native -fopenmp. `streaming` writes what is written without having
 * been read with non-temporal stores, which spare the read of the line (a third of a copy's traffic) but bypass the
 * cache: large arrays gain, arrays that fit into the cache may lose. Elements are taken in groups, so `count` is a
 * multiple of GROUP and every array starts at a multiple of 64 bytes.
 */
#include <stdbool.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { GROUP = 64 }; /* floats: as many independent sums hide the latency of addition (4 cycles) at any vector width */

static inline void store_group(float *restrict to, const float *restrict group, bool streaming) {
#if defined(__AVX512F__)
  for (int i = 0; streaming && i < GROUP; i += 16) {
    _mm512_stream_ps(to + i, _mm512_loadu_ps(group + i));
  }
#elif defined(__AVX__)
  for (int i = 0; streaming && i < GROUP; i += 8) {
    _mm256_stream_ps(to + i, _mm256_loadu_ps(group + i));
  }
#elif defined(__x86_64__)
  for (int i = 0; streaming && i < GROUP; i += 4) {
    _mm_stream_ps(to + i, _mm_loadu_ps(group + i));
  }
#else
  streaming = false;
#endif
  for (int i = 0; !streaming && i < GROUP; i++) {
    to[i] = group[i];
  }
}

/* Non-temporal stores are not ordered by the barrier that ends a parallel region. */
static inline void finish_stores(void) {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

/* 1 stream. Returns the sum of squares, so that the reads are not optimised away. */
float limit_read(const float *g, int64_t count, int threads) {
  float total = 0.0F;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    float sums[GROUP] = {0.0F};
#pragma omp for schedule(static)
    for (int64_t at = 0; at < count; at += GROUP) {
      for (int i = 0; i < GROUP; i++) {
        sums[i] += g[at + i] * g[at + i];
      }
    }
    for (int i = 0; i < GROUP; i++) {
      total += sums[i];
    }
  }
  return total;
}

/* 2 streams. */
void limit_copy(float *restrict to, const float *restrict from, int64_t count, bool streaming, int threads) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t at = 0; at < count; at += GROUP) {
      store_group(to + at, from + at, streaming);
    }
    finish_stores();
  }
}

/* 4 streams: reads p and g, writes old and p. */
static void perturb(float *restrict p, const float *restrict g, float *restrict old, int64_t count, float scale,
                    bool streaming, int threads) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t at = 0; at < count; at += GROUP) {
      store_group(old + at, p + at, streaming);
      for (int i = 0; i < GROUP; i++) {
        p[at + i] += scale * g[at + i];
      }
    }
    finish_stores();
  }
}

/* 5 streams: reads old, g and buf, writes p and buf. */
static void restore_and_step(float *restrict p, const float *restrict g, float *restrict buf, const float *restrict old,
                             int64_t count, bool streaming, int threads) {
  const float momentum = 0.9F;
  const float lr = 1e-4F;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t at = 0; at < count; at += GROUP) {
      float moved[GROUP];
      for (int i = 0; i < GROUP; i++) {
        buf[at + i] = momentum * buf[at + i] + g[at + i];
        moved[i] = old[at + i] - lr * buf[at + i];
      }
      store_group(p + at, moved, streaming);
    }
    finish_stores();
  }
}

/* The 10 streams of a step: the norm's 1, the perturbation's 4, the 5 of restore and step. */
void limit_step(float *restrict p, const float *restrict g, float *restrict buf, float *restrict old, int64_t count,
                bool streaming, int threads) {
  const float scale = 0.05F / (limit_read(g, count, threads) + 1.0F);
  perturb(p, g, old, count, scale, streaming, threads);
  restore_and_step(p, g, buf, old, count, streaming, threads);
}
