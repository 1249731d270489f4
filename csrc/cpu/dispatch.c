/* Chooses the kernel table once, when the library is loaded. */
#include "fm_ops.h"

#include <stdlib.h>
#include <string.h>

#ifdef FM_X86
#include <cpuid.h>
#endif

extern const fm_kernels fm_kernels_base;
#ifdef FM_X86
extern const fm_kernels fm_kernels_v3, fm_kernels_v4;

/* What the levels of the x86-64 psABI ask for, by CPUID leaf and register. */
enum {
  FM_V3_LEAF_1_ECX = bit_SSE3 | bit_SSSE3 | bit_FMA | bit_CMPXCHG16B | bit_SSE4_1 | bit_SSE4_2 | bit_MOVBE |
      bit_POPCNT | bit_OSXSAVE | bit_AVX | bit_F16C,
  FM_V3_LEAF_7_EBX = bit_BMI | bit_AVX2 | bit_BMI2,
  FM_V3_EXTENDED_ECX = bit_LAHF_LM | bit_ABM,
};
#define FM_V4_LEAF_7_EBX (bit_AVX512F | bit_AVX512DQ | bit_AVX512CD | bit_AVX512BW | bit_AVX512VL)

/* Of XCR0: the registers that the operating system saves. AVX: xmm and ymm; AVX-512: masks and both parts of zmm too.
 */
enum { FM_SAVES_AVX = 0x06, FM_SAVES_AVX512 = 0xe6 };

/* 1, 3 or 4, by CPUID itself: __builtin_cpu_supports asks the compiler's runtime library, and zig's knows no feature.
 */
static int x86_level(void) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0, saved = 0, high = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & FM_V3_LEAF_1_ECX) != FM_V3_LEAF_1_ECX) {
    return 1;
  }
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0)); /* legal: OSXSAVE is set */
  if (!__get_cpuid(0x80000001u, &eax, &ebx, &ecx, &edx) || (ecx & FM_V3_EXTENDED_ECX) != FM_V3_EXTENDED_ECX ||
      !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (ebx & FM_V3_LEAF_7_EBX) != FM_V3_LEAF_7_EBX ||
      (saved & FM_SAVES_AVX) != FM_SAVES_AVX) {
    return 1;
  }
  const bool v4 = (ebx & FM_V4_LEAF_7_EBX) == FM_V4_LEAF_7_EBX && (saved & FM_SAVES_AVX512) == FM_SAVES_AVX512;
  return v4 ? 4 : 3;
}
#endif

const fm_kernels *fm_active_kernels = &fm_kernels_base;

int fm_best_isa(void) {
#ifdef FM_X86
  return x86_level();
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
