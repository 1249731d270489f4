/* PACGen: its sums against their definition in long double, limits, overflow, the products that carry them. */
#include "check.h"
#include "lists.h"
#include "tests.h"

#include <stdlib.h>

#define CURVED (FM_BIT(FM_PARAM) | FM_AVERAGES)

static const double roundoff = 0x1p-53;

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
