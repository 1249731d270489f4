/* The kernel of an update, and its launch. */
#ifndef FM_UPDATES_CUH
#define FM_UPDATES_CUH

#include "launches.cuh"

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
    if (fm_has_own_scalars(UPDATE)) {
      fm_read_own_scalars(&o, &l.scalars, row->index);
    }
    const fm_sum sum = row->fp64 ? fm_update_chunk_f64<UPDATE>(&l, row, start, thread, threads, &o)
                                 : fm_update_chunk_f32<UPDATE>(&l, row, start, thread, threads, &o);
    if (tallies && thread == 0) {
      l.partials[c] = sum;
    }
  }
}

template <fm_update UPDATE>
void fm_launch_update(const fm_cuda_launch &l, void *stream) {
  const bool tallies = fm_shape_of(UPDATE).tally >= 0;
  const int64_t chunks = l.chunk_end - l.chunk_begin, at_once = tallies ? FM_CUDA_CHUNKS : 1;
  const int threads = tallies ? FM_CUDA_CHUNKS * FM_CUDA_WARP : FM_CUDA_THREADS;
  const int64_t blocks = (chunks + at_once - 1) / at_once;
  if (l.plain && fm_is_plain_update(UPDATE, &l.options)) {
    FM_LAUNCH(fm_plain_update_kernel<UPDATE>, plain_blocks_for(blocks), threads, stream, l);
  } else {
    FM_LAUNCH(fm_update_kernel<UPDATE>, blocks_for(blocks), threads, stream, l);
  }
}

#endif
