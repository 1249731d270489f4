/* The parts of fm_test_core by name, and what several of them need. */
#ifndef FM_TESTS_H
#define FM_TESTS_H

#include "fm_ops.h"

/* Each has a function test_<name>; CMakeLists.txt makes a test of each. */
#define FM_TESTS(X)      \
  X(conversions)         \
  X(rounding)            \
  X(pow)                 \
  X(philox)              \
  X(words)               \
  X(laws)                \
  X(ln)                  \
  X(exp2f)               \
  X(turn)                \
  X(normal_mass)         \
  X(normal_quantile)     \
  X(truncation)          \
  X(norm)                \
  X(one_pass)            \
  X(row_norms)           \
  X(tree)                \
  X(extremes)            \
  X(reductions)          \
  X(dot)                 \
  X(dot_not_finite)      \
  X(pacgen)              \
  X(pacgen_limits)       \
  X(pacgen_products)     \
  X(pacgen_digits)       \
  X(forms)               \
  X(kernels)             \
  X(strided)             \
  X(noise)               \
  X(averages)            \
  X(combinations)        \
  X(zero_coefficients)   \
  X(lion)                \
  X(not_finite)          \
  X(digests)             \
  X(stealing)            \
  X(concurrent_stealing) \
  X(label_shares)        \
  X(label_kernels)

#define FM_TEST_FUNCTION(name) void test_##name(void);
FM_TESTS(FM_TEST_FUNCTION)
#undef FM_TEST_FUNCTION

/* What follows the test's name on the command line, or NULL. */
extern const char *test_argument;

/* The kernel tables that this processor runs; base comes first. */
enum { MOST_TABLES = 3 };
int kernel_tables(const fm_kernels *tables[MOST_TABLES]);

/* Ways to split a range: no result may depend on them. The first one takes it as it is. */
enum { SPLITS = 3 };
extern const fm_parallel_for splits[SPLITS];

/* Runs a kernel over a list: the operators wake no thread for lists as short as most of these tests'. */
void run_split(fm_kernel *kernel, const fm_list *list, const fm_options *options, bool streaming,
               fm_parallel_for parallel_for);

/* x with erf(x / sqrt 2) = mass, in double by Newton's method. */
double normal_quantile(double mass);

#endif
