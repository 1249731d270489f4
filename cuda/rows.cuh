/* The CUDA grid over the formulas of csrc/math: the same chunks, lanes and trees as csrc/cpu/kernels.c, hence the same
 * bits. No atomics; nothing depends on alignment or on the number of blocks.
 *
 * A launch carries its table of tensors in the kernel's arguments, so a pass over FM_CUDA_ROWS tensors is one launch
 * and no table is copied to the device. Rows of nothing but aligned float32 have kernels of their own, plain.cuh; for
 * all others, general.cuh, a thread takes 8 elements at a time (4 in float64 arithmetic), by loads of 128 bits: one for
 * a 16-bit type, two for float32. */
#ifndef FM_ROWS_CUH
#define FM_ROWS_CUH

#include "fm_cuda.h"
#include "launch.h"

enum {
  FM_CUDA_WARP = 32,
  FM_CUDA_SPAN = 8,       /* elements of a thread: lanes 8 t to 8 t + 7 of a chunk, so a warp has all 256 */
  FM_CUDA_THREADS = 256,  /* element-wise kernels: two spans a thread and chunk */
  FM_CUDA_CHUNKS = 4,     /* what sums over a chunk: warps of a block, one chunk each */
  FM_CUDA_FOLD = 1024,    /* partial results that one block folds: ten levels of the tree */
  FM_CUDA_WARP_FOLD = 64, /* of them a warp's, two a thread */
  FM_CUDA_FOLD_WARPS = FM_CUDA_FOLD / FM_CUDA_WARP_FOLD,
  FM_CUDA_BLOCKS_PER_SM = 8, /* enough to cover latency; a block then walks on through the chunks */
  FM_CUDA_WAVES = 16,        /* of plain.cuh: blocks per processor at least, if there are so many chunks, */
  FM_CUDA_RUN = 8            /* and what a block takes at most */
};
static_assert(FM_LANES == FM_CUDA_WARP * FM_CUDA_SPAN, "a warp has all lanes");

typedef struct fm_cuda_row {
  char *data[FM_MAX_OPERANDS];
  int64_t numel, first_chunk;
  fm_traits traits;
  uint32_t index; /* in the list: the tensor's stream of random numbers */
  uint8_t dtype[FM_MAX_OPERANDS];
  bool fp64;
} fm_cuda_row;

/* A tensor that is not dense goes alone, and its layouts lie where the other rows would. */
typedef struct fm_cuda_strided {
  fm_cuda_row row;
  fm_layout layout[FM_MAX_OPERANDS]; /* dims 0: dense */
} fm_cuda_strided;

/* One launch: a run of dense rows, or a single row with its layouts. */
typedef struct fm_cuda_launch {
  fm_options options;
  fm_scalars scalars;
  fm_sum *partials;
  int64_t chunk_begin, chunk_end;
  int32_t rows;
  bool strided, plain; /* a row with layouts; none but rows for plain.cuh */
  union {
    fm_cuda_row row[FM_CUDA_ROWS];
    fm_cuda_strided alone;
  };
} fm_cuda_launch;

/* What a kernel's arguments have room for since sm_70, less what a kernel takes besides. An operand more is 8 bytes a
 * row. */
enum { FM_CUDA_ARGUMENTS = 32764 - 64, FM_CUDA_FREE = FM_CUDA_ARGUMENTS - (int)sizeof(fm_cuda_launch) };
static_assert(FM_CUDA_FREE >= 0, "FM_CUDA_ROWS tensors are no longer one launch; see docs/traffic.md");

#define FM_DEVICE static __device__ __forceinline__

/* ---- the bits of 4 or 8 elements of one type in registers ---- */

struct __align__(16) fm_vec16 {
  uint32_t word[4];
};
struct fm_bits {
  uint32_t word[8];
};

FM_DEVICE int fm_element_size(int dtype) { return dtype == FM_F64 ? 8 : dtype == FM_F32 ? 4 : 2; }

FM_DEVICE char *fm_element(const fm_cuda_launch *l, const fm_cuda_row *row, int k, int64_t i) {
  int64_t offset = i;
  if (l->strided && l->alone.layout[k].dims > 0) {
    offset = 0;
    for (int d = l->alone.layout[k].dims - 1; d >= 0; d--) {
      offset += i % l->alone.layout[k].size[d] * l->alone.layout[k].stride[d];
      i /= l->alone.layout[k].size[d];
    }
  }
  return row->data[k] + offset * fm_element_size(row->dtype[k]);
}

/* Whether a vector, of 16 or 32 bytes, lies together on a boundary of 16. */
FM_DEVICE bool fm_is_vector(const fm_cuda_launch *l, int k, const char *at, bool whole) {
  return whole && !(l->strided && l->alone.layout[k].dims > 0) && (uintptr_t)at % 16 == 0;
}

/* The word that element j of this size begins in. */
FM_DEVICE int fm_word_of(int size, int j) { return size == 2 ? j / 2 : size == 4 ? j : 2 * j; }

/* `count` of WIDTH elements of operand k, from element i on; zeros for the others. What is no vector goes element by
 * element through one text, which chooses its word among eight: an index would send them to local memory, and a text
 * for each took nvcc minutes. */
template <int WIDTH>
FM_DEVICE fm_bits fm_load(const fm_cuda_launch *l, const fm_cuda_row *row, int k, int64_t i, int count) {
  fm_bits q = {{0, 0, 0, 0, 0, 0, 0, 0}};
  const int size = fm_element_size(row->dtype[k]);
  const char *at = fm_element(l, row, k, i);
  if (fm_is_vector(l, k, at, count == WIDTH)) {
    const fm_vec16 v = *(const fm_vec16 *)at;
    const fm_vec16 next = WIDTH * size == 32 ? *(const fm_vec16 *)(at + 16) : v;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      q.word[j] = v.word[j];
      q.word[4 + j] = next.word[j];
    }
    return q;
  }
#pragma unroll 1
  for (int j = 0; j < count; j++) {
    const char *element = fm_element(l, row, k, i + j);
    const int begin = fm_word_of(size, j);
    const uint32_t low = size == 2 ? (uint32_t)*(const uint16_t *)element << 16 * (j % 2) : *(const uint32_t *)element;
    const uint32_t high = size == 8 ? ((const uint32_t *)element)[1] : 0;
#pragma unroll
    for (int w = 0; w < 8; w++) {
      q.word[w] |= w == begin ? low : w == begin + 1 ? high : 0;
    }
  }
  return q;
}

template <int WIDTH>
FM_DEVICE void fm_store(const fm_cuda_launch *l, const fm_cuda_row *row, int k, int64_t i, int count,
                        const fm_bits &q) {
  const int size = fm_element_size(row->dtype[k]);
  char *at = fm_element(l, row, k, i);
  if (fm_is_vector(l, k, at, count == WIDTH)) {
    const fm_vec16 v = {{q.word[0], q.word[1], q.word[2], q.word[3]}};
    *(fm_vec16 *)at = v;
    if (WIDTH * size == 32) {
      const fm_vec16 next = {{q.word[4], q.word[5], q.word[6], q.word[7]}};
      *(fm_vec16 *)(at + 16) = next;
    }
    return;
  }
  fm_bits rest = q; /* moves down as its first word is stored */
#pragma unroll 1
  for (int j = 0; j < count; j++) {
    char *element = fm_element(l, row, k, i + j);
    if (size == 2) {
      *(uint16_t *)element = (uint16_t)(rest.word[0] >> 16 * (j % 2));
    } else {
      ((uint32_t *)element)[0] = rest.word[0];
      if (size == 8) {
        ((uint32_t *)element)[1] = rest.word[1];
      }
    }
    const int step = size == 2 ? j % 2 : size / 4;
#pragma unroll
    for (int w = 0; w < 8; w++) {
      rest.word[w] = step == 1 ? rest.word[(w + 1) % 8] : step == 2 ? rest.word[(w + 2) % 8] : rest.word[w];
    }
  }
}

/* ---- walking the chunks of a launch ---- */

FM_DEVICE const fm_cuda_row *fm_row_of(const fm_cuda_launch *l, int64_t chunk) {
  int low = 0, high = l->rows; /* row[low].first_chunk <= chunk < row[high].first_chunk */
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (l->row[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return &l->row[low];
}

FM_DEVICE int64_t fm_chunk_size(const fm_cuda_row *row, int64_t start) {
  return row->numel - start < FM_CHUNK ? row->numel - start : FM_CHUNK;
}

FM_DEVICE fm_sum fm_shuffle_down(fm_sum s, unsigned by, bool parts) {
  fm_sum t = s;
  t.mid = __shfl_down_sync(0xffffffffu, s.mid, by);
  if (parts) {
    t.big = __shfl_down_sync(0xffffffffu, s.big, by);
    t.small = __shfl_down_sync(0xffffffffu, s.small, by);
    t.rest = __shfl_down_sync(0xffffffffu, s.rest, by);
  }
  return t;
}

/* The lanes of a chunk in halves on halves, as fold_lanes in csrc/cpu/kernels.c: thread t of a warp has lanes 8 t to
 * 8 t + 7. The sum is thread 0's. */
template <int TERM, bool FP64>
FM_DEVICE fm_sum fm_fold_lanes(fm_sum *lanes) {
#pragma unroll
  for (int j = 0; j < FM_CUDA_SPAN; j++) {
#pragma unroll 1
    for (unsigned by = 16; by > 0; by /= 2) {
      lanes[j] = fm_fold(lanes[j], fm_shuffle_down(lanes[j], by, fm_has_parts(TERM, FP64)), TERM);
    }
  }
#pragma unroll
  for (int half = FM_CUDA_SPAN / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; j++) {
      lanes[j] = fm_fold(lanes[j], lanes[j + half], TERM);
    }
  }
  return lanes[0];
}

FM_DEVICE unsigned fm_present_in(const fm_cuda_row *row) {
  unsigned present = 0;
#pragma unroll
  for (int k = 0; k < FM_MAX_OPERANDS; k++) {
    present |= row->data[k] != NULL ? FM_BIT(k) : 0;
  }
  return present;
}

template <fm_update UPDATE>
struct fm_columns_of;
#define FM_COLUMNS_OF(update, name, reads, writes, kind, optional, tally, copy) \
  template <>                                                                   \
  struct fm_columns_of<update> {                                                \
    enum { term = (tally), forms = (kind) };                                    \
  };
FM_UPDATES(FM_COLUMNS_OF)
#undef FM_COLUMNS_OF

/* ---- the same loops for float and double arithmetic ---- */

#define FM_REAL float
#define FM_NAME(name) name##_f32
#define FM_NATIVE FM_F32
#include "general.cuh"
#undef FM_REAL
#undef FM_NAME
#undef FM_NATIVE

#define FM_REAL double
#define FM_NAME(name) name##_f64
#define FM_NATIVE FM_F64
#include "general.cuh"
#undef FM_REAL
#undef FM_NAME
#undef FM_NATIVE

#include "plain.cuh"

#endif
