/* Norms, ties, inner products, PACGen: what sums over lists. */
#include "launches.cuh"

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
    const fm_sum sum = row->fp64 ? fm_reduce_chunk_f64<TERM>(&l, row, start, thread, &o)
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
    const fm_sum sum = row->fp64 ? fm_dot_chunk_f64<LISTS>(&l, row, start, thread, plane)
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

/* Ten levels of the tree over n <= FM_CUDA_FOLD neighbours; an odd element out moves up unpaired, as in reduce.c. A
 * thread has two neighbours, a warp five levels more, and the first warp folds what the others leave in `held`. The sum
 * is thread 0's. */
FM_DEVICE fm_sum fm_fold_warp(fm_sum sum, int i, int n, int step, int last, int term) {
#pragma unroll 1
  for (unsigned by = 1; step < last; step *= 2, by *= 2) { /* of element i and element i + step */
    const fm_sum other = fm_shuffle_down(sum, by, true);
    if (i + step < n) {
      sum = fm_fold(sum, other, term);
    }
  }
  return sum;
}

FM_DEVICE fm_sum fm_fold_block(const fm_sum *from, int n, fm_sum *held, int term) {
  const int i = 2 * (int)threadIdx.x, warp = (int)threadIdx.x / FM_CUDA_WARP;
  fm_sum sum = {0.0, 0.0, 0.0, 0.0};
  if (i < n) {
    sum = from[i];
  }
  if (i + 1 < n) {
    sum = fm_fold(sum, from[i + 1], term);
  }
  sum = fm_fold_warp(sum, i, n, 2, FM_CUDA_WARP_FOLD, term);
  if (threadIdx.x % FM_CUDA_WARP == 0) {
    held[warp] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    const int of = (int)threadIdx.x % FM_CUDA_FOLD_WARPS;
    sum = fm_fold_warp(held[of], FM_CUDA_WARP_FOLD * of, n, FM_CUDA_WARP_FOLD, FM_CUDA_FOLD, term);
  }
  return sum;
}

/* Each block folds FM_CUDA_FOLD neighbours of a plane, of which there are several in dot; the last launch, of one block
 * a plane, ends with the operator's value. Plane p begins `apart` after plane p - 1 and has four of the `numbers`. */
__global__ void fm_fold_kernel(const fm_sum *from, int64_t count, fm_sum *to, int64_t apart, int term, fm_finish finish,
                               double q, int numbers, double *result) {
  __shared__ fm_sum held[FM_CUDA_FOLD_WARPS];
  const int64_t blocks = count > 0 ? (count + FM_CUDA_FOLD - 1) / FM_CUDA_FOLD : 1;
  const int64_t plane = (int64_t)blockIdx.x / blocks, block = (int64_t)blockIdx.x % blocks;
  const int64_t base = block * FM_CUDA_FOLD;
  from += plane * apart;
  const int n = (int)(count - base < FM_CUDA_FOLD ? count - base : FM_CUDA_FOLD);
  const fm_sum total = fm_fold_block(from + base, n, held, term);
  if (threadIdx.x == 0) {
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
  __shared__ fm_sum held[FM_CUDA_FOLD_WARPS];
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
      total = fm_fold_block(partials + base, n, held, term);
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

/* ---- launches ---- */

template <int TERM>
static void launch_reduce(const fm_cuda_launch &l, void *stream) {
  const int64_t blocks = (l.chunk_end - l.chunk_begin + FM_CUDA_CHUNKS - 1) / FM_CUDA_CHUNKS;
  if (l.plain) {
    FM_LAUNCH(fm_plain_reduce_kernel<TERM>, plain_blocks_for(blocks), FM_CUDA_CHUNKS * FM_CUDA_WARP, stream, l);
  } else {
    FM_LAUNCH(fm_reduce_kernel<TERM>, blocks_for(blocks), FM_CUDA_CHUNKS * FM_CUDA_WARP, stream, l);
  }
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
  if (l.plain) {
    FM_LAUNCH(fm_plain_dot_kernel<LISTS>, plain_blocks_for(blocks), FM_CUDA_CHUNKS * FM_CUDA_WARP, d->stream, l,
              d->apart);
  } else {
    FM_LAUNCH(fm_dot_kernel<LISTS>, blocks_for(blocks), FM_CUDA_CHUNKS * FM_CUDA_WARP, d->stream, l, d->apart);
  }
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
  launch_rows(list, &options, &scalars, true, launch_fold_rows, &context);
}

void fm_fold_sums(const fm_list *list, int term, int numbers, double *result, void *stream) {
  fold(list, term, FM_FINISH_SUMS, 0.0, numbers, result, stream);
}

extern "C" const char *fm_cuda_norm(const fm_list *list, const fm_options *options, double *result, void *stream) {
  fm_scalars scalars = {};
  const double q = options->q;
  if (q == 2.0) {
    launch_all(list, options, &scalars, launch_reduce<FM_TERM_SQUARE>, stream);
    fold(list, FM_TERM_SQUARE, FM_FINISH_ROOT, q, 1, result, stream);
    return fm_launch_error();
  }
  if (q == 1.0 && !fm_any_fp64(list)) {
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

extern "C" bool fm_cuda_ready(void) {
#ifdef FM_EMULATE
  return true;
#else
  int driver = 0, runtime = 0; /* without a driver cudaDriverGetVersion succeeds and reports 0 */
  return cudaDriverGetVersion(&driver) == cudaSuccess && cudaRuntimeGetVersion(&runtime) == cudaSuccess &&
         driver >= runtime;
#endif
}
