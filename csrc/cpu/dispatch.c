/* Chooses the kernel table once, when the library is loaded. */
#include "fm_ops.h"

#include <stdlib.h>
#include <string.h>

extern const fm_kernels fm_kernels_base;
#ifdef FM_X86
extern const fm_kernels fm_kernels_v3, fm_kernels_v4;
#endif

const fm_kernels *fm_active_kernels = &fm_kernels_base;

int fm_best_isa(void) {
#ifdef FM_X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 1;
#else
  return 1;
#endif
}

/* A value of FM_ISA that is unknown or that this processor cannot run leaves the default; the Python side compares the
 * table's number with the variable and says so. */
__attribute__((constructor)) static void choose(void) {
#ifdef FM_X86
  const int best = fm_best_isa();
  const char *wanted = getenv("FM_ISA");
  const bool any = wanted == NULL || *wanted == '\0';
  if (best >= 4 && (any || strcmp(wanted, "v4") == 0)) {
    fm_active_kernels = &fm_kernels_v4;
  } else if (best >= 3 && (any || strcmp(wanted, "v3") == 0)) {
    fm_active_kernels = &fm_kernels_v3;
  }
#endif
}
