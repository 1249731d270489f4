/* The CUDA grid over the formulas of csrc/math: the same chunks, lanes and trees as csrc/cpu/kernels.c, hence
 * the same bits. No atomics; nothing depends on alignment or on the number of blocks.
 *
 * A launch carries its table of tensors in the kernel's arguments, so a pass over FM_CUDA_ROWS tensors is one launch
 * and no table is copied to the device. A thread takes 8 elements at a time (4 in float64 arithmetic), by loads of 128
 * bits: one for a 16-bit type, two for float32. */
#include "fm_cuda.h"
#include "launch.h"

enum {
  FM_CUDA_WARP = 32,
  FM_CUDA_SPAN = 8,         /* elements of a thread: lanes 8 t to 8 t + 7 of a chunk, so a warp has all 256 */
  FM_CUDA_THREADS = 256,    /* element-wise kernels: two spans a thread and chunk */
  FM_CUDA_CHUNKS = 4,       /* what sums over a chunk: warps of a block, one chunk each */
  FM_CUDA_FOLD = 1024,      /* partial results that one block folds: ten levels of the tree */
  FM_CUDA_BLOCKS_PER_SM = 8 /* enough to cover latency; a block then walks on through the chunks */
};
static_assert(FM_LANES == FM_CUDA_WARP * FM_CUDA_SPAN, "a warp has all lanes");

typedef struct fm_cuda_row {
  char *data[FM_MAX_OPERANDS];
  int64_t numel, first_chunk;
  fm_traits traits;
  uint32_t index; /* in the list: the tensor's stream of random numbers */
  uint8_t dtype[FM_MAX_OPERANDS];
  bool wide;
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
  bool strided;
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
template <int TERM, bool WIDE>
FM_DEVICE fm_sum fm_fold_lanes(fm_sum *lanes) {
#pragma unroll
  for (int j = 0; j < FM_CUDA_SPAN; j++) {
#pragma unroll 1
    for (unsigned by = 16; by > 0; by /= 2) {
      lanes[j] = fm_fold(lanes[j], fm_shuffle_down(lanes[j], by, fm_has_parts(TERM, WIDE)), TERM);
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
struct fm_tally_of;
#define FM_TALLY_OF(update, name, reads, writes, forms, optional, tally, copy) \
  template <>                                                                  \
  struct fm_tally_of<update> {                                                 \
    enum { term = (tally) };                                                   \
  };
FM_UPDATES(FM_TALLY_OF)
#undef FM_TALLY_OF

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

/* One warp for each chunk. */
template <int TERM>
__global__ void fm_reduce_kernel(FM_KERNEL_ARGUMENT fm_cuda_launch l) {
  fm_options o = l.options;
  fm_read_scalars(&o, &l.scalars);
  const int warp = (int)threadIdx.x / FM_CUDA_WARP, thread = (int)threadIdx.x % FM_CUDA_WARP;
  const int64_t stride = (int64_t)gridDim.x * FM_CUDA_CHUNKS;
  for (int64_t c = l.chunk_begin + (int64_t)blockIdx.x * FM_CUDA_CHUNKS + warp; c < l.chunk_end; c += stride) {
    const fm_cuda_row *row = fm_row_of(&l, c);
    const int64_t start = (c - row->first_chunk) * FM_CHUNK;
    const fm_sum sum = row->wide ? fm_reduce_chunk_f64<TERM>(&l, row, start, thread, &o)
                                 : fm_reduce_chunk_f32<TERM>(&l, row, start, thread, &o);
    if (thread == 0) {
      l.partials[c] = sum;
    }
  }
}

/* One warp for each chunk and plane of its sums. The planes of a chunk go to neighbours, so that memory is read once.
 * Plane p of the partial results begins at p * apart. */
template <int LISTS>
__global__ void fm_dot_kernel(FM_KERNEL_ARGUMENT fm_cuda_launch l, int64_t apart) {
  const int planes = fm_dot_planes(LISTS);
  const int warp = (int)threadIdx.x / FM_CUDA_WARP, thread = (int)threadIdx.x % FM_CUDA_WARP;
  const int64_t tasks = (l.chunk_end - l.chunk_begin) * planes;
  for (int64_t task = (int64_t)blockIdx.x * FM_CUDA_CHUNKS + warp; task < tasks;
       task += (int64_t)gridDim.x * FM_CUDA_CHUNKS) {
    const int64_t c = l.chunk_begin + task / planes;
    const int plane = (int)(task % planes);
    const fm_cuda_row *row = fm_row_of(&l, c);
    const int64_t start = (c - row->first_chunk) * FM_CHUNK;
    const fm_sum sum = row->wide ? fm_dot_chunk_f64<LISTS>(&l, row, start, thread, plane)
                                 : fm_dot_chunk_f32<LISTS>(&l, row, start, thread, plane);
    if (thread == 0) {
      l.partials[plane * apart + c] = sum;
    }
  }
}

enum fm_finish { FM_FINISH_NONE, FM_FINISH_ROOT, FM_FINISH_SUMS, FM_FINISH_POWERS, FM_FINISH_PACGEN };

/* `numbers`: of the sums, how many are the result. */
FM_DEVICE void fm_finish_with(fm_finish finish, fm_sum total, double q, int numbers, double *result) {
  if (finish == FM_FINISH_ROOT) {
    *result = fm_sum_root(total);
  } else if (finish == FM_FINISH_SUMS) {
    const double sums[4] = {total.mid, total.big, total.small, total.rest};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (j < numbers) {
        result[j] = sums[j];
      }
    }
  } else if (finish == FM_FINISH_POWERS) {
    if (!fm_norm_is_largest(*result, q)) { /* it holds the largest from the pass before */
      *result = fm_norm_from_powers(*result, total.mid, q);
    }
  } else if (finish == FM_FINISH_PACGEN) {
    result[0] = fm_pacgen_of(total);
    result[1] = total.rest;
  }
}

/* Ten levels of the tree over n <= FM_CUDA_FOLD neighbours, in place; an odd element out moves up unpaired, as in
 * reduce.c. The sum is in held[0]. */
FM_DEVICE void fm_fold_block(fm_sum *held, int n, int term) {
  for (int step = 1; step < FM_CUDA_FOLD; step *= 2) {
    const int i = 2 * step * (int)threadIdx.x;
    if (i + step < n) {
      held[i] = fm_fold(held[i], held[i + step], term);
    }
    __syncthreads();
  }
}

/* Each block folds FM_CUDA_FOLD neighbours of a plane, of which there are several in dot; the last launch, of one block
 * a plane, ends with the operator's value. Plane p begins `apart` after plane p - 1 and has four of the `numbers`. */
__global__ void fm_fold_kernel(const fm_sum *from, int64_t count, fm_sum *to, int64_t apart, int term, fm_finish finish,
                               double q, int numbers, double *result) {
  __shared__ fm_sum held[FM_CUDA_FOLD];
  const int64_t blocks = count > 0 ? (count + FM_CUDA_FOLD - 1) / FM_CUDA_FOLD : 1;
  const int64_t plane = (int64_t)blockIdx.x / blocks, block = (int64_t)blockIdx.x % blocks;
  const int64_t base = block * FM_CUDA_FOLD;
  from += plane * apart;
  const int n = (int)(count - base < FM_CUDA_FOLD ? count - base : FM_CUDA_FOLD);
  for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
    held[i] = from[base + i];
  }
  __syncthreads();
  fm_fold_block(held, n, term);
  if (threadIdx.x == 0) {
    const fm_sum none = {0.0, 0.0, 0.0, 0.0};
    const fm_sum total = n > 0 ? held[0] : none;
    if (finish == FM_FINISH_NONE) {
      to[plane * apart + block] = total;
    } else {
      fm_finish_with(finish, total, q, numbers - FM_DOT_PLANE * (int)plane, result + FM_DOT_PLANE * plane);
    }
  }
}

/* One block for each row of a launch, whose result it leaves at its index in the list. A block folds pieces of
 * FM_CUDA_FOLD one after another and their sums over the first of them, which it has read by then. */
__global__ void fm_fold_rows_kernel(FM_KERNEL_ARGUMENT fm_cuda_launch l, int term, fm_finish finish, int numbers,
                                    double *result) {
  __shared__ fm_sum held[FM_CUDA_FOLD];
  const fm_cuda_row *row = &l.row[blockIdx.x];
  const fm_sum none = {0.0, 0.0, 0.0, 0.0};
  fm_sum *const partials = l.partials + row->first_chunk;
  int64_t count = (row->numel + FM_CHUNK - 1) / FM_CHUNK;
  fm_sum total = none;
  do {
    const int64_t pieces = (count + FM_CUDA_FOLD - 1) / FM_CUDA_FOLD;
    for (int64_t piece = 0; piece < pieces; piece++) {
      const int64_t base = piece * FM_CUDA_FOLD;
      const int n = (int)(count - base < FM_CUDA_FOLD ? count - base : FM_CUDA_FOLD);
      for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) {
        held[i] = partials[base + i];
      }
      __syncthreads();
      fm_fold_block(held, n, term);
      total = held[0];
      if (threadIdx.x == 0 && pieces > 1) {
        partials[piece] = total;
      }
      __syncthreads();
    }
    count = pieces;
  } while (count > 1);
  if (threadIdx.x == 0) {
    fm_finish_with(finish, row->numel > 0 ? total : none, 0.0, numbers, result + (int64_t)row->index * numbers);
  }
}

/* One block for each chunk; one warp where the update is summed over. */
template <fm_update UPDATE>
__global__ void fm_update_kernel(FM_KERNEL_ARGUMENT fm_cuda_launch l) {
  fm_options o = l.options;
  fm_read_scalars(&o, &l.scalars);
  const bool tallies = fm_shape_of(UPDATE).tally >= 0;
  const int threads = tallies ? FM_CUDA_WARP : FM_CUDA_THREADS;
  const int thread = (int)threadIdx.x % threads;
  const int64_t at_once = tallies ? FM_CUDA_CHUNKS : 1, first = (int64_t)blockIdx.x * at_once + threadIdx.x / threads;
  for (int64_t c = l.chunk_begin + first; c < l.chunk_end; c += (int64_t)gridDim.x * at_once) {
    const fm_cuda_row *row = fm_row_of(&l, c);
    const int64_t start = (c - row->first_chunk) * FM_CHUNK;
    const fm_sum sum = row->wide ? fm_update_chunk_f64<UPDATE>(&l, row, start, thread, threads, &o)
                                 : fm_update_chunk_f32<UPDATE>(&l, row, start, thread, threads, &o);
    if (tallies && thread == 0) {
      l.partials[c] = sum;
    }
  }
}

/* ---- launches ---- */

typedef void fm_launch_fn(const fm_cuda_launch &l, void *context);

static int64_t blocks_for(int64_t blocks) {
  const int64_t most = (int64_t)fm_processors() * FM_CUDA_BLOCKS_PER_SM;
  return blocks < most ? blocks : most;
}

template <int TERM>
static void launch_reduce(const fm_cuda_launch &l, void *stream) {
  const int64_t blocks = (l.chunk_end - l.chunk_begin + FM_CUDA_CHUNKS - 1) / FM_CUDA_CHUNKS;
  FM_LAUNCH(fm_reduce_kernel<TERM>, blocks_for(blocks), FM_CUDA_CHUNKS * FM_CUDA_WARP, stream, l);
}

typedef struct fm_dot_launch {
  int64_t apart;
  void *stream;
} fm_dot_launch;

template <int LISTS>
static void launch_dot(const fm_cuda_launch &l, void *context) {
  const fm_dot_launch *d = (const fm_dot_launch *)context;
  const int64_t tasks = (l.chunk_end - l.chunk_begin) * fm_dot_planes(LISTS);
  const int64_t blocks = (tasks + FM_CUDA_CHUNKS - 1) / FM_CUDA_CHUNKS;
  FM_LAUNCH(fm_dot_kernel<LISTS>, blocks_for(blocks), FM_CUDA_CHUNKS * FM_CUDA_WARP, d->stream, l, d->apart);
}

template <fm_update UPDATE>
static void launch_update(const fm_cuda_launch &l, void *stream) {
  const bool tallies = fm_shape_of(UPDATE).tally >= 0;
  const int64_t chunks = l.chunk_end - l.chunk_begin, at_once = tallies ? FM_CUDA_CHUNKS : 1;
  const int threads = tallies ? FM_CUDA_CHUNKS * FM_CUDA_WARP : FM_CUDA_THREADS;
  FM_LAUNCH(fm_update_kernel<UPDATE>, blocks_for((chunks + at_once - 1) / at_once), threads, stream, l);
}

/* Rows without elements have a result too. */
typedef struct fm_row_fold {
  int term;
  fm_finish finish;
  int numbers;
  double *result;
  void *stream;
} fm_row_fold;

static void launch_fold_rows(const fm_cuda_launch &l, void *context) {
  const fm_row_fold *f = (const fm_row_fold *)context;
  FM_LAUNCH(fm_fold_rows_kernel, l.rows, FM_CUDA_FOLD / 2, f->stream, l, f->term, f->finish, f->numbers, f->result);
}

static void flush(fm_cuda_launch *l, fm_launch_fn *launch, void *context) {
  if (l->rows > 0 && (l->chunk_end > l->chunk_begin || launch == launch_fold_rows)) {
    launch(*l, context);
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
  row->numel = from->numel;
  row->first_chunk = list->first_chunk[r];
  row->traits = from->traits;
  row->index = (uint32_t)r;
  row->wide = from->wide;
  l->chunk_begin = l->rows == 0 ? row->first_chunk : l->chunk_begin;
  l->chunk_end = list->first_chunk[r + 1];
  l->rows++;
}

/* Dense rows go together, up to a full table; a row with a layout goes alone, but where no element is read. */
static void launch_all(const fm_list *list, const fm_options *options, const fm_scalars *scalars, fm_launch_fn *launch,
                       void *context) {
  fm_cuda_launch l;
  l.options = *options;
  l.scalars = *scalars;
  l.partials = list->partials;
  l.rows = 0;
  l.strided = false;
  for (int64_t r = 0; r < list->count; r++) {
    const bool strided = is_strided(&list->rows[r]) && launch != launch_fold_rows;
    if (strided || l.rows == FM_CUDA_ROWS) {
      flush(&l, launch, context);
    }
    add_row(&l, list, r);
    if (strided) {
      for (int k = 0; k < FM_MAX_OPERANDS; k++) {
        const fm_layout dense = {0, {0}, {0}};
        l.alone.layout[k] = list->rows[r].operand[k].layout != NULL ? *list->rows[r].operand[k].layout : dense;
      }
      l.strided = true;
      flush(&l, launch, context);
    }
  }
  flush(&l, launch, context);
}

extern "C" int64_t fm_cuda_partials(int64_t chunks) { return chunks + chunks / (FM_CUDA_FOLD - 1) + 8; }

/* To `numbers` sums, four of which are a plane of partial results; all else is one number of one plane. */
static void fold(const fm_list *list, int term, fm_finish finish, double q, int numbers, double *result, void *stream) {
  const int64_t planes = (numbers + FM_DOT_PLANE - 1) / FM_DOT_PLANE;
  const fm_sum *from = list->partials;
  int64_t count = list->first_chunk[list->count];
  const int64_t apart = fm_cuda_partials(count);
  fm_sum *to = list->partials + count;
  for (; count > FM_CUDA_FOLD; count = (count + FM_CUDA_FOLD - 1) / FM_CUDA_FOLD) {
    const int64_t blocks = (count + FM_CUDA_FOLD - 1) / FM_CUDA_FOLD;
    FM_LAUNCH(fm_fold_kernel, planes * blocks, FM_CUDA_FOLD / 2, stream, from, count, to, apart, term, FM_FINISH_NONE,
              q, numbers, result);
    from = to;
    to += blocks;
  }
  FM_LAUNCH(fm_fold_kernel, planes, FM_CUDA_FOLD / 2, stream, from, count, to, apart, term, finish, q, numbers, result);
}

static void fold_rows(const fm_list *list, int term, fm_finish finish, int numbers, double *result, void *stream) {
  const fm_options options = {};
  const fm_scalars scalars = {};
  fm_row_fold context = {term, finish, numbers, result, stream};
  launch_all(list, &options, &scalars, launch_fold_rows, &context);
}

extern "C" const char *fm_cuda_norm(const fm_list *list, const fm_options *options, double *result, void *stream) {
  fm_scalars scalars = {};
  const double q = options->q;
  if (q == 2.0) {
    launch_all(list, options, &scalars, launch_reduce<FM_TERM_SQUARE>, stream);
    fold(list, FM_TERM_SQUARE, FM_FINISH_ROOT, q, 1, result, stream);
    return fm_launch_error();
  }
  if (q == 1.0 && !fm_any_wide(list)) {
    launch_all(list, options, &scalars, launch_reduce<FM_TERM_MAGNITUDE>, stream);
    fold(list, FM_TERM_MAGNITUDE, FM_FINISH_SUMS, q, 1, result, stream);
    return fm_launch_error();
  }
  launch_all(list, options, &scalars, launch_reduce<FM_TERM_LARGEST>, stream);
  fold(list, FM_TERM_LARGEST, FM_FINISH_SUMS, q, 1, result, stream);
  if (!isinf(q)) {
    scalars.norm = result;
    launch_all(list, options, &scalars, launch_reduce<FM_TERM_POWER>, stream);
    fold(list, FM_TERM_POWER, FM_FINISH_POWERS, q, 1, result, stream);
  }
  return fm_launch_error();
}

extern "C" const char *fm_cuda_ties(const fm_list *list, const fm_options *options, const fm_scalars *scalars,
                                    double *result, void *stream) {
  launch_all(list, options, scalars, launch_reduce<FM_TERM_TIES>, stream);
  fold(list, FM_TERM_TIES, FM_FINISH_SUMS, options->q, 1, result, stream);
  return fm_launch_error();
}

extern "C" const char *fm_cuda_dot(const fm_list *list, const fm_options *options, double *result, void *stream) {
  const fm_scalars scalars = {};
  fm_dot_launch context = {fm_cuda_partials(list->first_chunk[list->count]), stream};
  switch (options->lists) {
    case 2: launch_all(list, options, &scalars, launch_dot<2>, &context); break;
    case 3: launch_all(list, options, &scalars, launch_dot<3>, &context); break;
    default: launch_all(list, options, &scalars, launch_dot<FM_DOT_LISTS>, &context); break;
  }
  fold(list, FM_TERM_DOT, FM_FINISH_SUMS, 0.0, fm_dot_sums(options->lists), result, stream);
  return fm_launch_error();
}

extern "C" const char *fm_cuda_pacgen(const fm_list *list, const fm_options *options, const fm_scalars *scalars,
                                      double *result, void *stream) {
  launch_all(list, options, scalars, launch_reduce<FM_TERM_PACGEN>, stream);
  fold_rows(list, FM_TERM_PACGEN, FM_FINISH_PACGEN, 2, result, stream);
  return fm_launch_error();
}

extern "C" const char *fm_cuda_row_norms(const fm_list *list, const fm_options *options, double *result, void *stream) {
  const fm_scalars scalars = {};
  launch_all(list, options, &scalars, launch_reduce<FM_TERM_SQUARE>, stream);
  fold_rows(list, FM_TERM_SQUARE, FM_FINISH_ROOT, 1, result, stream);
  return fm_launch_error();
}

extern "C" const char *fm_cuda_update(fm_update update, const fm_list *list, const fm_options *options,
                                      const fm_scalars *scalars, double *result, void *stream) {
  switch (update) {
#define FM_LAUNCH_CASE(update, name, ...) \
  case update: launch_all(list, options, scalars, launch_update<update>, stream); break;
    FM_UPDATES(FM_LAUNCH_CASE)
#undef FM_LAUNCH_CASE
    default: break;
  }
  const int tally = fm_shape_of(update).tally;
  if (tally >= 0 && result != NULL) {
    fold(list, tally, FM_FINISH_SUMS, 0.0, tally == FM_TERM_NOISE ? 3 : 1, result, stream);
  }
  return fm_launch_error();
}

extern "C" bool fm_cuda_ready(void) {
#ifdef FM_EMULATE
  return true;
#else
  int driver = 0, runtime = 0; /* without a driver cudaDriverGetVersion succeeds and reports 0 */
  return cudaDriverGetVersion(&driver) == cudaSuccess && cudaRuntimeGetVersion(&runtime) == cudaSuccess &&
         driver >= runtime;
#endif
}
