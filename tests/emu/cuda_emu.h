/* CUDA's language on the host: with FM_EMULATE, cuda/launch.h includes this file and a C++17 compiler builds the real
 * kernels. It covers what they use, no more: one dimension, static shared memory, block barriers and warp shuffles.
 *
 * Each CUDA thread is a fiber. Blocks run one after another; the threads of a block run one at a time, in an order that
 * FM_EMU_ORDER (or fm_emu_set_order) chooses, each until it ends or must wait for others. So no two threads ever run
 * together, and what needs real concurrency to show (memory ordering, atomics) does not show; race_check.cpp finds
 * unordered accesses from the text of the accesses instead. */
#ifndef FM_CUDA_EMU_H
#define FM_CUDA_EMU_H

#include <stddef.h>
#include <stdint.h>
#include <tuple>
#include <utility>

#include "emu_control.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

/* One block at a time, so a static variable serves. In a section of its own the emulator finds it and fills it with NaN
 * before each block, as the hardware leaves it undefined. AddressSanitizer guards only variables in ordinary sections,
 * and the compiler takes a template's out of any other: such a kernel looks like a race between blocks. */
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static
#else
#define __shared__ static __attribute__((section("fm_emu_shared")))
#endif

struct fm_emu_index {
  unsigned x;
};
extern fm_emu_index threadIdx, blockIdx, blockDim, gridDim;

/* Where a thread waits: threads meet only at the same line. */
struct fm_emu_site {
  const char *file;
  int line;
};

void fm_emu_barrier(fm_emu_site site);
double fm_emu_shuffle_down(fm_emu_site site, unsigned mask, double value, unsigned by);

inline void __syncthreads(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
  fm_emu_barrier({file, line});
}

inline double __shfl_down_sync(unsigned mask, double value, unsigned by, const char *file = __builtin_FILE(),
                               int line = __builtin_LINE()) {
  return fm_emu_shuffle_down({file, line}, mask, value, by);
}

/* ---- launches ---- */

#define FM_KERNEL_ARGUMENT const
#define FM_LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)(stream), fm_emu_launch(#kernel, kernel, blocks, threads)(__VA_ARGS__))

typedef void fm_emu_body(const void *call);
void fm_emu_run(const char *kernel, int64_t blocks, int64_t threads, fm_emu_body *body, const void *call);

/* The arguments are copied at the launch, as on a GPU: what the host changes later does not reach the kernel. */
template <typename... P>
struct fm_emu_call {
  void (*kernel)(P...);
  std::tuple<P...> arguments;

  /* Called by every thread. That the arguments are passed on is the emulator's doing: race_check.cpp is not told. */
  __attribute__((no_sanitize_thread)) static void body(const void *call) {
    static_cast<const fm_emu_call *>(call)->pass_on(std::index_sequence_for<P...>());
  }
  template <size_t... I>
  __attribute__((no_sanitize_thread)) void pass_on(std::index_sequence<I...>) const {
    kernel(std::get<I>(arguments)...);
  }
};

template <typename... P>
auto fm_emu_launch(const char *name, void (*kernel)(P...), int64_t blocks, int64_t threads) {
  return [=](P... arguments) {
    const fm_emu_call<P...> call = {kernel, std::tuple<P...>(arguments...)};
    fm_emu_run(name, blocks, threads, fm_emu_call<P...>::body, &call);
  };
}

/* What went wrong since the last call, or NULL. After an error nothing runs until it is asked for. */
const char *fm_launch_error(void);

/* Few, so that blocks have to walk on through the chunks of ordinary test inputs. */
static inline int fm_processors(void) { return 3; }

#endif
