/* The core alone, under AddressSanitizer: memory is allocated to the byte, so that one element too many is an error.
 * Every kernel of every instruction set gives the same bytes, and these are held against plain loops over the formulas;
 * the formulas against expressions of their own, long double and libm. */
#include "check.h"
#include "tests.h"

int fm_failures = 0;
const char *test_argument = NULL;

extern const fm_kernels fm_kernels_base;
#ifdef FM_X86
extern const fm_kernels fm_kernels_v3, fm_kernels_v4;
#endif

int kernel_tables(const fm_kernels *tables[MOST_TABLES]) {
  int count = 0;
  tables[count++] = &fm_kernels_base;
#ifdef FM_X86
  const int level = fm_best_isa();
#if !defined(__clang__) /* a second opinion */
  CHECK((level >= 3) == !!__builtin_cpu_supports("x86-64-v3"), "level %d", level);
  CHECK((level >= 4) == !!__builtin_cpu_supports("x86-64-v4"), "level %d", level);
#endif
  if (level >= 3) {
    tables[count++] = &fm_kernels_v3;
  }
  if (level >= 4) {
    tables[count++] = &fm_kernels_v4;
  }
#endif
  return count;
}

/* ---- ways to split a range ---- */

static void serial(int64_t begin, int64_t end, int64_t grain, fm_range_fn fn, void *context) {
  (void)grain;
  fn(begin, end, context);
}

static void single_chunks_backwards(int64_t begin, int64_t end, int64_t grain, fm_range_fn fn, void *context) {
  (void)grain;
  for (int64_t i = end - 1; i >= begin; i--) {
    fn(i, i + 1, context);
  }
}

static void uneven_thirds(int64_t begin, int64_t end, int64_t grain, fm_range_fn fn, void *context) {
  (void)grain;
  const int64_t a = begin + (end - begin) / 7, b = begin + 2 * (end - begin) / 3;
  const int64_t edges[] = {b, end, begin, a, a, b};
  for (int k = 0; k < 6; k += 2) {
    if (edges[k] < edges[k + 1]) {
      fn(edges[k], edges[k + 1], context);
    }
  }
}

const fm_parallel_for splits[SPLITS] = {serial, single_chunks_backwards, uneven_thirds};

typedef struct split_run {
  fm_job job;
  fm_kernel *kernel;
} split_run;

static void run_range(int64_t begin, int64_t end, void *context) {
  const split_run *run = context;
  run->kernel(&run->job, begin, end);
}

void run_split(fm_kernel *kernel, const fm_list *list, const fm_options *options, bool streaming,
               fm_parallel_for parallel_for) {
  split_run run = {{list, options, NULL, streaming}, kernel};
  parallel_for(0, list->first_chunk[list->count], 1, run_range, &run);
}

int main(int argc, char **argv) {
  const struct {
    const char *name;
    void (*run)(void);
  } tests[] = {
#define FM_TEST_ENTRY(name) {#name, test_##name},
      FM_TESTS(FM_TEST_ENTRY)
#undef FM_TEST_ENTRY
  };
  for (size_t k = 0; k < sizeof tests / sizeof *tests; k++) {
    if (argc >= 2 && strcmp(argv[1], tests[k].name) == 0) {
      test_argument = argc == 3 ? argv[2] : NULL;
      tests[k].run();
      return fm_failures == 0 ? 0 : 1;
    }
  }
  fprintf(stderr, "give the name of one test\n");
  return 2;
}
