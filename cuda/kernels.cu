/* The CUDA grid over the formulas of csrc/fm_math.h: the same chunks, lanes and trees as csrc/kernels.c, hence the same
 * bits. No atomics; nothing depends on alignment or on the number of blocks.
 *
 * A launch carries its table of tensors in the kernel's arguments (32,764 bytes since sm_70), so a pass over 300
 * tensors is one launch and no table is copied to the device. A quad of 4 elements is what a thread moves at a time: 16
 * bytes of float32, 32 of float64, 8 of a 16-bit type. */
#include "fm_cuda.h"
#include "launch.h"

enum {
  FM_CUDA_ROWS = 300,
  FM_CUDA_WARP = 32,
  FM_CUDA_THREADS = 256,    /* element-wise kernels: 4 quads a thread and chunk */
  FM_CUDA_CHUNKS = 4,       /* reductions: warps of a block, one chunk each */
  FM_CUDA_FOLD = 1024,      /* partial results that one block folds: ten levels of the tree */
  FM_CUDA_BLOCKS_PER_SM = 8 /* enough to cover latency; a block then walks on through the chunks */
};

typedef struct fm_cuda_row {
  char *data[FM_MAX_OPERANDS];
  int64_t numel, first_chunk;
  double bias_correction1, root_bias_correction;
  uint32_t index; /* in the list: the tensor's stream of random numbers */
  uint8_t dtype[FM_MAX_OPERANDS];
  uint8_t scaling;
  bool wide;
} fm_cuda_row;

/* One launch: a run of dense rows, or a single row with its layouts. */
typedef struct fm_cuda_launch {
  fm_options options;
  fm_scalars scalars;
  fm_sum *partials;
  int64_t chunk_begin, chunk_end;
  int32_t rows;
  bool strided;
  fm_layout layout[FM_MAX_OPERANDS]; /* dims 0: dense */
  fm_cuda_row row[FM_CUDA_ROWS];
} fm_cuda_launch;
static_assert(sizeof(fm_cuda_launch) <= 32764 - 64, "kernel arguments");

#define FM_DEVICE static __device__ __forceinline__

/* ---- quads: four elements of one type in registers ---- */

struct __align__(8) fm_vec8 {
  uint32_t word[2];
};
struct __align__(16) fm_vec16 {
  uint32_t word[4];
};
struct fm_quad_bits {
  uint32_t word[8]; /* float64 fills it, float32 half, a 16-bit type a quarter */
};

/* Words of a quad of this type, which is also the size of one element in halves of a word. */
FM_DEVICE int fm_quad_words(int dtype) { return dtype == FM_F64 ? 8 : dtype == FM_F32 ? 4 : 2; }

FM_DEVICE char *fm_element(const fm_cuda_launch *l, const fm_cuda_row *row, int k, int64_t i) {
  int64_t offset = i;
  if (l->strided && l->layout[k].dims > 0) {
    offset = 0;
    for (int d = l->layout[k].dims - 1; d >= 0; d--) {
      offset += i % l->layout[k].size[d] * l->layout[k].stride[d];
      i /= l->layout[k].size[d];
    }
  }
  return row->data[k] + offset * fm_quad_words(row->dtype[k]);
}

FM_DEVICE bool fm_is_vector(const fm_cuda_launch *l, int k, const char *at, int words, int count) {
  return count == 4 && !(l->strided && l->layout[k].dims > 0) && (uintptr_t)at % (words == 2 ? 8 : 16) == 0;
}

FM_DEVICE fm_quad_bits fm_load_quad(const fm_cuda_launch *l, const fm_cuda_row *row, int k, int64_t i, int count) {
  fm_quad_bits q = {{0, 0, 0, 0, 0, 0, 0, 0}};
  const int words = fm_quad_words(row->dtype[k]);
  const char *at = fm_element(l, row, k, i);
  if (fm_is_vector(l, k, at, words, count)) {
    if (words == 2) {
      const fm_vec8 v = *(const fm_vec8 *)at;
      q.word[0] = v.word[0];
      q.word[1] = v.word[1];
    } else {
      const fm_vec16 v = *(const fm_vec16 *)at;
      const fm_vec16 next = words == 8 ? *(const fm_vec16 *)(at + 16) : v;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        q.word[j] = v.word[j];
        q.word[4 + j] = next.word[j];
      }
    }
    return q;
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    if (j < count) {
      const char *element = fm_element(l, row, k, i + j);
      if (words == 2) {
        q.word[j / 2] |= (uint32_t)*(const uint16_t *)element << 16 * (j % 2);
      } else if (words == 4) {
        q.word[j] = *(const uint32_t *)element;
      } else {
        q.word[2 * j] = ((const uint32_t *)element)[0];
        q.word[2 * j + 1] = ((const uint32_t *)element)[1];
      }
    }
  }
  return q;
}

FM_DEVICE void fm_store_quad(const fm_cuda_launch *l, const fm_cuda_row *row, int k, int64_t i, int count,
                             const fm_quad_bits &q) {
  const int words = fm_quad_words(row->dtype[k]);
  char *at = fm_element(l, row, k, i);
  if (fm_is_vector(l, k, at, words, count)) {
    if (words == 2) {
      const fm_vec8 v = {{q.word[0], q.word[1]}};
      *(fm_vec8 *)at = v;
    } else {
      const fm_vec16 v = {{q.word[0], q.word[1], q.word[2], q.word[3]}};
      *(fm_vec16 *)at = v;
      if (words == 8) {
        const fm_vec16 next = {{q.word[4], q.word[5], q.word[6], q.word[7]}};
        *(fm_vec16 *)(at + 16) = next;
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    if (j < count) {
      char *element = fm_element(l, row, k, i + j);
      if (words == 2) {
        *(uint16_t *)element = (uint16_t)(q.word[j / 2] >> 16 * (j % 2));
      } else if (words == 4) {
        *(uint32_t *)element = q.word[j];
      } else {
        ((uint32_t *)element)[0] = q.word[2 * j];
        ((uint32_t *)element)[1] = q.word[2 * j + 1];
      }
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

FM_DEVICE fm_sum fm_shuffle_down(fm_sum s, unsigned by) {
  fm_sum t;
  t.mid = __shfl_down_sync(0xffffffffu, s.mid, by);
  t.big = __shfl_down_sync(0xffffffffu, s.big, by);
  t.small = __shfl_down_sync(0xffffffffu, s.small, by);
  return t;
}

/* ---- the same loops for float and double arithmetic ---- */

#define FM_REAL float
#define FM_NAME(name) name##_f32
#define FM_NATIVE FM_F32
#include "kernels_real.cuh"
#undef FM_REAL
#undef FM_NAME
#undef FM_NATIVE

#define FM_REAL double
#define FM_NAME(name) name##_f64
#define FM_NATIVE FM_F64
#include "kernels_real.cuh"
#undef FM_REAL
#undef FM_NAME
#undef FM_NATIVE

/* ---- kernels ---- */

/* One warp for each chunk: thread t owns lanes 4t to 4t + 3, which fold in halves by shuffles. */
template <int TERM>
__global__ void fm_reduce_kernel(FM_KERNEL_ARGUMENT fm_cuda_launch l) {
  fm_options o = l.options;
  fm_read_scalars(&o, &l.scalars);
  const int warp = (int)threadIdx.x / FM_CUDA_WARP, lane = (int)threadIdx.x % FM_CUDA_WARP;
  const int64_t stride = (int64_t)gridDim.x * FM_CUDA_CHUNKS;
  for (int64_t c = l.chunk_begin + (int64_t)blockIdx.x * FM_CUDA_CHUNKS + warp; c < l.chunk_end; c += stride) {
    const fm_cuda_row *row = fm_row_of(&l, c);
    const int64_t start = (c - row->first_chunk) * FM_CHUNK;
    const fm_sum sum = row->wide ? fm_reduce_chunk_f64<TERM>(&l, row, start, lane, &o)
                                 : fm_reduce_chunk_f32<TERM>(&l, row, start, lane, &o);
    if (lane == 0) {
      l.partials[c] = sum;
    }
  }
}

enum fm_finish { FM_FINISH_NONE, FM_FINISH_ROOT, FM_FINISH_SUM, FM_FINISH_POWERS };

/* Each block folds FM_CUDA_FOLD neighbours by ten levels of the tree; the last launch, of one block, ends with the
 * operator's value. An odd element out moves up unpaired, as in core.c. */
__global__ void fm_fold_kernel(const fm_sum *from, int64_t count, fm_sum *to, int term, fm_finish finish, double q,
                               double *result) {
  __shared__ fm_sum held[FM_CUDA_FOLD];
  const int64_t base = (int64_t)blockIdx.x * FM_CUDA_FOLD;
  const int n = (int)(count - base < FM_CUDA_FOLD ? count - base : FM_CUDA_FOLD);
  for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
    held[i] = from[base + i];
  }
  __syncthreads();
  for (int step = 1; step < FM_CUDA_FOLD; step *= 2) {
    const int i = 2 * step * (int)threadIdx.x;
    if (i + step < n) {
      held[i] = fm_fold(held[i], held[i + step], term);
    }
    __syncthreads();
  }
  if (threadIdx.x != 0) {
    return;
  }
  const fm_sum none = {0.0, 0.0, 0.0};
  const fm_sum total = n > 0 ? held[0] : none;
  if (finish == FM_FINISH_NONE) {
    to[blockIdx.x] = total;
  } else if (finish == FM_FINISH_ROOT) {
    *result = fm_sum_root(total);
  } else if (finish == FM_FINISH_SUM) {
    *result = total.mid;
  } else if (!fm_norm_is_largest(*result, q)) { /* it holds the largest from the pass before */
    *result = fm_norm_from_powers(*result, total.mid, q);
  }
}

enum fm_update { FM_UPDATE_ASCEND, FM_UPDATE_RESTORE, FM_UPDATE_SGD, FM_UPDATE_ADAM };

/* One block for each chunk, a quad for each thread at a time. */
template <fm_update UPDATE>
__global__ void fm_update_kernel(FM_KERNEL_ARGUMENT fm_cuda_launch l) {
  fm_options o = l.options;
  fm_read_scalars(&o, &l.scalars);
  for (int64_t c = l.chunk_begin + blockIdx.x; c < l.chunk_end; c += gridDim.x) {
    const fm_cuda_row *row = fm_row_of(&l, c);
    const int64_t start = (c - row->first_chunk) * FM_CHUNK, n = fm_chunk_size(row, start);
    for (int64_t i = 4 * (int64_t)threadIdx.x; i < n; i += 4 * (int64_t)blockDim.x) {
      const int count = (int)(n - i < 4 ? n - i : 4);
      if (UPDATE == FM_UPDATE_RESTORE) {
        fm_store_quad(&l, row, FM_STEP_PARAM, start + i, count, fm_load_quad(&l, row, FM_STEP_OLD, start + i, count));
      } else if (UPDATE == FM_UPDATE_ASCEND) {
        row->wide ? fm_ascend_quad_f64(&l, row, start + i, count, &o)
                  : fm_ascend_quad_f32(&l, row, start + i, count, &o);
      } else if (UPDATE == FM_UPDATE_SGD) {
        row->wide ? fm_sgd_quad_f64(&l, row, start + i, count, &o) : fm_sgd_quad_f32(&l, row, start + i, count, &o);
      } else {
        row->wide ? fm_adam_quad_f64(&l, row, start + i, count, &o) : fm_adam_quad_f32(&l, row, start + i, count, &o);
      }
    }
  }
}

/* ---- launches ---- */

typedef void fm_launch_fn(const fm_cuda_launch &l, void *stream);

static int64_t blocks_for(int64_t blocks) {
  const int64_t most = (int64_t)fm_processors() * FM_CUDA_BLOCKS_PER_SM;
  return blocks < most ? blocks : most;
}

template <int TERM>
static void launch_reduce(const fm_cuda_launch &l, void *stream) {
  const int64_t blocks = (l.chunk_end - l.chunk_begin + FM_CUDA_CHUNKS - 1) / FM_CUDA_CHUNKS;
  FM_LAUNCH(fm_reduce_kernel<TERM>, blocks_for(blocks), FM_CUDA_CHUNKS * FM_CUDA_WARP, stream, l);
}

template <fm_update UPDATE>
static void launch_update(const fm_cuda_launch &l, void *stream) {
  FM_LAUNCH(fm_update_kernel<UPDATE>, blocks_for(l.chunk_end - l.chunk_begin), FM_CUDA_THREADS, stream, l);
}

static void flush(fm_cuda_launch *l, fm_launch_fn *launch, void *stream) {
  if (l->rows > 0 && l->chunk_end > l->chunk_begin) {
    launch(*l, stream);
  }
  l->rows = 0;
  l->strided = false;
}

static bool is_strided(const fm_row *row) {
  for (int k = 0; k < FM_MAX_OPERANDS; k++) {
    if (row->operand[k].layout != NULL) {
      return true;
    }
  }
  return false;
}

static void add_row(fm_cuda_launch *l, const fm_list *list, int64_t r) {
  const fm_row *from = &list->rows[r];
  fm_cuda_row *row = &l->row[l->rows];
  for (int k = 0; k < FM_MAX_OPERANDS; k++) {
    row->data[k] = from->operand[k].data;
    row->dtype[k] = (uint8_t)from->operand[k].dtype;
  }
  row->numel = from->operand[0].numel;
  row->first_chunk = list->first_chunk[r];
  row->bias_correction1 = from->bias_correction1;
  row->root_bias_correction = from->root_bias_correction;
  row->index = (uint32_t)r;
  row->scaling = (uint8_t)from->scaling;
  row->wide = from->wide;
  l->chunk_begin = l->rows == 0 ? row->first_chunk : l->chunk_begin;
  l->chunk_end = list->first_chunk[r + 1];
  l->rows++;
}

/* Dense rows go together, up to a full table; a row with a layout goes alone. */
static void launch_all(const fm_list *list, const fm_options *options, const fm_scalars *scalars, fm_launch_fn *launch,
                       void *stream) {
  fm_cuda_launch l;
  l.options = *options;
  l.scalars = *scalars;
  l.partials = list->partials;
  l.rows = 0;
  l.strided = false;
  for (int64_t r = 0; r < list->count; r++) {
    const bool strided = is_strided(&list->rows[r]);
    if (strided || l.rows == FM_CUDA_ROWS) {
      flush(&l, launch, stream);
    }
    add_row(&l, list, r);
    if (strided) {
      for (int k = 0; k < FM_MAX_OPERANDS; k++) {
        const fm_layout dense = {0, {0}, {0}};
        l.layout[k] = list->rows[r].operand[k].layout != NULL ? *list->rows[r].operand[k].layout : dense;
      }
      l.strided = true;
      flush(&l, launch, stream);
    }
  }
  flush(&l, launch, stream);
}

extern "C" int64_t fm_cuda_partials(int64_t chunks) { return chunks + chunks / (FM_CUDA_FOLD - 1) + 8; }

static void fold(const fm_list *list, int term, fm_finish finish, double q, double *result, void *stream) {
  const fm_sum *from = list->partials;
  int64_t count = list->first_chunk[list->count];
  fm_sum *to = list->partials + count;
  for (; count > FM_CUDA_FOLD; count = (count + FM_CUDA_FOLD - 1) / FM_CUDA_FOLD) {
    const int64_t blocks = (count + FM_CUDA_FOLD - 1) / FM_CUDA_FOLD;
    FM_LAUNCH(fm_fold_kernel, blocks, FM_CUDA_FOLD / 2, stream, from, count, to, term, FM_FINISH_NONE, q, result);
    from = to;
    to += blocks;
  }
  FM_LAUNCH(fm_fold_kernel, 1, FM_CUDA_FOLD / 2, stream, from, count, to, term, finish, q, result);
}

extern "C" const char *fm_cuda_norm(const fm_list *list, const fm_options *options, double *result, void *stream) {
  fm_scalars scalars = {NULL, NULL, NULL, NULL};
  if (options->q == 2.0) {
    launch_all(list, options, &scalars, launch_reduce<FM_TERM_SQUARE>, stream);
    fold(list, FM_TERM_SQUARE, FM_FINISH_ROOT, options->q, result, stream);
    return fm_launch_error();
  }
  launch_all(list, options, &scalars, launch_reduce<FM_TERM_LARGEST>, stream);
  fold(list, FM_TERM_LARGEST, FM_FINISH_SUM, options->q, result, stream);
  if (!isinf(options->q)) {
    scalars.norm = result;
    launch_all(list, options, &scalars, launch_reduce<FM_TERM_POWER>, stream);
    fold(list, FM_TERM_POWER, FM_FINISH_POWERS, options->q, result, stream);
  }
  return fm_launch_error();
}

extern "C" const char *fm_cuda_ties(const fm_list *list, const fm_options *options, const fm_scalars *scalars,
                                    double *result, void *stream) {
  launch_all(list, options, scalars, launch_reduce<FM_TERM_TIES>, stream);
  fold(list, FM_TERM_TIES, FM_FINISH_SUM, options->q, result, stream);
  return fm_launch_error();
}

#define FM_CUDA_UPDATE(name, update)                                                                     \
  extern "C" const char *name(const fm_list *list, const fm_options *options, const fm_scalars *scalars, \
                              void *stream) {                                                            \
    launch_all(list, options, scalars, launch_update<update>, stream);                                   \
    return fm_launch_error();                                                                            \
  }
FM_CUDA_UPDATE(fm_cuda_sam_ascend, FM_UPDATE_ASCEND)
FM_CUDA_UPDATE(fm_cuda_restore, FM_UPDATE_RESTORE)
FM_CUDA_UPDATE(fm_cuda_restore_sgd, FM_UPDATE_SGD)
FM_CUDA_UPDATE(fm_cuda_restore_adam, FM_UPDATE_ADAM)

extern "C" bool fm_cuda_ready(void) {
#ifdef FM_EMULATE
  return true;
#else
  int driver = 0, runtime = 0; /* without a driver cudaDriverGetVersion succeeds and reports 0 */
  return cudaDriverGetVersion(&driver) == cudaSuccess && cudaRuntimeGetVersion(&runtime) == cudaSuccess &&
         driver >= runtime;
#endif
}
