/* Every kernel of every instruction set, under AddressSanitizer: memory is allocated to the byte, so that one element
 * too many is an error. Values are held against a plain loop over the formulas, the norm against long double. */
#include "check.h"
#include "lists.h"

#include <stdlib.h>

int fm_failures = 0;

extern const fm_kernels fm_kernels_base;
#ifdef FM_X86
extern const fm_kernels fm_kernels_v3, fm_kernels_v4;
#endif

/* The tables that this processor runs; base comes first. */
static int kernel_tables(const fm_kernels *tables[3]) {
  int count = 0;
  tables[count++] = &fm_kernels_base;
#ifdef FM_X86
  if (__builtin_cpu_supports("x86-64-v3")) {
    tables[count++] = &fm_kernels_v3;
  }
  if (__builtin_cpu_supports("x86-64-v4")) {
    tables[count++] = &fm_kernels_v4;
  }
#endif
  return count;
}

/* ---- ways to split a range: no result may depend on them ---- */

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

static const fm_parallel_for splits[] = {serial, single_chunks_backwards, uneven_thirds};

/* ---- norm ---- */

static void test_norm(void) {
  const double exponents[] = {1.0, 1.5, 2.0, 3.0, 51.0, INFINITY};
  for (int type = FM_F32; type <= FM_F16; type++) {
    fm_list list = make_list((fm_dtype)type, 2, 1);
    for (int e = 0; e < 6; e++) {
      fm_options o = some_options();
      o.q = exponents[e];
      long double sum = 0.0L, top = 0.0L;
      for (int64_t r = 0; r < list.count; r++) {
        for (int64_t i = 0; i < list.rows[r].operand[0].numel; i++) {
          const double g = get(&list.rows[r].operand[0], i), w = fabs(get(&list.rows[r].operand[1], i));
          const int scaling = list.rows[r].scaling;
          const double t = scaling == FM_SCALE_ASAM ? w + o.eta : scaling == FM_SCALE_DAVDA54 ? w : 1.0;
          const long double x = fabsl((long double)t * g);
          sum += powl(x, o.q);
          top = x > top ? x : top;
        }
      }
      const long double expected = isinf(o.q) ? top : powl(sum, 1.0L / o.q);
      const double got = fm_norm(&list, &o, serial);
      CHECK(fabsl(got - expected) <= 1e-13L * expected, "type %d q %g: %.17g, not %.17Lg", type, o.q, got, expected);
      if (isinf(o.q)) {
        o.norm = got;
        CHECK(fm_ties(&list, &o, serial) == 1.0, "type %d: one element attains the maximum", type);
      }
    }
    free_list(&list);
  }
}

/* The promise: partial results fold the same whatever the split, for any number of chunks. */
static void test_tree(void) {
  const fm_kernels *tables[3];
  const int table_count = kernel_tables(tables);
  for (int64_t n = 0; n < 70 * FM_CHUNK; n += 3 * FM_CHUNK + 17) {
    fm_row row = {.operand = {{malloc((size_t)n * sizeof(float) + 1), NULL, n, FM_F32}}};
    int64_t first_chunk[2];
    fm_list list = {&row, 1, first_chunk, NULL};
    fm_list_plan(&list);
    list.partials = malloc((size_t)first_chunk[1] * sizeof *list.partials + 1);
    for (int64_t i = 0; i < n; i++) {
      put(&row.operand[0], i, uniform((uint64_t)i, 3));
    }
    fm_options o = some_options();
    fm_active_kernels = tables[0];
    const double expected = fm_norm(&list, &o, serial);
    for (int t = 0; t < table_count; t++) {
      fm_active_kernels = tables[t];
      for (int s = 0; s < 3; s++) {
        const double got = fm_norm(&list, &o, splits[s]);
        CHECK(fm_bits_f64(got) == fm_bits_f64(expected), "n %lld table %d split %d", (long long)n, t, s);
      }
    }
    CHECK(n == 0 || fabs(expected / sqrt((double)n / 3.0) - 1.0) < 0.05, "n %lld: uniform in [-1, 1]", (long long)n);
    free(row.operand[0].data);
    free(list.partials);
  }
}

/* ---- the element-wise kernels ---- */

/* One element at a time, straight from the formulas. */
static void plain_ascend(fm_list *list, const fm_options *o) {
  for (int64_t r = 0; r < list->count; r++) {
    fm_row *row = &list->rows[r];
    for (int64_t i = 0; i < row->operand[0].numel; i++) {
      const double w = get(&row->operand[FM_ASCEND_PARAM], i), g = get(&row->operand[FM_ASCEND_GRAD], i);
      const double step = o->rho / (o->norm + o->eps);
      put(&row->operand[FM_ASCEND_OLD], i, w);
      put(&row->operand[FM_ASCEND_PARAM], i,
          row->wide ? fm_ascend_2_f64(w, g, step, row->scaling, o->eta)
                    : (double)fm_ascend_2_f32((float)w, (float)g, (float)step, row->scaling, (float)o->eta));
    }
  }
}

static void plain_sgd(fm_list *list, const fm_options *o) {
  for (int64_t r = 0; r < list->count; r++) {
    fm_row *row = &list->rows[r];
    for (int64_t i = 0; i < row->operand[0].numel; i++) {
      const double w = get(&row->operand[FM_STEP_OLD], i), g = get(&row->operand[FM_STEP_GRAD], i);
      const double b = get(&row->operand[FM_SGD_BUFFER], i);
      if (row->wide) {
        const double d = fma(o->weight_decay, w, g), next = fma(1.0 - o->dampening, d, o->momentum * b);
        put(&row->operand[FM_SGD_BUFFER], i, next);
        put(&row->operand[FM_STEP_PARAM], i, fma(-o->lr, fma(o->momentum, next, d), w));
      } else {
        const float d = fmaf((float)o->weight_decay, (float)w, (float)g);
        const float next = fmaf((float)(1.0 - o->dampening), d, (float)o->momentum * (float)b);
        put(&row->operand[FM_SGD_BUFFER], i, (double)next);
        put(&row->operand[FM_STEP_PARAM], i, (double)fmaf((float)-o->lr, fmaf((float)o->momentum, next, d), (float)w));
      }
    }
  }
}

typedef void operator_fn(const fm_list *list, const fm_options *options, fm_parallel_for parallel_for);

/* All tables and splits, with and without streaming stores, must leave the bytes of the first run. */
static uint64_t same_bytes(const char *name, operator_fn *run, fm_kernel *const *kernel_of, fm_dtype type, int operands,
                           unsigned exact, const fm_options *o) {
  const fm_kernels *tables[3];
  const int table_count = kernel_tables(tables);
  uint64_t first = 0;
  for (int t = 0; t < table_count; t++) {
    fm_active_kernels = tables[t];
    for (int s = 0; s < 4; s++) {
      fm_list list = make_list(type, operands, exact);
      if (s < 3) {
        run(&list, o, splits[s]);
      } else {
        const fm_job job = {&list, o, true};
        kernel_of[t](&job, 0, list.first_chunk[list.count]);
      }
      const uint64_t hash = hash_list(&list);
      first = t == 0 && s == 0 ? hash : first;
      CHECK(hash == first, "%s type %d: table %d split %d differs", name, (int)type, tables[t]->isa, s);
      free_list(&list);
    }
  }
  return first;
}

#define SAME_BYTES(name, function, type, operands, exact, options)                                                 \
  same_bytes(#name, function,                                                                                      \
             (fm_kernel *[]){tables[0]->name, tables[table_count > 1]->name, tables[table_count - 1]->name}, type, \
             operands, exact, options)

static void check_plain(const char *name, void (*plain)(fm_list *, const fm_options *), uint64_t hash, fm_dtype type,
                        int operands, unsigned exact, const fm_options *o) {
  fm_list list = make_list(type, operands, exact);
  plain(&list, o);
  CHECK(hash_list(&list) == hash, "%s type %d differs from the plain loop", name, (int)type);
  free_list(&list);
}

static void test_kernels(void) {
  const fm_kernels *tables[3];
  const int table_count = kernel_tables(tables);
  const unsigned ascend_exact = 1u << FM_ASCEND_PARAM | 1u << FM_ASCEND_OLD;
  const unsigned step_exact = 1u << FM_STEP_PARAM | 1u << FM_STEP_OLD;
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    fm_options o = some_options();
    uint64_t hash = SAME_BYTES(ascend, fm_sam_ascend, type, 3, ascend_exact, &o);
    check_plain("ascend", plain_ascend, hash, type, 3, ascend_exact, &o);
    hash = SAME_BYTES(restore_sgd, fm_restore_sgd, type, 4, step_exact, &o);
    check_plain("restore_sgd", plain_sgd, hash, type, 4, step_exact, &o);
    SAME_BYTES(restore, fm_restore, type, 2, step_exact, &o);
    const uint64_t amsgrad = SAME_BYTES(restore_adam, fm_restore_adam, type, 6, step_exact, &o);
    o.maximize = o.decoupled = true;
    CHECK(SAME_BYTES(restore_adam, fm_restore_adam, type, 6, step_exact, &o) != amsgrad, "options change the step");
    o.random = true;
    const uint64_t random = SAME_BYTES(ascend, fm_sam_ascend, type, 3, ascend_exact, &o);
    o.random = false;
    const uint64_t nearest = SAME_BYTES(ascend, fm_sam_ascend, type, 3, ascend_exact, &o);
    CHECK((random != nearest) == (fm_dtype_size(type) == 2), "type %d: chance is for 16 bits", (int)type);
    const double exponents[] = {1.0, 1.5, INFINITY};
    for (int e = 0; e < 3; e++) {
      o.q = exponents[e];
      SAME_BYTES(ascend, fm_sam_ascend, type, 3, ascend_exact, &o);
    }
  }
}

/* A strided tensor gives what its dense copy gives: rows of 7 in a matrix of width 11, and its transpose. */
static void test_strided(void) {
  enum { ROWS = 300, COLUMNS = 7, WIDTH = 11, COUNT = ROWS * COLUMNS };
  const fm_layout by_rows = {2, {ROWS, COLUMNS}, {WIDTH, 1}}, by_columns = {2, {COLUMNS, ROWS}, {1, WIDTH}};
  const fm_layout *layouts[] = {&by_rows, &by_columns};
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    const size_t size = fm_dtype_size(type);
    for (int l = 0; l < 2; l++) {
      fm_row strided = {.wide = type == FM_F64}, dense = {.wide = type == FM_F64};
      for (int k = 0; k < 3; k++) {
        const int64_t span = k < 2 ? (ROWS - 1) * WIDTH + COLUMNS : COUNT;
        strided.operand[k] = (fm_view){calloc((size_t)span, size), k < 2 ? layouts[l] : NULL, COUNT, type};
        dense.operand[k] = (fm_view){calloc(COUNT, size), NULL, COUNT, type};
      }
      const int64_t inner = layouts[l]->size[1];
      for (int64_t i = 0; i < COUNT; i++) {
        const int64_t at = i / inner * layouts[l]->stride[0] + i % inner * layouts[l]->stride[1];
        for (int k = 0; k < 2; k++) {
          put(&dense.operand[k], i, uniform((uint64_t)i, (uint32_t)k));
          put(&strided.operand[k], at, uniform((uint64_t)i, (uint32_t)k));
        }
      }
      int64_t first_chunk[2];
      fm_list a = {&strided, 1, first_chunk, NULL}, b = {&dense, 1, first_chunk, NULL};
      const fm_options o = some_options();
      fm_list_plan(&a);
      fm_sam_ascend(&a, &o, single_chunks_backwards);
      fm_sam_ascend(&b, &o, serial);
      for (int64_t i = 0; i < COUNT; i++) {
        const int64_t at = i / inner * layouts[l]->stride[0] + i % inner * layouts[l]->stride[1];
        CHECK(get(&strided.operand[0], at) == get(&dense.operand[0], i), "type %d element %lld", (int)type,
              (long long)i);
        CHECK(get(&strided.operand[2], i) == get(&dense.operand[2], i), "type %d backup %lld", (int)type, (long long)i);
      }
      for (int k = 0; k < 3; k++) {
        free(strided.operand[k].data);
        free(dense.operand[k].data);
      }
    }
  }
}

/* Norms whose squares leave the range of double, and NaN and infinity in any lane. */
static void test_extremes(void) {
  enum { COUNT = 5000 };
  const double scales[] = {5e-324, 1e-300, 1e-160, 1e-154, 1.0, 1e150, 1e155, 1e300};
  double *values = malloc(COUNT * sizeof *values);
  fm_row row = {.wide = true, .operand = {{(char *)values, NULL, COUNT, FM_F64}}};
  int64_t first_chunk[2];
  fm_sum partials[2];
  fm_list list = {&row, 1, first_chunk, partials};
  fm_list_plan(&list);
  for (int k = 0; k < 8; k++) {
    for (int64_t i = 0; i < COUNT; i++) {
      values[i] = scales[k];
    }
    for (int e = 0; e < 3; e++) {
      const fm_options o = {.q = e + 1.0};
      const double expected = scales[k] * pow(COUNT, 1.0 / o.q), got = fm_norm(&list, &o, serial);
      CHECK(fabs(got - expected) <= 1e-13 * expected + 5e-324, "%g q %g: %g", scales[k], o.q, got);
    }
    const int64_t places[] = {0, 1, 127, 128, 4095, 4096, COUNT - 1};
    for (int p = 0; p < 7; p++) {
      for (int e = 0; e < 4; e++) {
        const fm_options o = {.q = e < 3 ? e + 1.0 : INFINITY};
        values[places[p]] = NAN;
        CHECK(isnan(fm_norm(&list, &o, serial)), "NaN at %lld, q %g", (long long)places[p], o.q);
        values[places[p]] = -INFINITY;
        CHECK(isinf(fm_norm(&list, &o, serial)), "infinity at %lld, q %g", (long long)places[p], o.q);
        values[places[p]] = scales[k];
      }
    }
  }
  free(values);
}

int main(int argc, char **argv) {
  const struct {
    const char *name;
    void (*run)(void);
  } tests[] = {{"conversions", test_conversions}, {"rounding", test_rounding}, {"pow", test_pow},
               {"philox", test_philox},           {"norm", test_norm},         {"tree", test_tree},
               {"kernels", test_kernels},         {"strided", test_strided},   {"extremes", test_extremes}};
  bool found = false;
  for (size_t k = 0; k < sizeof tests / sizeof *tests; k++) {
    if (argc == 2 && strcmp(argv[1], tests[k].name) == 0) {
      tests[k].run();
      found = true;
    }
  }
  if (!found) {
    fprintf(stderr, "give the name of one test\n");
    return 2;
  }
  return fm_failures == 0 ? 0 : 1;
}
