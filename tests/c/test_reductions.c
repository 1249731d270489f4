/* The reductions: values against long double, bits over instruction sets and splits. */
#include "check.h"
#include "lists.h"
#include "tests.h"

#include <stdlib.h>

#define WEIGHTED (FM_BIT(FM_GRAD) | FM_BIT(FM_PARAM))
#define CURVED (FM_BIT(FM_PARAM) | FM_AVERAGES)

static const double roundoff = 0x1p-53;

/* ---- norms ---- */

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

/* ---- inner products ---- */

enum { GRAM_LISTS = FM_BIT(0) | FM_BIT(1) | FM_BIT(2) | FM_BIT(3), MOST_SUMS = FM_DOT_SUMS };

/* The upper triangle of the Gram matrix in long double, and what the roundings of `result` are bounded by: the sum of
 * the products' magnitudes. */
static void gram_of(const fm_list *list, int lists, long double *gram, long double *magnitudes) {
  int pair = 0;
  for (int a = 0; a < lists; a++) {
    for (int b = a; b < lists; b++, pair++) {
      gram[pair] = magnitudes[pair] = 0.0L;
      for (int64_t r = 0; r < list->count; r++) {
        for (int64_t i = 0; i < list->rows[r].numel; i++) {
          const long double x = (long double)get(&list->rows[r].operand[a], i) * get(&list->rows[r].operand[b], i);
          gram[pair] += x;
          magnitudes[pair] += fabsl(x);
        }
      }
    }
  }
}

/* dot of a list, by every table and split: the same bits, those of partial results included. */
static void dot_everywhere(const fm_list *list, const fm_options *o, double *result, const char *what) {
  const fm_kernels *tables[MOST_TABLES];
  const int table_count = kernel_tables(tables), count = fm_dot_sums(o->lists);
  const size_t partials = (size_t)list->first_chunk[list->count] * (size_t)fm_dot_planes(o->lists);
  uint64_t first = 0;
  for (int t = 0; t < table_count; t++) {
    fm_active_kernels = tables[t];
    for (int s = 0; s < SPLITS; s++) {
      double got[MOST_SUMS + 1];
      got[count] = -1.0;
      memset(list->partials, 0xa5, partials * sizeof *list->partials);
      run_split(tables[t]->dot, list, o, false, splits[s]);
      uint64_t hash = hash_bytes(list->partials, partials * sizeof *list->partials, 0);
      fm_dot(list, o, got, splits[s]);
      hash = hash_bytes(got, (size_t)count * sizeof *got, hash);
      first = t == 0 && s == 0 ? hash : first;
      CHECK(hash == first && got[count] == -1.0, "%s of %d: table %d split %d", what, o->lists, tables[t]->isa, s);
      memcpy(result, got, (size_t)count * sizeof *got);
    }
  }
}

/* Lists of every type and of mixed ones. A product of float32 is exact, of float64 one rounding; 16 + 8 + 5 additions.
 * The diagonal is the square of the norm, bit by bit: the same terms and the same tree. */
void test_dot(void) {
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    for (int exact = 0; exact < 2; exact++) {
      fm_list list = make_list(type, GRAM_LISTS, exact ? GRAM_LISTS : FM_BIT(0));
      free(list.partials);
      list.partials = malloc((size_t)(3 * list.first_chunk[list.count]) * sizeof *list.partials);
      for (int lists = 2; lists <= FM_DOT_LISTS; lists++) {
        long double want[MOST_SUMS], magnitudes[MOST_SUMS];
        double got[MOST_SUMS] = {0.0};
        const fm_options o = {.q = 2.0, .lists = lists};
        gram_of(&list, lists, want, magnitudes);
        dot_everywhere(&list, &o, got, "dot");
        for (int pair = 0; pair < fm_dot_sums(lists); pair++) {
          CHECK(fabsl(got[pair] - want[pair]) <= 30 * roundoff * magnitudes[pair],
                "type %d, %d of %d: %.17g, not %.17Lg", (int)type, pair, lists, got[pair], want[pair]);
        }
        fm_list squared = copy_list(&list);
        for (int64_t r = 0; r < list.count; r++) {
          free(squared.rows[r].operand[FM_GRAD].data);
          squared.rows[r].operand[FM_GRAD] = squared.rows[r].operand[1];
          squared.rows[r].operand[1].data = NULL;
          squared.rows[r].traits.scaling = FM_SCALE_NONE;
        }
        const double norm = fm_norm(&squared, &o, splits[0]), diagonal = sqrt(got[lists]); /* (1, 1) */
        CHECK(fm_bits_f64(norm) == fm_bits_f64(diagonal), "type %d: norm %.17g, not %.17g", (int)type, norm, diagonal);
        free_list(&squared);
      }
      free_list(&list);
    }
  }
  const fm_options o = {.lists = 3};
  double none[MOST_SUMS] = {1.0, 1.0, 1.0, 1.0, 1.0, 1.0};
  int64_t first_chunk[1] = {0};
  const fm_list empty = {NULL, 0, first_chunk, NULL};
  fm_dot(&empty, &o, none, splits[0]);
  for (int pair = 0; pair < 6; pair++) {
    CHECK(none[pair] == 0.0, "of nothing: %g", none[pair]);
  }
}

/* One element that is not finite spoils the sums of its list, in every lane, and no others. */
void test_dot_not_finite(void) {
  const int64_t size = 5000, places[] = {0, 1, 127, 128, 255, 256, 4095, 4096, 4999};
  const double wrong[] = {NAN, INFINITY, -INFINITY};
  for (fm_dtype type = FM_F32; type <= FM_F64; type++) {
    for (size_t p = 0; p < sizeof places / sizeof *places; p++) {
      for (int bad = 0; bad < FM_DOT_LISTS; bad++) {
        fm_list list = make_list_of(&size, 1, type, GRAM_LISTS, GRAM_LISTS);
        free(list.partials);
        list.partials = malloc(6 * sizeof *list.partials);
        const fm_options o = {.lists = FM_DOT_LISTS};
        double got[MOST_SUMS];
        put(&list.rows[0].operand[bad], places[p], wrong[p % 3]);
        put(&list.rows[0].operand[(bad + 1) % FM_DOT_LISTS], places[p], 0.0);
        fm_dot(&list, &o, got, splits[0]);
        int pair = 0;
        for (int a = 0; a < FM_DOT_LISTS; a++) {
          for (int b = a; b < FM_DOT_LISTS; b++, pair++) {
            CHECK(isfinite(got[pair]) == (a != bad && b != bad), "%g in list %d at %lld: (%d, %d) is %g", wrong[p % 3],
                  bad, (long long)places[p], a, b, got[pair]);
          }
        }
        free_list(&list);
      }
    }
  }
}

/* ---- PACGen ---- */

typedef struct pacgen_sum {
  long double sum, bound; /* bound: of what the roundings of the terms can add up to */
  double capped, near;    /* near: elements where a last bit decides whether they are capped */
} pacgen_sum;

/* log((|w| + N) max(sqrt c, 1 / N)) by its definition. */
static void add_pacgen(pacgen_sum *to, double w, double h, double lipschitz, const fm_options *o) {
  const long double n = (long double)o->gamma * fabsl((long double)w) + o->eps;
  const long double rise = (long double)o->lipschitz * lipschitz * n, flat = (long double)o->curvature_scale * h;
  const long double c = rise + flat > 0.0L ? rise + flat : 0.0L;
  if (fabsl(w) + n == 0.0L) {
    to->capped++;
    return;
  }
  const bool capped = c * n * n <= 1.0L;
  to->sum += logl((fabsl((long double)w) + n) * (capped ? 1.0L / n : sqrtl(c)));
  to->capped += capped ? 1.0 : 0.0;
  to->near += fabsl(c * n * n - 1.0L) < 1e-12L ? 1.0 : 0.0;
  /* N takes one rounding, (|w| + N)^2 five, N^2 three, c three (times its condition), c N^2 four more, X and the two
   * products one each; half of them after the root. */
  to->bound += roundoff * (capped ? 5.5L : 7.5L + 1.5L * (fabsl(rise) + fabsl(flat)) / c);
}

static pacgen_sum pacgen_of(const fm_row *row, const fm_options *o) {
  pacgen_sum sum = {0};
  const fm_view *rho = &row->operand[FM_LIPSCHITZ];
  for (int64_t i = 0; i < row->numel; i++) {
    add_pacgen(&sum, get(&row->operand[FM_PARAM], i), get(&row->operand[FM_CURVATURE], i),
               rho->data != NULL ? get(rho, i) : 1.0, o);
  }
  sum.bound += 6 * roundoff * fabsl(sum.sum); /* of ln 2, the last logarithm and two products */
  return sum;
}

static void check_pacgen(const fm_list *list, const fm_options *o, const char *what) {
  double *result = malloc(2 * ((size_t)list->count + 1) * sizeof *result);
  fm_pacgen(list, o, result, splits[0]);
  for (int64_t r = 0; r < list->count; r++) {
    const pacgen_sum want = pacgen_of(&list->rows[r], o);
    CHECK(fabsl(result[2 * r] - want.sum) <= want.bound, "%s row %lld: %.17g, not %.17Lg +- %.2Lg", what, (long long)r,
          result[2 * r], want.sum, want.bound);
    CHECK(fabs(result[2 * r + 1] - want.capped) <= want.near, "%s row %lld: %g capped, not %g", what, (long long)r,
          result[2 * r + 1], want.capped);
  }
  free(result);
}

/* Values by hand: gamma = eps = 0.1, so that N = (0.2, 0.15, 0.125, 0.1). The first: c = (201, 400.75, 50.625, 0.2),
 * log terms ln(1.2 sqrt 201), ln(0.65 sqrt 400.75), ln 3 and ln 1; the second, all capped: ln 6 + ln(13 / 3) + ln 3. */
static void check_pacgen_by_hand(void) {
  float w[] = {1.0F, -0.5F, 0.25F, 0.0F}, h[2][4] = {{200.0F, 400.0F, 50.0F, -0.3F}, {2.0F, 0.1F, 0.0F, -0.3F}};
  const double lipschitz[] = {5.0, 0.5};
  const double sums[] = {6.4984722791, 4.3567088267}, capped[] = {2.0, 4.0};
  for (int k = 0; k < 2; k++) {
    fm_row row = {.numel = 4, .operand = {[FM_PARAM] = {(char *)w, NULL, FM_F32}}};
    row.operand[FM_CURVATURE] = (fm_view){(char *)h[k], NULL, FM_F32};
    int64_t first_chunk[2];
    fm_sum partial;
    fm_list list = {&row, 1, first_chunk, &partial};
    fm_list_plan(&list);
    const fm_options o = {.gamma = 0.1, .eps = 0.1, .lipschitz = lipschitz[k], .curvature_scale = 1.0};
    double result[2];
    fm_pacgen(&list, &o, result, splits[0]);
    CHECK(fabs(result[0] - sums[k]) < 1e-7 && result[1] == capped[k], "%.11g, %g capped", result[0], result[1]);
  }
}

void test_pacgen(void) {
  check_pacgen_by_hand();
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    for (int constant = 0; constant < 2; constant++) {
      fm_list list = make_list(type, constant ? CURVED & ~FM_BIT(FM_LIPSCHITZ) : CURVED, FM_BIT(FM_PARAM));
      fm_options o = some_options();
      o.curvature_scale = 20.0; /* half of the elements are capped */
      check_pacgen(&list, &o, "ordinary");
      o.eps = 0.0;
      o.curvature_scale = 1e9;
      put(&list.rows[3].operand[FM_PARAM], 7, 0.0);
      check_pacgen(&list, &o, "no eps");
      free_list(&list);
    }
  }
}

/* Lanes that multiply numbers next to the largest float64: they give the sum or, beyond what is promised, a NaN, and
 * never another number. */
static void check_pacgen_overflow(void) {
  enum { COUNT = 1024 };
  double w[COUNT], h[COUNT] = {0.0}, result[2];
  fm_row row = {.fp64 = true, .numel = COUNT, .operand = {[FM_PARAM] = {(char *)w, NULL, FM_F64}}};
  row.operand[FM_CURVATURE] = (fm_view){(char *)h, NULL, FM_F64};
  int64_t first_chunk[2];
  fm_sum partial;
  fm_list list = {&row, 1, first_chunk, &partial};
  fm_list_plan(&list);
  const fm_options o = {.gamma = 0.5};
  int numbers = 0;
  for (int k = 0; k < 92; k++) { /* |w| + N from 1e153 to 1.5e154: its square is beyond from 1.34e154 on */
    const double reach = 1e153 * pow(1.03, k);
    for (int i = 0; i < COUNT; i++) {
      w[i] = reach / 1.5 * (1.0 - 1e-3 * (i % 7));
    }
    const pacgen_sum want = pacgen_of(&row, &o);
    fm_pacgen(&list, &o, result, splits[0]);
    numbers += isnan(result[0]) ? 0 : 1;
    CHECK(isnan(result[0]) || fabsl(result[0] - want.sum) <= want.bound, "|w| + N = %g: %.17g, not %.17Lg", reach,
          result[0], want.sum);
  }
  CHECK(numbers > 60, "%d numbers", numbers);
}

/* Rows of five elements, the second of which is special; a sum that is not finite is that row's alone. */
void test_pacgen_limits(void) {
  check_pacgen_overflow();
  const struct {
    double w, h;
    fm_dtype type;
    bool is_number;
  } cases[] = {
      {0.0, 5.0, FM_F32, true},  /* without a neighbourhood: adds nothing */
      {0.0, NAN, FM_F32, false}, /* but swallows no NaN */
      {1.0, NAN, FM_F32, false},       {NAN, 1.0, FM_F32, false},
      {1.0, INFINITY, FM_F32, false},  {INFINITY, 1.0, FM_F32, false},
      {1.0, -INFINITY, FM_F32, false}, /* as of infinity */
      {3e38, 3e38, FM_F32, true},      {3e38, 1e-45, FM_F32, true},
      {1e-45, 3e38, FM_F32, true},     {1e-45, 1e-45, FM_F32, true},
      {-65504.0, 6e-8, FM_F16, true},  {6e-8, 65504.0, FM_F16, true},
      {-3e38, 3e38, FM_BF16, true},    {1e30, 1e150, FM_F64, true},
      {1e-152, 1e300, FM_F64, true},   {1e150, 1e-320, FM_F64, true},
      {1e-152, 0.0, FM_F64, true},     {1e160, 1.0, FM_F64, false}, /* its square is beyond float64 */
      {1e-160, 1.0, FM_F64, false},                                 /* and that of its neighbourhood below */
      {1e70, 1e150, FM_F64, false},                                 /* (|w| + N)^2 c N^2 */
  };
  enum { CASES = sizeof cases / sizeof *cases, FEW = 5 };
  fm_row rows[CASES];
  double memory[CASES][2][FEW];
  int64_t first_chunk[CASES + 1];
  fm_sum partials[CASES];
  fm_options o = some_options();
  o.eps = 0.0;
  o.lipschitz = 0.0;
  for (int r = 0; r < CASES; r++) {
    rows[r] = (fm_row){.numel = FEW, .fp64 = cases[r].type == FM_F64};
    rows[r].operand[FM_PARAM] = (fm_view){(char *)memory[r][0], NULL, cases[r].type};
    rows[r].operand[FM_CURVATURE] = (fm_view){(char *)memory[r][1], NULL, cases[r].type};
    for (int64_t i = 0; i < FEW; i++) {
      put(&rows[r].operand[FM_PARAM], i, i == 1 ? cases[r].w : 1.5 + (double)i);
      put(&rows[r].operand[FM_CURVATURE], i, i == 1 ? cases[r].h : (double)i);
    }
  }
  fm_list list = {rows, CASES, first_chunk, partials};
  fm_list_plan(&list);
  double result[2 * CASES];
  fm_pacgen(&list, &o, result, splits[0]);
  for (int r = 0; r < CASES; r++) {
    const pacgen_sum want = pacgen_of(&rows[r], &o);
    if (cases[r].is_number) {
      CHECK(fabsl(result[2 * r] - want.sum) <= want.bound && result[2 * r + 1] == want.capped,
            "w %g h %g: %.17g, not %.17Lg", cases[r].w, cases[r].h, result[2 * r], want.sum);
    } else {
      CHECK(isnan(result[2 * r]) && isnan(result[2 * r + 1]), "w %g h %g: %g", cases[r].w, cases[r].h, result[2 * r]);
    }
  }
}

/* A chunk's partial result by fm_pacgen_term alone: lane by lane, halves on halves. */
static fm_sum pacgen_chunk(const fm_row *row, const fm_options *o) {
  fm_sum lanes[FM_LANES] = {{0}};
  for (int64_t i = 0; i < row->numel; i++) {
    const fm_view *rho = &row->operand[FM_LIPSCHITZ];
    fm_pacgen_term(&lanes[i % FM_LANES], get(&row->operand[FM_PARAM], i), get(&row->operand[FM_CURVATURE], i),
                   rho->data != NULL ? get(rho, i) : 1.0, o);
  }
  for (int half = FM_LANES / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; l++) {
      lanes[l] = fm_fold(lanes[l], lanes[l + half], FM_TERM_PACGEN);
    }
  }
  return lanes[0];
}

static bool same_bits(fm_sum a, fm_sum b) {
  return fm_bits_f64(a.mid) == fm_bits_f64(b.mid) && fm_bits_f64(a.big) == fm_bits_f64(b.big) &&
         fm_bits_f64(a.small) == fm_bits_f64(b.small) && fm_bits_f64(a.rest) == fm_bits_f64(b.rest);
}

/* Lanes whose products stay in float64 and lanes whose products leave it, be it on the way only, give the bits of
 * fm_pacgen_term, which a GPU has. Weights lie between 2^-spread and 2^spread; or, without curvature, 11 of a lane's 16
 * at 2^-spread and then 5 at 2^18, whose product is a normal number again. */
void test_pacgen_products(void) {
  static double w[FM_CHUNK], h[FM_CHUNK], rho[FM_CHUNK];
  const int64_t sizes[] = {5, 300, FM_CHUNK};
  fm_options o = {.gamma = 0.5, .curvature_scale = 1.0};
  for (int k = 0; k <= 400; k++) {
    const int spread = k / 2, falls = k % 2;
    for (int64_t i = 0; i < FM_CHUNK; i++) {
      const fm_quad words = fm_random_quad(1, (uint64_t)k, 3, (uint64_t)i);
      const double between = (double)spread * fm_uniform(words.word[1]);
      const int exponent = !falls ? (int)between : i < 11 * FM_LANES ? -spread : 18;
      w[i] = ldexp((double)fm_uniform(words.word[0]), exponent);
      h[i] = falls ? -1.0 : (double)fm_uniform(words.word[2]);
      rho[i] = (double)fm_uniform(words.word[3]);
    }
    o.eps = k % 4 == 2 ? 0.25 : 0.0;
    o.lipschitz = falls ? 0.0 : 0.3;
    for (size_t s = 0; s < 2 * sizeof sizes / sizeof *sizes; s++) {
      fm_row row = {.fp64 = true, .numel = sizes[s / 2], .operand = {[FM_PARAM] = {(char *)w, NULL, FM_F64}}};
      row.operand[FM_CURVATURE] = (fm_view){(char *)h, NULL, FM_F64};
      row.operand[FM_LIPSCHITZ] = (fm_view){s % 2 == 0 ? (char *)rho : NULL, NULL, FM_F64};
      int64_t first_chunk[2];
      fm_sum partial;
      fm_list list = {&row, 1, first_chunk, &partial};
      fm_list_plan(&list);
      double result[2];
      fm_pacgen(&list, &o, result, splits[0]);
      const fm_sum want = pacgen_chunk(&row, &o);
      CHECK(same_bits(partial, want), "%d, %lld weights: 2^%.17g (1 + %.17g) / (1 + %.17g)", k, (long long)row.numel,
            partial.mid, partial.big, partial.small);
    }
  }
}

/* No digit is lost over ten million terms: a double that the logarithms are added to would lose three. */
void test_pacgen_digits(void) {
  enum { COUNT = 10 * 1000 * 1000, PART = 4000 };
  float *w = malloc(COUNT * sizeof *w), *h = malloc(COUNT * sizeof *h);
  const fm_options o = {.gamma = 0.1, .eps = 1e-5, .lipschitz = 0.3, .curvature_scale = 900.0};
  pacgen_sum want = {0};
  for (int64_t part = 0; part < COUNT; part += PART) { /* in parts, so that long double keeps its digits too */
    pacgen_sum sum = {0};
    for (int64_t i = part; i < part + PART; i++) {
      const fm_quad words = fm_random_quad(1, 2, 3, (uint64_t)i);
      w[i] = fm_uniform(words.word[0]);
      h[i] = fabsf(fm_uniform(words.word[1]));
      add_pacgen(&sum, (double)w[i], (double)h[i], 1.0, &o);
    }
    want.sum += sum.sum;
    want.capped += sum.capped;
    want.near += sum.near;
  }
  fm_row row = {.numel = COUNT, .operand = {[FM_PARAM] = {(char *)w, NULL, FM_F32}}};
  row.operand[FM_CURVATURE] = (fm_view){(char *)h, NULL, FM_F32};
  int64_t first_chunk[2];
  fm_list list = {&row, 1, first_chunk, malloc((size_t)fm_chunks_of(COUNT) * sizeof(fm_sum))};
  fm_list_plan(&list);
  double result[2];
  fm_pacgen(&list, &o, result, splits[0]);
  CHECK(fabsl(result[0] - want.sum) <= 1e-15L * want.sum, "%.17g, not %.19Lg", result[0], want.sum);
  CHECK(fabs(result[1] - want.capped) <= want.near, "%.17g capped, not %.17g", result[1], want.capped);
  free(w);
  free(h);
  free(list.partials);
}
