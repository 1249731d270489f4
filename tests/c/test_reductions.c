/* Norms, and what all reductions share: values against long double, bits over instruction sets and splits. */
#include "check.h"
#include "lists.h"
#include "tests.h"

#include <stdlib.h>

#define WEIGHTED (FM_BIT(FM_GRAD) | FM_BIT(FM_PARAM))

static const double roundoff = 0x1p-53;

/* |T g| of an element. */
static long double magnitude(const fm_row *row, int64_t i, double eta) {
  const int scaling = row->traits.scaling;
  const double g = get(&row->operand[FM_GRAD], i);
  const double w = row->operand[FM_PARAM].data != NULL ? fabs(get(&row->operand[FM_PARAM], i)) : 0.0;
  const double t = scaling == FM_SCALE_ASAM ? w + eta : scaling == FM_SCALE_DAVDA54 ? w : 1.0;
  return fabsl((long double)t * g);
}

static long double norm_of(const fm_list *list, const fm_options *o) {
  long double sum = 0.0L, top = 0.0L;
  for (int64_t r = 0; r < list->count; r++) {
    for (int64_t i = 0; i < list->rows[r].numel; i++) {
      const long double x = magnitude(&list->rows[r], i, o->eta);
      sum += o->q == 1.0 ? x : o->q == 2.0 ? x * x : isinf(o->q) ? 0.0L : powl(x, o->q);
      top = x > top ? x : top;
    }
  }
  return isinf(o->q) ? top : o->q == 1.0 ? sum : o->q == 2.0 ? sqrtl(sum) : powl(sum, 1.0L / o->q);
}

void test_norm(void) {
  const double exponents[] = {1.0, 1.5, 2.0, 3.0, 51.0, INFINITY};
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    fm_list list = make_list(type, WEIGHTED, FM_BIT(FM_GRAD));
    for (int e = 0; e < 6; e++) {
      fm_options o = some_options();
      o.q = exponents[e];
      const long double expected = norm_of(&list, &o);
      const double got = fm_norm(&list, &o, splits[0]);
      CHECK(fabsl(got - expected) <= 1e-13L * expected, "type %d q %g: %.17g, not %.17Lg", type, o.q, got, expected);
      if (isinf(o.q)) {
        o.norm = got;
        CHECK(fm_ties(&list, &o, splits[0]) == 1.0, "type %d: one element attains the maximum", type);
      }
    }
    free_list(&list);
  }
}

static int passes;

static void counted(int64_t begin, int64_t end, int64_t grain, fm_range_fn fn, void *context) {
  passes++;
  splits[0](begin, end, grain, fn, context);
}

/* A sum of magnitudes is one pass over the list; a float64 tensor anywhere in it makes it two, the first for the
 * largest. Both give the norm to the roundings of |T g|, two, of 16 + 8 + 5 additions and, in the second, of a quotient
 * and a product. */
void test_one_pass(void) {
  const int64_t sizes[] = {3, 70000, 4097, 1};
  const fm_dtype types[] = {FM_F32, FM_BF16, FM_F16, FM_F64, FM_F32};
  for (int wide = -1; wide < 4; wide++) { /* the row of float64, if any */
    fm_list list = make_list_of(sizes, 4, types[wide + 1], WEIGHTED, FM_BIT(FM_GRAD));
    fm_list other = make_list_of(sizes, 4, FM_F64, WEIGHTED, FM_BIT(FM_GRAD));
    if (wide >= 0) {
      const fm_row row = list.rows[wide];
      list.rows[wide] = other.rows[wide];
      other.rows[wide] = row;
    }
    fm_options o = some_options();
    o.q = 1.0;
    passes = 0;
    const double got = fm_norm(&list, &o, counted);
    const long double expected = norm_of(&list, &o);
    CHECK(passes == (wide < 0 ? 1 : 2), "row %d of float64: %d passes", wide, passes);
    CHECK(fabsl(got - expected) <= 33 * roundoff * expected, "row %d: %.17g, not %.17Lg", wide, got, expected);
    free_list(&list);
    free_list(&other);
  }
}

/* Each row by itself. Rows around one whose squares leave the range of double do not see it. */
void test_row_norms(void) {
  const double scales[] = {1.0, 1e-300, 1.0, 1e300, 1.0, 0.0};
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    fm_list list = make_list(type, FM_BIT(FM_GRAD), FM_BIT(FM_GRAD));
    double result[32];
    for (int64_t r = 0; r < list.count; r++) {
      list.rows[r].traits.scaling = FM_SCALE_NONE;
      for (int64_t i = 0; type == FM_F64 && i < list.rows[r].numel; i++) {
        put(&list.rows[r].operand[FM_GRAD], i, scales[r % 6] * get(&list.rows[r].operand[FM_GRAD], i));
      }
    }
    const fm_options o = some_options();
    fm_row_norms(&list, &o, result, splits[0]);
    for (int64_t r = 0; r < list.count; r++) {
      const fm_list row = {&list.rows[r], 1, NULL, NULL};
      const long double expected = norm_of(&row, &o);
      /* 16 elements a lane, 8 folds of lanes, 2 of chunks, a square and two numbers scaled: half of it after the root
       */
      CHECK(fabsl(result[r] - expected) <= 16 * roundoff * expected, "type %d row %lld: %.17g, not %.17Lg", (int)type,
            (long long)r, result[r], expected);
    }
    free_list(&list);
  }
}

/* The promise: partial results fold the same whatever the split, for any number of chunks. */
void test_tree(void) {
  const fm_kernels *tables[MOST_TABLES];
  const int table_count = kernel_tables(tables);
  for (int64_t n = 0; n < 70 * FM_CHUNK; n += 3 * FM_CHUNK + 17) {
    fm_list list = make_list_of(&n, 1, FM_F32, FM_BIT(FM_GRAD), 0);
    fm_options o = some_options();
    fm_active_kernels = tables[0];
    const double expected = fm_norm(&list, &o, splits[0]);
    double row = 0.0;
    fm_row_norms(&list, &o, &row, splits[1]);
    CHECK(fm_bits_f64(row) == fm_bits_f64(expected), "n %lld: the only row", (long long)n);
    for (int t = 0; t < table_count; t++) {
      fm_active_kernels = tables[t];
      for (int s = 0; s < SPLITS; s++) {
        const double got = fm_norm(&list, &o, splits[s]);
        CHECK(fm_bits_f64(got) == fm_bits_f64(expected), "n %lld table %d split %d", (long long)n, tables[t]->isa, s);
      }
    }
    CHECK(n == 0 || fabs(expected / sqrt((double)n / 3.0) - 1.0) < 0.05, "n %lld: uniform in [-1, 1]", (long long)n);
    free_list(&list);
  }
}

/* Every reduction's partial results, one a chunk, are the same from all tables and splits. */
void test_reductions(void) {
  const fm_kernels *tables[MOST_TABLES];
  const int table_count = kernel_tables(tables);
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    fm_list list = make_list(type, WEIGHTED | FM_AVERAGES, FM_BIT(FM_GRAD) | FM_BIT(FM_PARAM));
    const size_t bytes = (size_t)list.first_chunk[list.count] * sizeof *list.partials;
    fm_options o = some_options();
    o.q = 1.5;
    o.norm = fabs(get(&list.rows[4].operand[FM_GRAD], 77)); /* which is unscaled: a tie */
    for (int term = 0; term < FM_REDUCTION_COUNT; term++) {
      uint64_t first = 0;
      for (int t = 0; t < table_count; t++) {
        for (int s = 0; s < SPLITS; s++) {
          memset(list.partials, 0xa5, bytes);
          run_split(tables[t]->reduce[term], &list, &o, false, splits[s]);
          const uint64_t hash = hash_bytes(list.partials, bytes, 0);
          first = t == 0 && s == 0 ? hash : first;
          CHECK(hash == first, "term %d type %d: table %d split %d", term, (int)type, tables[t]->isa, s);
        }
      }
    }
    CHECK(fm_ties(&list, &o, splits[0]) >= 1.0, "type %d", (int)type);
    free_list(&list);
  }
}

/* Norms whose squares leave the range of double, and NaN and infinity in any lane. */
void test_extremes(void) {
  enum { COUNT = 5000 };
  const double scales[] = {5e-324, 1e-300, 1e-160, 1e-154, 1.0, 1e150, 1e155, 1e300};
  const int64_t places[] = {0, 1, 127, 128, 255, 256, 4095, 4096, COUNT - 1};
  double *values = malloc(COUNT * sizeof *values);
  fm_row row = {.fp64 = true, .numel = COUNT, .operand = {[FM_GRAD] = {(char *)values, NULL, FM_F64}}};
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
      const double expected = scales[k] * pow(COUNT, 1.0 / o.q), got = fm_norm(&list, &o, splits[0]);
      CHECK(fabs(got - expected) <= 1e-13 * expected + 5e-324, "%g q %g: %g", scales[k], o.q, got);
    }
    for (size_t p = 0; p < sizeof places / sizeof *places; p++) {
      for (int e = 0; e < 4; e++) {
        const fm_options o = {.q = e < 3 ? e + 1.0 : INFINITY};
        values[places[p]] = NAN;
        CHECK(isnan(fm_norm(&list, &o, splits[0])), "NaN at %lld, q %g", (long long)places[p], o.q);
        values[places[p]] = -INFINITY;
        CHECK(isinf(fm_norm(&list, &o, splits[0])), "infinity at %lld, q %g", (long long)places[p], o.q);
        values[places[p]] = scales[k];
      }
    }
  }
  free(values);
}
