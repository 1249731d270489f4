/* The base steps of updates.h: half of nvcc's work on the updates. */
#include "updates.cuh"

#define FM_COMPILE(update, ...) template void fm_launch_update<update>(const fm_cuda_launch &l, void *stream);
FM_BASE_STEPS(FM_COMPILE)
