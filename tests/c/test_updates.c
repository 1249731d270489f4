/* The updates: bytes over instruction sets, splits and streaming stores, and against a plain loop over the formulas;
 * test_formulas.c has the formulas. */
#include "check.h"
#include "lists.h"
#include "tests.h"

#include <stdlib.h>

/* ---- every form of every update has a case ---- */

void test_forms(void) {
  update_case cases[MOST_CASES];
  const int count = update_cases(cases);
  bool reached[FM_UPDATE_COUNT][FM_FORMS] = {{false}};
  for (int k = 0; k < count; k++) {
    fm_list list = make_list(FM_F32, cases[k].operands, EXACT);
    for (int64_t r = 0; r < list.count; r++) {
      reached[cases[k].update][form_of(&cases[k], &list.rows[r])] = true;
    }
    free_list(&list);
  }
  for (int update = 0; update < FM_UPDATE_COUNT; update++) {
    for (int form = 0; form < fm_form_count((fm_update)update); form++) {
      CHECK(reached[update][form], "update %d has no case for form %d", update, form);
    }
  }
}

/* ---- one element at a time, straight from the formulas ---- */

/* One element's operands, in place. */
static void apply(const fm_row *row, const update_case *c, double *v) {
  const int form = form_of(c, row);
  if (row->fp64) {
    fm_rule_f64 rule;
    memset(&rule, 0, sizeof rule);
    fm_set_rule_f64(&rule, c->update, &c->options, &row->traits);
    fm_apply_f64(c->update, form, v, &rule);
    return;
  }
  float narrow[FM_VALUES];
  for (int k = 0; k < FM_VALUES; k++) {
    narrow[k] = (float)v[k];
  }
  fm_rule_f32 rule;
  memset(&rule, 0, sizeof rule);
  fm_set_rule_f32(&rule, c->update, &c->options, &row->traits);
  fm_apply_f32(c->update, form, narrow, &rule);
  for (int k = 0; k < FM_VALUES; k++) {
    v[k] = (double)narrow[k];
  }
}

static void put_by_chance(const fm_view *v, int64_t i, double x, uint32_t word) {
  const uint16_t bits =
      v->dtype == FM_BF16 ? fm_f32_to_bf16_random((float)x, word) : fm_f32_to_f16_random((float)x, word);
  put(v, i, (double)(v->dtype == FM_BF16 ? fm_bf16_to_f32(bits) : fm_f16_to_f32(bits)));
}

static bool moves(const fm_row *row, const update_case *c) {
  return c->update != FM_ASCEND || (row->fp64 ? fm_ascend_moves_f64(&c->options) : fm_ascend_moves_f32(&c->options));
}

static void plain_element(const fm_row *row, int64_t r, int64_t i, const update_case *c, long double *tally) {
  const fm_shape shape = fm_shape_of(c->update);
  const fm_options *o = &c->options;
  const bool saves = shape.copy == FM_COPY_TO_BACKUP && row->operand[FM_OLD].data != NULL;
  const fm_view *param = &row->operand[FM_PARAM], *old = &row->operand[FM_OLD];
  const fm_quad words = fm_random_quad(o->seed, o->step, (uint32_t)r, (uint64_t)i / 4);
  double v[FM_VALUES] = {0.0};
  for (int k = 0; k < FM_MAX_OPERANDS; k++) {
    v[k] = row->operand[k].data != NULL ? get(&row->operand[k], i) : fm_default(k);
  }
  v[FM_DRAW] = (double)fm_draw_quad(words, fm_law_of(c->update, o)).value[i % 4];
  if (saves) {
    put(old, i, get(param, i));
  } else if (shape.copy == FM_COPY_FROM_BACKUP) {
    put(param, i, get(old, i));
  }
  if (!moves(row, c)) {
    return;
  }
  apply(row, c, v);
  for (int k = 0; k < FM_MAX_OPERANDS; k++) {
    if ((shape.writes & FM_BIT(k)) && row->operand[k].data != NULL) {
      if (k == FM_PARAM && o->random && fm_dtype_size(param->dtype) == 2) {
        put_by_chance(param, i, v[k], words.word[i % 4]);
      } else {
        put(&row->operand[k], i, v[k]);
      }
    }
  }
  for (int k = 0; k < 3; k++) {
    tally[k] = shape.tally == FM_TERM_NOISE ? tally[k] + (long double)v[FM_TALLY + k]
                                            : fmaxl(tally[k], (long double)v[FM_TALLY + k]);
  }
  tally[3] += fabsl((long double)v[FM_TALLY]);
}

/* The bytes of the plain loop and, where numbers are added up, their sum to the roundings of 32 + 7 + 5 additions; what
 * is counted and the largest are exact. */
static void check_plain(const update_case *c, const fm_list *start, fm_dtype type) {
  fm_list plain = copy_list(start), list = copy_list(start);
  long double tally[4] = {0.0L, 0.0L, 0.0L, 0.0L}; /* the last one: of magnitudes */
  for (int64_t r = 0; r < plain.count; r++) {
    for (int64_t i = 0; i < plain.rows[r].numel; i++) {
      plain_element(&plain.rows[r], r, i, c, tally);
    }
  }
  const fm_sum got = fm_run_update(c->update, &list, &c->options, NULL, splits[0]);
  CHECK(hash_list(&list) == hash_list(&plain), "%s type %d differs from the plain loop", c->name, (int)type);
  if (fm_shape_of(c->update).tally == FM_TERM_NOISE) {
    CHECK(fabsl(got.mid - tally[0]) <= 44 * 0x1p-53L * tally[3] && got.big == tally[1] && got.small == tally[2],
          "%s type %d: %.17g, %g, %g, not %.17Lg, %Lg, %Lg", c->name, (int)type, got.mid, got.big, got.small, tally[0],
          tally[1], tally[2]);
  } else if (fm_shape_of(c->update).tally == FM_TERM_LARGEST) {
    CHECK(got.mid == tally[0], "%s type %d: %.17g, not %.17Lg", c->name, (int)type, got.mid, tally[0]);
  }
  free_list(&plain);
  free_list(&list);
}

/* All tables and splits, with and without streaming stores, must leave the bytes of the first run, in the operands and
 * in the partial results. */
static void check_same_bytes(const update_case *c, const fm_list *start, fm_dtype type) {
  const fm_kernels *tables[MOST_TABLES];
  const int table_count = kernel_tables(tables);
  const size_t bytes = (size_t)start->first_chunk[start->count] * sizeof *start->partials;
  uint64_t first = 0;
  for (int t = 0; t < table_count; t++) {
    for (int s = 0; s <= SPLITS; s++) {
      fm_list list = copy_list(start);
      memset(list.partials, 0xa5, bytes);
      run_split(tables[t]->update[c->update], &list, &c->options, s == SPLITS, splits[s % SPLITS]);
      const uint64_t hash = hash_bytes(list.partials, bytes, hash_list(&list));
      first = t == 0 && s == 0 ? hash : first;
      CHECK(hash == first, "%s type %d: table %d split %d differs", c->name, (int)type, tables[t]->isa, s);
      free_list(&list);
    }
  }
}

void test_kernels(void) {
  update_case cases[MOST_CASES];
  const int count = update_cases(cases);
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    for (int k = 0; k < count; k++) {
      fm_list start = make_list(type, cases[k].operands, EXACT);
      check_same_bytes(&cases[k], &start, type);
      check_plain(&cases[k], &start, type);
      free_list(&start);
      for (int operand = 0; operand < FM_MAX_OPERANDS; operand++) {
        if (cases[k].operands & ~EXACT & FM_BIT(operand)) { /* alone float32 in every second row */
          fm_list mixed = make_list(type, cases[k].operands, ~FM_BIT(operand));
          check_plain(&cases[k], &mixed, type);
          free_list(&mixed);
        }
      }
    }
  }
}

/* ---- strides ---- */

/* In every bit: 0 is not -0, and a NaN equals itself. */
static bool same_sum(fm_sum a, fm_sum b) {
  return fm_bits_f64(a.mid) == fm_bits_f64(b.mid) && fm_bits_f64(a.big) == fm_bits_f64(b.big) &&
         fm_bits_f64(a.small) == fm_bits_f64(b.small) && fm_bits_f64(a.rest) == fm_bits_f64(b.rest);
}

/* A strided tensor gives what its dense copy gives: rows of 7 in a matrix of width 11, and its transpose. The backup is
 * always dense. Nothing between the elements changes. */
static void check_strided(const update_case *c, fm_dtype type, const fm_layout *layout) {
  const int64_t sizes[] = {3, 2100};
  fm_list dense = make_list_of(sizes, 2, type, c->operands, EXACT), strided = copy_list(&dense);
  stride_row(&strided.rows[1], layout, ~FM_BIT(FM_OLD));
  const fm_sum want = fm_run_update(c->update, &dense, &c->options, NULL, splits[0]);
  const fm_sum got = fm_run_update(c->update, &strided, &c->options, NULL, splits[1]);
  CHECK(same_sum(got, want), "%s type %d", c->name, (int)type);
  stride_row(&dense.rows[1], layout, ~FM_BIT(FM_OLD));
  CHECK(hash_list(&strided) == hash_list(&dense), "%s type %d", c->name, (int)type);
  free_list(&dense);
  free_list(&strided);
}

void test_strided(void) {
  static const fm_layout layouts[] = {{2, {300, 7}, {11, 1}}, {2, {7, 300}, {1, 11}}};
  update_case cases[MOST_CASES];
  const int count = update_cases(cases);
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    for (int k = 0; k < count; k++) {
      check_strided(&cases[k], type, &layouts[k % 2]);
      check_strided(&cases[k], type, &layouts[(k + 1) % 2]);
    }
  }
}

/* ---- what is not finite ---- */

/* The weight of a curvature that is not finite, and no other, stays and is counted; a NaN shows in the largest
 * quotient. */
void test_not_finite(void) {
  const int64_t size = 5000, at[] = {0, 255, 256, 4096, 4999};
  const double wrong[] = {NAN, INFINITY, -INFINITY};
  update_case noise = {"noise", FM_SCALED_NOISE, EXACT | FM_AVERAGES, some_options()};
  update_case average = {"average", FM_AVERAGE, FM_BIT(FM_PARAM) | FM_AT_OLD | FM_AVERAGES, some_options()};
  noise.options.sizing = FM_SIZE_CURVATURE;
  for (fm_dtype type = FM_F32; type <= FM_F64; type++) {
    for (noise.options.law = FM_LAW_UNIFORM; noise.options.law <= FM_LAW_TRUNCATED; noise.options.law++) {
      fm_list clean = make_list_of(&size, 1, type, noise.operands, EXACT), list = copy_list(&clean);
      for (int k = 0; k < 5; k++) {
        put(&list.rows[0].operand[FM_CURVATURE], at[k], wrong[k % 3]);
        put(&clean.rows[0].operand[FM_CURVATURE], at[k], 1.0);
      }
      const fm_sum got = fm_run_update(FM_SCALED_NOISE, &list, &noise.options, NULL, splits[0]);
      fm_run_update(FM_SCALED_NOISE, &clean, &noise.options, NULL, splits[0]);
      for (int k = 0; k < 5; k++) {
        const double old = get(&list.rows[0].operand[FM_OLD], at[k]);
        CHECK(get(&list.rows[0].operand[FM_PARAM], at[k]) == old, "law %d: %g moved", noise.options.law, wrong[k % 3]);
        put(&clean.rows[0].operand[FM_PARAM], at[k], old);
      }
      CHECK(got.small == 5.0 && isfinite(got.mid), "law %d: %g are not finite", noise.options.law, got.small);
      for (int64_t i = 0; i < size; i++) {
        const double x = get(&list.rows[0].operand[FM_PARAM], i), y = get(&clean.rows[0].operand[FM_PARAM], i);
        CHECK(x == y, "law %d element %lld: %g, not %g", noise.options.law, (long long)i, x, y);
      }
      free_list(&clean);
      free_list(&list);
    }
    for (int k = 0; k < 5; k++) {
      fm_list list = make_list_of(&size, 1, type, average.operands, EXACT);
      put(&list.rows[0].operand[FM_GRAD], at[k], NAN);
      put(&list.rows[0].operand[FM_PARAM], at[k], 5.0);
      CHECK(isnan(fm_run_update(FM_AVERAGE, &list, &average.options, NULL, splits[0]).mid), "NaN at %lld",
            (long long)at[k]);
      free_list(&list);
    }
  }
}
