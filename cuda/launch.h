/* What the kernels need of CUDA, from nvcc or from the emulator (tests/emu/cuda_emu.h) that runs them on the host. */
#ifndef FM_LAUNCH_H
#define FM_LAUNCH_H

#ifdef FM_EMULATE
#include "cuda_emu.h"
#else
#include <cuda_runtime.h>

#define FM_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<(unsigned)(blocks), (unsigned)(threads), 0, (cudaStream_t)(stream)>>>(__VA_ARGS__)
#define FM_KERNEL_ARGUMENT const __grid_constant__

/* An error of an earlier call sticks in the runtime too: report what the launches left. */
static inline const char *fm_launch_error(void) {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

static inline int fm_processors(void) {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}
#endif

#endif
