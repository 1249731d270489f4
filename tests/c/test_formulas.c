/* The updates against expressions of their own: noise by curvature, base steps, averages, linear combinations, Lion. */
#include "check.h"
#include "lists.h"
#include "tests.h"

#include <stdlib.h>

/* ---- the formulas of curvature-scaled noise, from their text: in float64, where few digits are lost ---- */

typedef struct expected_noise {
  double sigma, cut; /* of the truncated law, in sigmas */
  bool capped;
} expected_noise;

/* N = gamma |w| + eps, c = max(h + rho N, 0), sigma = min(scale / sqrt c, N). */
static expected_noise noise_of(const update_case *c, double w, double h, double rho) {
  const fm_options *o = &c->options;
  const double n = o->gamma * fabs(w) + o->eps;
  if (o->sizing != FM_SIZE_CURVATURE) {
    return (expected_noise){o->scale * (o->sizing == FM_SIZE_GIVEN ? h : n), 1.0, false};
  }
  const double curvature = fmax(o->curvature_scale * h + o->lipschitz * rho * n, 0.0);
  const double wanted = curvature > 0.0 ? o->scale / sqrt(curvature) : INFINITY;
  return (expected_noise){fmin(wanted, n), n / fmin(wanted, n), wanted >= n};
}

/* w + sigma xi. The truncated law has the mass of its uniform number (see test_truncation for the bound). */
static void check_noise(const update_case *c, const fm_row *before, const fm_row *after, int64_t r, int64_t i,
                        double *tally) {
  const double w = get(&before->operand[FM_PARAM], i), moved = get(&after->operand[FM_PARAM], i) - w;
  const fm_view *h = &before->operand[FM_CURVATURE], *rho = &before->operand[FM_LIPSCHITZ];
  const expected_noise want = noise_of(c, w, h->data != NULL ? get(h, i) : 0.0, rho->data != NULL ? get(rho, i) : 1.0);
  const fm_quad words = fm_random_quad(c->options.seed, c->options.step, (uint32_t)r, (uint64_t)i / 4);
  const double draw = (double)fm_draw_quad(words, c->options.law).value[i % 4];
  CHECK(get(&after->operand[FM_OLD], i) == w, "%s: backup", c->name);
  const double size = fabs(want.sigma); /* sizes that are given may be negative */
  if (c->options.law == FM_LAW_TRUNCATED) {
    const double mass = erf(moved / want.sigma / sqrt(2.0)), all = erf(want.cut / sqrt(2.0));
    CHECK(fabs(mass - draw * all) <= 5.3e-7, "%s: mass %g, not %g", c->name, mass, draw * all);
    CHECK(fabs(moved) <= size * want.cut * (1.0 + 1e-14), "%s: moved %g", c->name, moved);
  } else { /* 30: what is lost in c where it comes near 0, and is not capped yet */
    const double bound = 30 * 0x1p-52 * (fabs(w) + size * fabs(draw));
    CHECK(fabs(moved - want.sigma * draw) <= bound, "%s: moved %.17g, not %.17g", c->name, moved, want.sigma * draw);
  }
  tally[0] += want.sigma;
  tally[1] += want.capped ? 1.0 : 0.0;
  tally[2] += size;
}

void test_noise(void) {
  update_case cases[MOST_CASES];
  const int count = update_cases(cases);
  for (int k = 0; k < count; k++) {
    if (cases[k].update != FM_SCALED_NOISE) {
      continue;
    }
    fm_list before = make_list(FM_F64, cases[k].operands, ~0u), after = copy_list(&before);
    const fm_sum got = fm_run_update(FM_SCALED_NOISE, &after, &cases[k].options, NULL, splits[0]);
    double tally[3] = {0.0}, elements = 0.0;
    for (int64_t r = 0; r < before.count; r++) {
      for (int64_t i = 0; i < before.rows[r].numel; i++) {
        check_noise(&cases[k], &before.rows[r], &after.rows[r], r, i, tally);
        elements += 1.0;
      }
    }
    CHECK(fabs(got.mid - tally[0]) <= 1e-11 * tally[2] && got.big == tally[1] && got.small == 0.0,
          "%s: %.17g, %g, %g, not %.17g, %g, 0", cases[k].name, got.mid, got.big, got.small, tally[0], tally[1]);
    if (cases[k].options.sizing == FM_SIZE_CURVATURE) {
      CHECK(got.big > 0.2 * elements && got.big < 0.8 * elements, "%g of %g are capped", got.big, elements);
    }
    free_list(&before);
    free_list(&after);
  }
}

/* ---- the formulas of the base steps and of the averages ---- */

/* torch.optim.SGD and Adam as their documentation states them, and Lion as its paper's Algorithm 2. */
static double expected_step(const update_case *c, const fm_row *row, const double *v) {
  const fm_options *o = &c->options;
  const bool adam = c->update == FM_RESTORE_ADAM || c->update == FM_RESTORE_ADAM_CURVATURE;
  const bool lion = c->update == FM_RESTORE_LION || c->update == FM_RESTORE_LION_CURVATURE;
  double w = v[FM_OLD], g = o->maximize ? -v[FM_GRAD] : v[FM_GRAD];
  if (lion) {
    const double mixed = o->beta1 * v[FM_MEAN] + (1.0 - o->beta1) * g;
    return w - o->lr * ((mixed > 0.0) - (mixed < 0.0) + o->weight_decay * w);
  }
  if (adam) {
    w = o->decoupled ? w - o->lr * o->weight_decay * w : w;
    g = o->decoupled ? g : g + o->weight_decay * v[FM_OLD];
    const double m = o->beta1 * v[FM_MEAN] + (1.0 - o->beta1) * g;
    const double square = o->beta2 * v[FM_SQUARE] + (1.0 - o->beta2) * g * g;
    const double root = sqrt(o->amsgrad ? fmax(v[FM_LARGEST], square) : square) / row->traits.root_bias_correction;
    return w - o->lr / row->traits.bias_correction1 * m / (root + o->adam_eps);
  }
  g += o->weight_decay * w;
  if (row->operand[FM_BUFFER].data != NULL) {
    const double b = o->first_step ? g : o->momentum * v[FM_BUFFER] + (1.0 - o->dampening) * g;
    g = o->nesterov ? g + o->momentum * b : b;
  }
  return w - o->lr * g;
}

static bool is_near(double got, double want, double scale) { return fabs(got - want) <= 1e-14 * (fabs(want) + scale); }

/* h' = decay h + (1 - decay) scale x, and over a step of more than min_step q = |k' h' - k h| / step, which moves the
 * Lipschitz constant by its part. `step` is given to 1e-14. Returns q. */
static double check_average(const update_case *c, const fm_row *after, int64_t i, const double *v, double x,
                            double step) {
  const fm_options *o = &c->options;
  const fm_view *rho = &after->operand[FM_LIPSCHITZ];
  const double h = v[FM_CURVATURE], next = o->decay * h + (1.0 - o->decay) * o->source_scale * x;
  CHECK(is_near(get(&after->operand[FM_CURVATURE], i), next, fabs(h)), "%s: h %.17g", c->name, next);
  const bool moved = step > o->min_step && o->correction_before != 0.0;
  const double q = moved ? fabs(o->correction_after * next - o->correction_before * h) / step : 0.0;
  const double mixed = o->lipschitz_decay * v[FM_LIPSCHITZ] + (1.0 - o->lipschitz_decay) * q;
  if (rho->data != NULL) { /* 100: the quotient of numbers up to 3 by a step of 0.03 or more */
    const double want = moved ? mixed : v[FM_LIPSCHITZ], got = get(rho, i);
    CHECK(is_near(got, want, 100.0), "%s: rho %.17g, not %.17g", c->name, got, want);
  }
  return q;
}

/* The state that a step leaves. */
static void check_state(const update_case *c, const fm_row *after, int64_t i, const double *v) {
  const fm_options *o = &c->options;
  if (c->update == FM_RESTORE_LION || c->update == FM_RESTORE_LION_CURVATURE) {
    const double g = o->maximize ? -v[FM_GRAD] : v[FM_GRAD], want = o->beta2 * v[FM_MEAN] + (1.0 - o->beta2) * g;
    CHECK(is_near(get(&after->operand[FM_MEAN], i), want, 1.0), "%s: m, not %.17g", c->name, want);
  }
}

/* Returns the difference quotient. */
static double check_step(const update_case *c, const fm_row *before, const fm_row *after, int64_t r, int64_t i) {
  double v[FM_MAX_OPERANDS];
  for (int k = 0; k < FM_MAX_OPERANDS; k++) {
    v[k] = before->operand[k].data != NULL ? get(&before->operand[k], i) : 0.0;
  }
  if (c->update == FM_AVERAGE) {
    const fm_quad words = fm_random_quad(c->options.seed, c->options.step, (uint32_t)r, (uint64_t)i / 4);
    const double sign = (words.word[i % 4] & 0x80000000u) != 0 ? -1.0 : 1.0, g = v[FM_GRAD];
    const double x = c->options.source == FM_SOURCE_SQUARE   ? g * g
                     : c->options.source == FM_SOURCE_PROBED ? sign * g
                                                             : g;
    return check_average(c, after, i, v, x, fabs(v[FM_PARAM] - v[FM_OLD]));
  }
  const double got = get(&after->operand[FM_PARAM], i), want = expected_step(c, before, v);
  CHECK(is_near(got, want, 1.0), "%s: w %.17g, not %.17g", c->name, got, want);
  check_state(c, after, i, v);
  return before->operand[FM_CURVATURE].data != NULL
             ? check_average(c, after, i, v, v[FM_GRAD] * v[FM_GRAD], fabs(want - v[FM_OLD]))
             : 0.0;
}

static bool is_step(fm_update update) {
  return update == FM_AVERAGE || update == FM_RESTORE_SGD || update == FM_RESTORE_ADAM || update == FM_RESTORE_LION ||
         update == FM_RESTORE_SGD_CURVATURE || update == FM_RESTORE_ADAM_CURVATURE ||
         update == FM_RESTORE_LION_CURVATURE;
}

void test_averages(void) {
  update_case cases[MOST_CASES];
  const int count = update_cases(cases);
  for (int k = 0; k < count; k++) {
    if (!is_step(cases[k].update)) {
      continue;
    }
    fm_list before = make_list(FM_F64, cases[k].operands, ~0u), after = copy_list(&before);
    if (cases[k].update != FM_AVERAGE) {
      cases[k].options.source_scale = 1.0; /* has no meaning there */
    }
    const fm_sum got = fm_run_update(cases[k].update, &after, &cases[k].options, NULL, splits[0]);
    double largest = 0.0;
    for (int64_t r = 0; r < before.count; r++) {
      for (int64_t i = 0; i < before.rows[r].numel; i++) {
        largest = fmax(largest, check_step(&cases[k], &before.rows[r], &after.rows[r], r, i));
      }
    }
    CHECK(is_near(got.mid, largest, 100.0), "%s: largest quotient %.17g, not %.17g", cases[k].name, got.mid, largest);
    free_list(&before);
    free_list(&after);
  }
}

/* ---- linear combinations and saved weights ---- */

/* a g + b x + c y, w + alpha x and the bytes of the backup, against double and, where nothing rounds, exactly. */
static void check_combination(const update_case *c, const fm_row *before, const fm_row *after, int64_t i) {
  const fm_options *o = &c->options;
  double v[FM_MAX_OPERANDS];
  for (int k = 0; k < FM_MAX_OPERANDS; k++) {
    v[k] = before->operand[k].data != NULL ? get(&before->operand[k], i) : 0.0;
  }
  const double got = get(&after->operand[FM_PARAM], i);
  const double want = c->update == FM_SAVE   ? v[FM_PARAM]
                      : c->update == FM_AXPY ? v[FM_PARAM] + o->scale * v[FM_GRAD]
                                             : o->coefficient[0] * v[FM_PARAM] + o->coefficient[1] * v[FM_GRAD] +
                                                   o->coefficient[2] * v[FM_THIRD];
  CHECK(c->update == FM_SAVE ? got == want : is_near(got, want, 1.0), "%s: %.17g, not %.17g", c->name, got, want);
  if (after->operand[FM_OLD].data != NULL) {
    CHECK(get(&after->operand[FM_OLD], i) == v[FM_PARAM], "%s: backup", c->name);
  }
}

void test_combinations(void) {
  update_case cases[MOST_CASES];
  const int count = update_cases(cases);
  for (int k = 0; k < count; k++) {
    if (cases[k].update != FM_SAVE && cases[k].update != FM_AXPY && cases[k].update != FM_BLEND) {
      continue;
    }
    fm_list before = make_list(FM_F64, cases[k].operands, ~0u), after = copy_list(&before);
    fm_run_update(cases[k].update, &after, &cases[k].options, NULL, splits[0]);
    for (int64_t r = 0; r < before.count; r++) {
      for (int64_t i = 0; i < before.rows[r].numel; i++) {
        check_combination(&cases[k], &before.rows[r], &after.rows[r], i);
      }
    }
    free_list(&before);
    free_list(&after);
  }
}

/* A list whose coefficient is 0 passes no NaN on, every other does; axpy by 0 moves nothing. 1e-50 is 0 in float. */
void test_zero_coefficients(void) {
  const int64_t size = 300;
  const int operands[] = {FM_PARAM, FM_GRAD, FM_THIRD};
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    for (int zero = 0; zero < 6; zero++) {
      fm_options o = some_options();
      o.coefficient[zero % 3] = zero < 3 ? 0.0 : type == FM_F64 ? -0.0 : 1e-50;
      for (int k = 0; k < 3; k++) {
        fm_list list = make_list_of(&size, 1, type, FM_BIT(FM_PARAM) | FM_BIT(FM_GRAD) | FM_BIT(FM_THIRD), ~0u);
        put(&list.rows[0].operand[operands[k]], 7, k == 1 ? INFINITY : NAN);
        fm_run_update(FM_BLEND, &list, &o, NULL, splits[0]);
        const double got = get(&list.rows[0].operand[FM_PARAM], 7);
        CHECK(isfinite(got) == (k == zero % 3), "type %d: list %d, coefficient %d is 0: %g", (int)type, k, zero, got);
        free_list(&list);
      }
    }
    fm_list list = make_list_of(&size, 1, type, EXACT | FM_BIT(FM_GRAD), ~0u);
    fm_options o = some_options();
    o.scale = 0.0;
    put(&list.rows[0].operand[FM_GRAD], 7, NAN);
    fm_run_update(FM_AXPY, &list, &o, NULL, splits[0]);
    for (int64_t i = 0; i < size; i++) {
      CHECK(get(&list.rows[0].operand[FM_PARAM], i) == get(&list.rows[0].operand[FM_OLD], i), "axpy by 0");
    }
    free_list(&list);
  }
}

/* ---- Lion by hand ---- */

/* In float64: c = 0 takes no step but the decay, a NaN shows, and m follows beta2, not beta1. */
void test_lion(void) {
  double old[] = {1.0, -2.0, 4.0, 0.5}, w[4] = {9.0, 9.0, 9.0, 9.0}, m[] = {0.5, -1.0, 0.75, 0.0};
  double g[] = {1.0, -3.0, -0.75 * 3.0, NAN};
  fm_row row = {.fp64 = true, .numel = 4, .operand = {[FM_PARAM] = {(char *)w, NULL, FM_F64}}};
  row.operand[FM_OLD] = (fm_view){(char *)old, NULL, FM_F64};
  row.operand[FM_GRAD] = (fm_view){(char *)g, NULL, FM_F64};
  row.operand[FM_MEAN] = (fm_view){(char *)m, NULL, FM_F64};
  int64_t first_chunk[2];
  fm_list list = {&row, 1, first_chunk, NULL};
  fm_list_plan(&list);
  const fm_options o = {.lr = 0.125, .weight_decay = 0.5, .beta1 = 0.75, .beta2 = 0.5};
  fm_run_update(FM_RESTORE_LION, &list, &o, NULL, splits[0]);
  const double want_w[] = {0.9375 - 0.125, -1.875 + 0.125, 3.75}, want_m[] = {0.75, -2.0, -0.75};
  for (int i = 0; i < 3; i++) {
    CHECK(w[i] == want_w[i] && m[i] == want_m[i], "element %d: w %g, m %g", i, w[i], m[i]);
  }
  CHECK(isnan(w[3]) && isnan(m[3]), "a NaN: w %g, m %g", w[3], m[3]);
}
