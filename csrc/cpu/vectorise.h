/* What the loops that are compiled once per instruction set tell the compiler. */
#ifndef FM_VECTORISE_H
#define FM_VECTORISE_H

#ifdef __SSE2__
#include <immintrin.h>
#endif

#define FM_INLINE static inline __attribute__((always_inline))

/* Before a loop: its rounds do not depend on each other, whatever pointers may suggest. */
#ifdef __clang__
#define FM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define FM_INDEPENDENT _Pragma("GCC ivdep")
#endif

#endif
