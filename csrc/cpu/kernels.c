/* The loops of every operator over its tensors. Compiled once per instruction set (FM_KERNELS_NAME names the table);
 * the compiler vectorises one text, so all tables give the same bits. The sums of squares are written out for FMA,
 * where a float's square in double is exact: the same bits again.
 *
 * Data passes through blocks of FM_BLOCK elements: load (a pointer where no conversion is needed), compute in float or
 * double, store. A block stays in L1, so whatever is done to it costs no memory traffic; the streams that remain are
 * those of the operator itself: norm 1, ascend 4, restore with SGD and momentum 5. */
#include "fm_ops.h"

#include <assert.h>

#include "philox_simd.h"
#include "vectorise.h"

#define FM_OUTLINE __attribute__((noinline)) /* by its name tests/test_build.py finds it */

enum { FM_CACHE_LINE = 64 };

/* ---- raw blocks: bytes in and out of dense or strided tensors ---- */

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

FM_INLINE void copy_element(char *to, const char *from, size_t size) {
  switch (size) {
    case 2: memcpy(to, from, 2); break;
    case 4: memcpy(to, from, 4); break;
    default: memcpy(to, from, 8); break;
  }
}

/* Copies elements [at, at + n) of a strided tensor: from it `into` a dense block, or into it `from` one; the other is
 * NULL. */
static void copy_strided(const fm_view *v, int64_t at, int64_t n, char *into, const char *from) {
  const fm_layout *layout = v->layout;
  const size_t size = fm_dtype_size(v->dtype);
  const int inner = layout->dims - 1;
  assert(inner >= 0);
  int64_t index[FM_MAX_DIMS], rest = at;
  for (int d = inner; d >= 0; d--) {
    index[d] = rest % layout->size[d];
    rest /= layout->size[d];
  }
  while (n > 0) {
    int64_t offset = 0;
    for (int d = 0; d <= inner; d++) {
      offset += index[d] * layout->stride[d];
    }
    const int64_t run = min64(n, layout->size[inner] - index[inner]), step = layout->stride[inner] * (int64_t)size;
    char *element = v->data + offset * (int64_t)size;
    for (int64_t k = 0; k < run; k++, element += step) {
      if (into != NULL) {
        copy_element(into + k * (int64_t)size, element, size);
      } else if (from != NULL) {
        copy_element(element, from + k * (int64_t)size, size);
      }
    }
    into = into != NULL ? into + run * (int64_t)size : NULL;
    from = from != NULL ? from + run * (int64_t)size : NULL;
    n -= run;
    index[inner] += run;
    for (int d = inner; d > 0 && index[d] == layout->size[d]; d--) {
      index[d] = 0;
      index[d - 1]++;
    }
  }
}

/* The bytes of a block: in place if the tensor is dense, else gathered into scratch. */
static const char *raw_block(const fm_view *v, int64_t at, int64_t n, char *scratch) {
  if (v->layout == NULL) {
    return v->data + at * (int64_t)fm_dtype_size(v->dtype);
  }
  copy_strided(v, at, n, scratch, NULL);
  return scratch;
}

/* Copies past the caches in the widest aligned stores that the instruction set has. */
static void stream_bytes(char *to, const char *from, size_t n) {
#if defined(__AVX512F__)
  enum { WIDTH = 64 };
#elif defined(__AVX__)
  enum { WIDTH = 32 };
#elif defined(__SSE2__)
  enum { WIDTH = 16 };
#endif
#ifdef __SSE2__
  size_t i = (size_t)(-(uintptr_t)to % WIDTH);
  i = i < n ? i : n;
  if (i > 0) { /* rare, and a call */
    memcpy(to, from, i);
  }
  for (; i + WIDTH <= n; i += WIDTH) {
#if defined(__AVX512F__)
    _mm512_stream_si512((void *)(to + i), _mm512_loadu_si512((const void *)(from + i)));
#elif defined(__AVX__)
    _mm256_stream_si256((void *)(to + i), _mm256_loadu_si256((const void *)(from + i)));
#else
    _mm_stream_si128((void *)(to + i), _mm_loadu_si128((const void *)(from + i)));
#endif
  }
  if (i < n) {
    memcpy(to + i, from + i, n - i);
  }
#else
  memcpy(to, from, n);
#endif
}

/* Streaming stores are not ordered with the stores that will announce this thread's end: fence before returning. */
static void stream_end(bool streaming) {
#ifdef __SSE2__
  if (streaming) {
    _mm_sfence();
  }
#else
  (void)streaming;
#endif
}

static void put_bytes(char *to, const char *from, size_t n, bool streaming) {
  if (streaming) {
    stream_bytes(to, from, n);
  } else {
    memcpy(to, from, n);
  }
}

static void put_raw(const fm_view *v, int64_t at, int64_t n, const char *bytes, bool streaming) {
  const size_t size = fm_dtype_size(v->dtype);
  char *to = v->data + at * (int64_t)size;
  if (v->layout != NULL) {
    copy_strided(v, at, n, NULL, bytes);
  } else {
    put_bytes(to, bytes, (size_t)n * size, streaming);
  }
}

/* ---- walking a share of a list ---- */

/* Calls `row_kernel` on the elements of each row that chunks [begin, end) cover. */
typedef void row_fn(const fm_job *job, int64_t row, int64_t begin, int64_t end);

FM_INLINE void for_rows(const fm_job *job, int64_t chunk_begin, int64_t chunk_end, row_fn *row_kernel) {
  const int64_t *first = job->list->first_chunk;
  int64_t low = 0, high = job->list->count; /* the row that owns chunk_begin: first[low] <= chunk_begin < first[high] */
  while (high - low > 1) {
    int64_t middle = low + (high - low) / 2;
    if (first[middle] <= chunk_begin) {
      low = middle;
    } else {
      high = middle;
    }
  }
  for (int64_t r = low; r < job->list->count && first[r] < chunk_end; r++) {
    const int64_t from = chunk_begin > first[r] ? chunk_begin - first[r] : 0;
    const int64_t to = min64(chunk_end, first[r + 1]) - first[r];
    if (from < to) {
      row_kernel(job, r, from * FM_CHUNK, min64(to * FM_CHUNK, job->list->rows[r].numel));
    }
  }
  stream_end(job->streaming);
}

/* ---- lanes of one chunk ---- */

typedef struct fm_lanes {
  double mid[FM_LANES], big[FM_LANES], small[FM_LANES], rest[FM_LANES];
} fm_lanes;

/* How a chunk is added up. `full`: with the operands that a term can do without, weights of a norm or Lipschitz
 * constants of PACGen; `products`: PACGen's as fm_pacgen_product does it. */
typedef struct fm_way {
  int term, scaling;
  bool full, products;
} fm_way;

/* Lanes that stay in registers over the strips of a span: 32 doubles are four AVX-512 registers or eight of AVX2. */
enum { FM_LANE_GROUP = 32 };

/* The lanes that n elements use, up to a power of two that folds in halves. The others would add zeros, most
 * of the work for a tensor of a few elements. */
FM_INLINE int lanes_of(int64_t n) {
  int used = 1;
  while (used < FM_LANES && used < n) {
    used *= 2;
  }
  return used;
}

/* A call: what gcc puts in its place for short memory, rep stos, takes as long to start as the lanes of a chunk need.
 */
static __attribute__((noinline)) void clear(void *memory, size_t bytes) { memset(memory, 0, bytes); }

/* Without parts the other three are left as they are, which shows in cache. */
FM_INLINE void clear_lanes(fm_lanes *lanes, int used, bool parts) {
  const size_t bytes = (size_t)used * sizeof(double);
  clear(lanes->mid, bytes);
  if (parts) {
    clear(lanes->big, bytes);
    clear(lanes->small, bytes);
    clear(lanes->rest, bytes);
  }
}

/* PACGen's lanes as fm_pacgen_product takes them. */
FM_INLINE void start_products(fm_lanes *lanes, int used) {
  for (int l = 0; l < used; l++) {
    lanes->big[l] = lanes->small[l] = 1.0;
  }
}

/* False, and nothing done, if a lane's products left the normal numbers. */
FM_INLINE bool normalise_products(fm_lanes *lanes, int used) {
  uint64_t odd = 0; /* wide as the numbers: a bool kept this loop from being vectorised */
  for (int l = 0; l < used; l++) {
    const fm_sum sum = {lanes->mid[l], lanes->big[l], lanes->small[l], lanes->rest[l]};
    odd |= fm_pacgen_normal(&sum) ? 0 : 1;
  }
  for (int l = 0; l < used && odd == 0; l++) {
    fm_sum sum = {lanes->mid[l], lanes->big[l], lanes->small[l], lanes->rest[l]};
    fm_pacgen_normalise(&sum);
    lanes->mid[l] = sum.mid;
    lanes->big[l] = sum.big;
    lanes->small[l] = sum.small;
  }
  return odd == 0;
}
static_assert(FM_CHUNK / FM_LANES == FM_PRODUCTS, "fm_pacgen_normalise");

FM_INLINE void copy_lanes(fm_lanes *to, int at, const fm_lanes *from, int first, int count, bool parts) {
  const size_t bytes = (size_t)count * sizeof(double);
  memcpy(to->mid + at, from->mid + first, bytes);
  if (parts) {
    memcpy(to->big + at, from->big + first, bytes);
    memcpy(to->small + at, from->small + first, bytes);
    memcpy(to->rest + at, from->rest + first, bytes);
  }
}

#ifdef __FMA__
/* float32 gradients that are read next. */
typedef struct fm_ahead {
  const float *next, *end;
} fm_ahead;

/* Those behind element `at` of a row: its own or, at its end, the next row's. */
static fm_ahead gradients_behind(const fm_list *list, int64_t r, int64_t at) {
  const fm_row *row = &list->rows[r];
  fm_ahead ahead = {NULL, NULL};
  if (at == row->numel) {
    at = 0;
    row = r + 1 < list->count ? row + 1 : NULL;
  }
  if (row != NULL && row->operand[FM_GRAD].dtype == FM_F32 && row->operand[FM_GRAD].layout == NULL) {
    const float *data = (const float *)(const void *)row->operand[FM_GRAD].data;
    ahead.next = data + at;
    ahead.end = data + row->numel;
  }
  return ahead;
}

/* Fills the lanes with sums of squares: `strips` times FM_LANES elements. gcc would convert eight floats at a time, in
 * halves of which one has to be moved first. What is asked for goes to the first cache although half of it is in use:
 * from the second it comes too late (docs/performance.md). */
static void square_lanes(double *lanes, const float *elements, int64_t strips, fm_ahead ahead) {
  enum { WIDTH = 4, SUMS = FM_LANE_GROUP / WIDTH, LINE = FM_CACHE_LINE / (int)sizeof(float) };
  for (int first = 0; first < FM_LANES; first += FM_LANE_GROUP) {
    __m256d sum[SUMS];
    for (int s = 0; s < SUMS; s++) {
      sum[s] = _mm256_setzero_pd();
    }
    for (int64_t strip = 0; strip < strips; strip++) {
      const float *at = elements + strip * FM_LANES + first;
      for (int line = 0; line < FM_LANE_GROUP / LINE && ahead.next < ahead.end; line++, ahead.next += LINE) {
        __builtin_prefetch(ahead.next);
      }
#pragma GCC unroll 8
      for (int s = 0; s < SUMS; s++) {
        const __m256d x = _mm256_cvtps_pd(_mm_loadu_ps(at + s * WIDTH));
        sum[s] = _mm256_fmadd_pd(x, x, sum[s]); /* a float's square is exact: one rounding */
      }
    }
    for (int s = 0; s < SUMS; s++) {
      _mm256_storeu_pd(lanes + first + s * WIDTH, sum[s]);
    }
  }
}
#endif

/* Halves on halves. */
FM_INLINE fm_sum fold_lanes(fm_lanes *lanes, int used, int term, bool fp64) {
  const bool parts = fm_has_parts(term, fp64);
  for (int half = used / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; l++) {
      const int k = l + half;
      if (parts) {
        const fm_sum a = {lanes->mid[l], lanes->big[l], lanes->small[l], lanes->rest[l]};
        const fm_sum b = {lanes->mid[k], lanes->big[k], lanes->small[k], lanes->rest[k]};
        const fm_sum sum = fm_fold(a, b, term);
        lanes->mid[l] = sum.mid;
        lanes->big[l] = sum.big;
        lanes->small[l] = sum.small;
        lanes->rest[l] = sum.rest;
      } else {
        const double a = lanes->mid[l], b = lanes->mid[k];
        lanes->mid[l] = term == FM_TERM_LARGEST ? fm_larger_f64(a, b) : a + b;
      }
    }
  }
  const fm_sum sum = {lanes->mid[0], parts ? lanes->big[0] : 0.0, parts ? lanes->small[0] : 0.0,
                      parts ? lanes->rest[0] : 0.0};
  return sum;
}

/* ---- inner products: a vector of doubles is a few lanes of each sum ---- */

#if defined(__AVX512F__)
enum { FM_PACK = 8 };
#elif defined(__AVX__)
enum { FM_PACK = 4 };
#else
enum { FM_PACK = 2 };
#endif
typedef double fm_pack __attribute__((vector_size(FM_PACK * sizeof(double))));

typedef struct fm_products {
  double sum[FM_DOT_SUMS][FM_LANES];
} fm_products;

/* Halves on halves, as fold_lanes. Plane p goes to partials[p * apart]. */
FM_INLINE void fold_products(fm_products *products, int used, int lists, fm_sum *partials, int64_t apart) {
  const int count = fm_dot_sums(lists);
  for (int pair = 0; pair < count; pair++) {
    double *sum = products->sum[pair];
    for (int half = used / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; l++) {
        sum[l] += sum[l + half];
      }
    }
  }
  for (int plane = 0; plane < fm_dot_planes(lists); plane++) {
    double four[FM_DOT_PLANE] = {0.0};
    for (int j = 0; j < FM_DOT_PLANE && plane * FM_DOT_PLANE + j < count; j++) {
      four[j] = products->sum[plane * FM_DOT_PLANE + j][0];
    }
    partials[plane * apart] = (fm_sum){four[0], four[1], four[2], four[3]};
  }
}

/* The options of one tensor: the call's, or `own` with numbers of its own. */
FM_INLINE const fm_options *options_of(const fm_job *job, int64_t r, fm_options *own) {
  if (job->scalars == NULL || !(job->scalars->each || job->scalars->each_key)) {
    return job->options;
  }
  *own = *job->options;
  fm_read_own_scalars(own, job->scalars, r);
  return own;
}

/* What an update copies besides, to the backup or from it. */
FM_INLINE const fm_view *copy_source(const fm_row *row, fm_shape shape) {
  return &row->operand[shape.copy == FM_COPY_TO_BACKUP ? FM_PARAM : FM_OLD];
}

FM_INLINE const fm_view *copy_target(const fm_row *row, fm_shape shape) {
  return &row->operand[shape.copy == FM_COPY_TO_BACKUP ? FM_OLD : FM_PARAM];
}

/* ---- the same loops for float and double arithmetic ---- */

#define FM_REAL float
#define FM_NAME(name) name##_f32
#define FM_NATIVE FM_F32
#include "kernels_real.h"
#undef FM_REAL
#undef FM_NAME
#undef FM_NATIVE

#define FM_REAL double
#define FM_NAME(name) name##_f64
#define FM_NATIVE FM_F64
#include "kernels_real.h"
#undef FM_REAL
#undef FM_NAME
#undef FM_NATIVE

/* ---- the kernels: a loop over rows ---- */

#define FM_KERNEL(name)                                                                \
  static void name##_row(const fm_job *job, int64_t row, int64_t begin, int64_t end) { \
    if (job->list->rows[row].fp64) {                                                   \
      name##_f64(job, row, begin, end);                                                \
    } else {                                                                           \
      name##_f32(job, row, begin, end);                                                \
    }                                                                                  \
  }                                                                                    \
  static void name(const fm_job *job, int64_t chunk_begin, int64_t chunk_end) {        \
    for_rows(job, chunk_begin, chunk_end, name##_row);                                 \
  }
#define FM_REDUCTION_KERNEL(term, name) FM_KERNEL(name)
#define FM_UPDATE_KERNEL(update, name, ...) FM_KERNEL(update_##name)
FM_REDUCTIONS(FM_REDUCTION_KERNEL)
FM_KERNEL(dot)
FM_UPDATES(FM_UPDATE_KERNEL)

const fm_kernels FM_KERNELS_NAME = {
    .isa = FM_ISA_NUMBER,
#define FM_UPDATE_ENTRY(update, name, ...) [(update)] = update_##name,
#define FM_REDUCTION_ENTRY(term, name) [(term)] = (name),
    .update = {FM_UPDATES(FM_UPDATE_ENTRY)},
    .reduce = {FM_REDUCTIONS(FM_REDUCTION_ENTRY)},
    .dot = dot,
};
