/* Label noise on the CUDA grid: a thread has four elements, which share the four words of one quad where their numbers
 * follow on one another from a multiple of four; else each has a quad of its own. */
#include "fm_cuda.h"
#include "launch.h"

enum { FM_CUDA_SAMPLE_THREADS = 256, FM_CUDA_SAMPLE_BLOCKS = 32 }; /* threads of a block, blocks per processor */

#define FM_DEVICE static __device__ __forceinline__

FM_DEVICE uint64_t fm_number_of(const fm_samples *s, int64_t at) {
  if (s->index == nullptr) {
    return (uint64_t)at;
  }
  const int64_t sample = at / s->inner;
  return (uint64_t)s->index[sample] * (uint64_t)s->inner + (uint64_t)(at - sample * s->inner);
}

/* By comparisons: an index that is no constant would send the four to local memory. */
FM_DEVICE uint32_t fm_word_of_four(const fm_quad &four, int k) {
  return k == 0 ? four.word[0] : k == 1 ? four.word[1] : k == 2 ? four.word[2] : four.word[3];
}

FM_DEVICE float fm_draw_of_four(const fm_draws &four, int k) {
  return k == 0 ? four.value[0] : k == 1 ? four.value[1] : k == 2 ? four.value[2] : four.value[3];
}

__global__ void fm_corrupt_labels_kernel(FM_KERNEL_ARGUMENT fm_label_job job) {
  const uint64_t seed = job.samples.key[0], step = job.samples.key[1];
  const int64_t stride = 4 * (int64_t)gridDim.x * FM_CUDA_SAMPLE_THREADS;
  for (int64_t at = 4 * ((int64_t)blockIdx.x * FM_CUDA_SAMPLE_THREADS + threadIdx.x); at < job.samples.numel;
       at += stride) {
    fm_quad four = {{0, 0, 0, 0}};
    uint64_t held = UINT64_MAX;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (at + j < job.samples.numel) {
        const uint64_t number = fm_number_of(&job.samples, at + j);
        if (number / 4 != held) {
          held = number / 4;
          four = fm_random_quad(seed, step, 0, held);
        }
        const uint32_t word = fm_word_of_four(four, (int)(number % 4));
        const int64_t label = job.labels[at + j];
        int64_t noisy = label;
        if (fm_label_in_range(&job.noise, label)) {
          noisy = job.noise.entries > 0 ? fm_label_from_table(&job.noise, label, word)
                                        : fm_label_moved(&job.noise, label, word);
        }
        job.out[at + j] = noisy;
      }
    }
  }
}

__global__ void fm_draw_samples_kernel(FM_KERNEL_ARGUMENT fm_draw_job job) {
  const uint64_t seed = job.samples.key[0], step = job.samples.key[1];
  const int64_t stride = 4 * (int64_t)gridDim.x * FM_CUDA_SAMPLE_THREADS;
  for (int64_t at = 4 * ((int64_t)blockIdx.x * FM_CUDA_SAMPLE_THREADS + threadIdx.x); at < job.samples.numel;
       at += stride) {
    fm_draws four = {{0.0F, 0.0F, 0.0F, 0.0F}};
    uint64_t held = UINT64_MAX;
#pragma unroll 1
    for (int j = 0; j < 4 && at + j < job.samples.numel; j++) {
      const uint64_t number = fm_number_of(&job.samples, at + j);
      if (number / 4 != held) {
        held = number / 4;
        four = fm_draw_quad(fm_random_quad(seed, step, 0, held), job.law);
      }
      job.out[at + j] = fm_draw_of_four(four, (int)(number % 4));
    }
  }
}

static int64_t blocks_for(int64_t numel) {
  const int64_t each = 4 * FM_CUDA_SAMPLE_THREADS, needed = (numel + each - 1) / each;
  const int64_t most = (int64_t)fm_processors() * FM_CUDA_SAMPLE_BLOCKS;
  return needed < most ? needed : most;
}

extern "C" const char *fm_cuda_corrupt_labels(const fm_label_job *job, void *stream) {
  if (job->samples.numel > 0) {
    FM_LAUNCH(fm_corrupt_labels_kernel, blocks_for(job->samples.numel), FM_CUDA_SAMPLE_THREADS, stream, *job);
  }
  return fm_launch_error();
}

extern "C" const char *fm_cuda_draw_samples(const fm_draw_job *job, void *stream) {
  if (job->samples.numel > 0) {
    FM_LAUNCH(fm_draw_samples_kernel, blocks_for(job->samples.numel), FM_CUDA_SAMPLE_THREADS, stream, *job);
  }
  return fm_launch_error();
}
