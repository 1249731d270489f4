/* The emulated CUDA kernels against the C kernels: the same bytes in every order. Built with AddressSanitizer, where
 * memory is allocated to the byte, and with the race check. */
#include "check.h"
#include "emu_control.h"
#include "fm_cuda.h"
#include "lists.h"

#include <stdlib.h>

int fm_failures = 0;

static const char *const orders[] = {"random:5", "reverse", "forward"};
enum { ORDERS = sizeof orders / sizeof *orders, ROWS = FM_CUDA_ROWS };

#define REDUCED (FM_BIT(FM_PARAM) | FM_BIT(FM_GRAD) | FM_AVERAGES)

static void serial(int64_t begin, int64_t end, int64_t grain, fm_range_fn fn, void *context) {
  (void)grain;
  fn(begin, end, context);
}

static void ran_well(const char *name, int type, const char *order, const char *error) {
  CHECK(error == NULL, "%s type %d %s: %s", name, type, order, error);
}

/* Replaces the room for partial results by what the CUDA kernels ask for. */
static void resize_partials_for(fm_list *list, int planes) {
  const int64_t partials = planes * fm_cuda_partials(list->first_chunk[list->count]);
  free(list->partials);
  list->partials = malloc((size_t)partials * sizeof *list->partials);
}

static void resize_partials(fm_list *list) { resize_partials_for(list, 1); }

static fm_list list_of(const int64_t *sizes, int64_t count, fm_dtype type, unsigned operands, unsigned exact) {
  fm_list list = make_list_of(sizes, count, type, operands, exact);
  resize_partials(&list);
  return list;
}

static void swap_rows(fm_list *a, fm_list *b, int64_t r) {
  const fm_row row = a->rows[r];
  a->rows[r] = b->rows[r];
  b->rows[r] = row;
}

/* ---- one number for a list ---- */

/* The chunks and their fold, and once more if the largest must come first. */
static int64_t launches_of_norm(const fm_list *list, double q) {
  const bool once = q == 2.0 || isinf(q) || (q == 1.0 && !fm_any_fp64(list));
  return (once ? 1 : 2) * (list->first_chunk[list->count] > 0 ? 2 : 1);
}

static void check_norm(fm_list *list, int type, double q, int order_count) {
  fm_options o = some_options();
  o.q = q;
  resize_partials(list);
  const double norm = fm_norm(list, &o, serial);
  o.norm = norm;
  const double ties = fm_ties(list, &o, serial);
  const fm_scalars scalars = {.norm = &norm};
  for (int k = 0; k < order_count; k++) {
    double got = -1.0;
    fm_emu_set_order(orders[k]);
    const int64_t before = fm_emu_launches();
    ran_well("norm", type, orders[k], fm_cuda_norm(list, &o, &got, NULL));
    CHECK(fm_bits_f64(got) == fm_bits_f64(norm), "type %d q %g %s: %.17g, not %.17g", type, q, orders[k], got, norm);
    if (list->count <= ROWS) {
      CHECK(fm_emu_launches() - before == launches_of_norm(list, q), "type %d q %g: %lld launches", type, q,
            (long long)(fm_emu_launches() - before));
    }
    ran_well("ties", type, orders[k], fm_cuda_ties(list, &o, &scalars, &got, NULL));
    CHECK(got == ties, "type %d q %g %s: %g ties, not %g", type, q, orders[k], got, ties);
  }
}

/* Each tensor by itself: in the sum of many, a last bit that one of them got wrong is mostly rounded away. */
static void check_norms_of_rows(const fm_list *list, int type, double q) {
  for (int64_t r = 0; r < list->count; r++) {
    int64_t first_chunk[2];
    fm_list row = {&list->rows[r], 1, first_chunk, NULL};
    fm_list_plan(&row);
    check_norm(&row, type, q, 1);
    free(row.partials);
  }
}

/* A list of one type in every order, and with one float64 tensor in it. */
static void test_norms(void) {
  const double exponents[] = {1.0, 1.5, 2.0, 51.0, INFINITY};
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    fm_list list = make_list(type, REDUCED, FM_BIT(FM_GRAD)), wide = make_list(FM_F64, REDUCED, FM_BIT(FM_GRAD));
    for (int e = 0; e < 5; e++) {
      check_norm(&list, (int)type, exponents[e], ORDERS);
      check_norms_of_rows(&list, (int)type, exponents[e]);
    }
    swap_rows(&list, &wide, 8);
    check_norm(&list, (int)type, 1.0, 1);
    check_norm(&list, (int)type, 2.0, 1);
    free_list(&list);
    free_list(&wide);
  }
}

/* ---- inner products ---- */

/* `passes`: launches over the elements; the folds of all sums are `folds` more. */
static void check_dot(fm_list *list, int type, int lists, const char *order, int64_t passes, int64_t folds) {
  const fm_options o = {.lists = lists};
  const int count = fm_dot_sums(lists);
  double want[FM_DOT_SUMS], got[FM_DOT_SUMS + 1];
  resize_partials_for(list, fm_dot_planes(lists));
  fm_dot(list, &o, want, serial);
  for (int k = 0; k <= FM_DOT_SUMS; k++) {
    got[k] = -1.0;
  }
  fm_emu_set_order(order);
  const int64_t before = fm_emu_launches();
  ran_well("dot", type, order, fm_cuda_dot(list, &o, got, NULL));
  CHECK(memcmp(got, want, (size_t)count * sizeof *got) == 0, "dot of %d, type %d %s", lists, type, order);
  CHECK(got[count] == -1.0, "dot of %d writes more than %d numbers", lists, count);
  CHECK(fm_emu_launches() - before == passes + folds, "dot of %d: %lld launches", lists,
        (long long)(fm_emu_launches() - before));
}

/* Every type and number of lists, mixed types, none and many tensors, and more chunks than one block folds. */
static void test_dots(void) {
  static const fm_layout layout = {2, {300, 7}, {11, 1}};
  const unsigned four = FM_BIT(0) | FM_BIT(1) | FM_BIT(2) | FM_BIT(3);
  const int64_t few[] = {33, 2100, 4097};
  for (int lists = 2; lists <= FM_DOT_LISTS; lists++) {
    for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
      fm_list list = make_list(type, four, type % 2 == 0 ? four : FM_BIT(0));
      for (int k = 0; k < (type == FM_F32 ? ORDERS : 1); k++) {
        check_dot(&list, (int)type, lists, orders[(k + (int)type) % ORDERS], 1, 1);
      }
      free_list(&list);
      list = make_list_of(few, 3, type, four, four);
      stride_row(&list.rows[1], &layout, FM_BIT(lists - 1) | FM_BIT(0));
      check_dot(&list, (int)type, lists, "random", 3, 1);
      free_list(&list);
    }
  }
  int64_t sizes[1025];
  for (int64_t r = 0; r < 1025; r++) {
    sizes[r] = 1 + r % 3;
  }
  for (int lists = 2; lists <= FM_DOT_LISTS; lists++) {
    fm_list none = make_list_of(sizes, 0, FM_F32, four, four), many = make_list_of(sizes, 1025, FM_F32, four, four);
    check_dot(&none, FM_F32, lists, "random", 0, 1);
    check_dot(&many, FM_F32, lists, "random", (1025 + ROWS - 1) / ROWS, 2);
    free_list(&none);
    free_list(&many);
  }
}

/* ---- numbers for each row ---- */

/* Launches: the chunks, unless there are none, and the folds of the rows. */
static void check_rows(fm_list *list, int type, int order_count, int64_t passes) {
  const fm_options o = some_options();
  const fm_scalars scalars = {.lipschitz = &o.lipschitz, .curvature_scale = &o.curvature_scale};
  fm_options unread = o;
  unread.lipschitz = unread.curvature_scale = NAN;
  const size_t count = (size_t)list->count + 1; /* one more, which nothing may write */
  double *want = calloc(count, 3 * sizeof *want), *got = malloc(count * 3 * sizeof *got);
  want[3 * count - 3] = want[3 * count - 1] = -1.0;
  fm_row_norms(list, &o, want, serial);
  fm_pacgen(list, &o, want + count, serial);
  want[count - 1] = want[3 * count - 2] = -1.0;
  for (int k = 0; k < order_count; k++) {
    fm_emu_set_order(orders[k]);
    for (size_t i = 0; i < 3 * count; i++) {
      got[i] = -1.0;
    }
    const int64_t before = fm_emu_launches();
    ran_well("row_norms", type, orders[k], fm_cuda_row_norms(list, &o, got, NULL));
    ran_well("pacgen", type, orders[k], fm_cuda_pacgen(list, &unread, &scalars, got + count, NULL));
    CHECK(fm_emu_launches() - before == 2 * passes, "type %d: %lld launches", type,
          (long long)(fm_emu_launches() - before));
    CHECK(memcmp(got, want, count * sizeof *got) == 0, "row norms type %d %s", type, orders[k]);
    CHECK(memcmp(got + count, want + count, 2 * count * sizeof *got) == 0, "pacgen type %d %s", type, orders[k]);
  }
  free(want);
  free(got);
}

/* Two of the rows have no elements, and a result. Lipschitz constants for each weight, and one for all. */
static void test_rows(void) {
  const int64_t empty[] = {0, 0, 0};
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    for (int constant = 0; constant < 2; constant++) {
      fm_list list = make_list(type, constant ? REDUCED & ~FM_BIT(FM_LIPSCHITZ) : REDUCED, FM_BIT(FM_GRAD));
      resize_partials(&list);
      check_rows(&list, (int)type, constant ? 1 : ORDERS, 2);
      free_list(&list);
    }
  }
  fm_list list = list_of(empty, 3, FM_F32, REDUCED, 0);
  check_rows(&list, FM_F32, ORDERS, 1);
  free_list(&list);
}

/* A row of more chunks than one block folds at a time (1024), between two others. Each of its chunks begins one element
 * after the last, so that 4.2 million elements take the memory of five thousand. */
static void test_long_row(void) {
  enum { CHUNKS = 1031, SPAN = CHUNKS + FM_CHUNK };
  static const fm_layout shifted = {2, {CHUNKS, FM_CHUNK}, {1, 1}};
  const int64_t sizes[] = {5000, SPAN, 5000};
  fm_list list = make_list_of(sizes, 3, FM_F32, REDUCED & ~FM_BIT(FM_LIPSCHITZ), 0);
  for (int k = 0; k < FM_MAX_OPERANDS; k++) {
    list.rows[1].operand[k].layout = &shifted;
  }
  list.rows[1].numel = (int64_t)(CHUNKS - 1) * FM_CHUNK + 17;
  list.rows[1].traits.scaling = FM_SCALE_NONE;
  fm_list_plan(&list);
  resize_partials(&list);
  check_rows(&list, FM_F32, 1, 4); /* the long one goes alone, but the three are folded together */
  free_list(&list);
}

/* ---- updates ---- */

/* Runs an update on the device: it reads some options from there, as operators.c hands them over. */
static const char *emulate(const update_case *c, const fm_list *list, double *result) {
  const fm_options *o = &c->options;
  const uint64_t key[] = {o->seed, o->step};
  const double corrections[] = {o->correction_before, o->correction_after};
  const bool draws = (fm_shape_of(c->update).reads & FM_BIT(FM_DRAW)) != 0;
  const fm_scalars scalars = {.norm = &o->norm,
                              .rho = &o->rho,
                              .lr = &o->lr,
                              .scale = &o->scale,
                              .lipschitz = &o->lipschitz,
                              .curvature_scale = &o->curvature_scale,
                              .corrections = corrections,
                              .coefficients = o->coefficient,
                              .key = draws || o->random ? key : NULL};
  fm_options unread = *o;
  unread.norm = unread.rho = unread.lr = unread.scale = unread.lipschitz = unread.curvature_scale = NAN;
  unread.coefficient[0] = unread.coefficient[1] = unread.coefficient[2] = NAN;
  unread.correction_before = unread.correction_after = NAN;
  unread.seed = unread.step = 0;
  return fm_cuda_update(c->update, list, &unread, &scalars, result, NULL);
}

/* In the numbers that are tallied, three of noise and one of the others; and whether they are folded is asked for. */
static void check_update(const update_case *c, const fm_list *start, int type, const char *order, int64_t passes) {
  const int tally = fm_shape_of(c->update).tally, numbers = tally < 0 ? 0 : tally == FM_TERM_NOISE ? 3 : 1;
  fm_list want = copy_list(start), got = copy_list(start), again = copy_list(start);
  resize_partials(&got);
  resize_partials(&again);
  double result[4] = {-1.0, -1.0, -1.0, -1.0};
  const fm_sum sum = fm_run_update(c->update, &want, &c->options, NULL, serial);
  const double expected[] = {sum.mid, sum.big, sum.small};
  fm_emu_set_order(order);
  int64_t before = fm_emu_launches();
  ran_well(c->name, type, order, emulate(c, &got, result));
  CHECK(hash_list(&got) == hash_list(&want), "%s type %d %s differs", c->name, type, order);
  CHECK(memcmp(result, expected, (size_t)numbers * sizeof *result) == 0, "%s type %d %s: %.17g, not %.17g", c->name,
        type, order, result[0], expected[0]);
  CHECK(result[numbers] == -1.0, "%s writes %d numbers", c->name, numbers);
  CHECK(fm_emu_launches() - before == passes + (numbers > 0 ? 1 : 0), "%s: %lld launches", c->name,
        (long long)(fm_emu_launches() - before));
  if (numbers > 0 && type == FM_F32) {
    before = fm_emu_launches();
    ran_well(c->name, type, order, emulate(c, &again, NULL));
    CHECK(fm_emu_launches() - before == passes && hash_list(&again) == hash_list(&want), "%s: without result", c->name);
  }
  free_list(&want);
  free_list(&got);
  free_list(&again);
}

/* Every case with every type. The threads of an update meet only where it is summed over: with float32 those run in all
 * orders, all else in one of the three. */
static void test_updates(void) {
  update_case cases[MOST_CASES];
  const int count = update_cases(cases);
  for (int k = 0; k < count; k++) {
    for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
      const fm_list start = make_list(type, cases[k].operands, EXACT);
      const bool meet = type == FM_F32 && fm_shape_of(cases[k].update).tally >= 0;
      for (int order = 0; order < (meet ? ORDERS : 1); order++) {
        check_update(&cases[k], &start, (int)type, orders[(order + k + (int)type) % ORDERS], 1);
      }
      fm_list done = start;
      free_list(&done);
    }
  }
}

/* ---- many tensors ---- */

/* One chunk a tensor: numbers of partial results around what one block folds (1024), and of tensors around what one
 * launch carries. A tensor draws by its number in the whole list, and its own results lie there. */
static void test_many_tensors(void) {
  const int64_t counts[] = {0, 1, 2, ROWS, ROWS + 1, 1024, 1025};
  enum { MOST = 1025 };
  const update_case restore = {"restore", FM_RESTORE, EXACT, some_options()};
  update_case probe = {"probe", FM_PROBE, FM_BIT(FM_PARAM), some_options()};
  probe.options.law = FM_LAW_NORMAL;
  int64_t sizes[MOST];
  for (int64_t r = 0; r < MOST; r++) {
    sizes[r] = 1 + r % 3;
  }
  for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
    const int64_t passes = (counts[k] + ROWS - 1) / ROWS;
    fm_list list = list_of(sizes, counts[k], FM_F32, REDUCED | EXACT, 0);
    check_norm(&list, FM_F32, 2.0, 1);
    check_update(&restore, &list, FM_F32, "random", passes);
    if (counts[k] <= ROWS + 1) {
      check_update(&probe, &list, FM_F32, "random", passes);
      check_rows(&list, FM_F32, 1, 2 * passes);
    }
    free_list(&list);
  }
  memset(sizes, 0, ROWS * sizeof *sizes); /* a launch without chunks is none, and its rows have results all the same */
  fm_list list = list_of(sizes, ROWS + 1, FM_F32, REDUCED, 0);
  check_rows(&list, FM_F32, 1, 3);
  free_list(&list);
}

/* ---- strides ---- */

/* Rows of 7 in a matrix of width 11 between two dense tensors: three launches, and gaps that nothing may touch. The
 * backup is always dense. A type and a layout for each update; the loads and stores are the same text for all. */
static void test_strides(void) {
  static const fm_layout layouts[] = {{2, {300, 7}, {11, 1}}, {2, {7, 300}, {1, 11}}};
  const int64_t sizes[] = {33, 2100, 4097};
  update_case cases[MOST_CASES];
  const int count = update_cases(cases);
  for (int k = 0; k < count; k++) {
    fm_list list = make_list_of(sizes, 3, (fm_dtype)(k % 4), cases[k].operands, EXACT);
    stride_row(&list.rows[1], &layouts[k / 4 % 2], ~FM_BIT(FM_OLD));
    check_update(&cases[k], &list, k % 4, "random", 3);
    free_list(&list);
  }
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    fm_list list = list_of(sizes, 3, type, REDUCED, FM_BIT(FM_GRAD));
    stride_row(&list.rows[1], &layouts[type % 2], ~0u);
    const int64_t before = fm_emu_launches();
    check_rows(&list, (int)type, 1, 4); /* the folds read no element: one launch */
    double want = fm_norm(&list, &(fm_options){.q = 2.0}, serial), got = -1.0;
    ran_well("norm", (int)type, "random", fm_cuda_norm(&list, &(fm_options){.q = 2.0}, &got, NULL));
    CHECK(fm_bits_f64(got) == fm_bits_f64(want), "type %d: norm %.17g, not %.17g", (int)type, got, want);
    CHECK(fm_emu_launches() - before == 8 + 4, "a tensor with strides goes alone");
    free_list(&list);
  }
}

/* ---- the race check sees the real kernels: without their barriers they must not pass ---- */

static void expect_race(const char *kernel, const char *order, const char *error) {
  CHECK(error != NULL && strstr(error, kernel) == error && strstr(error, ": race") != NULL, "%s %s: %s", kernel, order,
        error ? error : "");
}

static void test_omitted_barriers(void) {
  fm_list list = make_list(FM_F32, REDUCED, 0);
  const fm_options o = some_options();
  double result[64];
  resize_partials(&list);
  for (int k = 0; k < ORDERS; k++) {
    fm_emu_set_order(orders[k]);
    fm_emu_omit_barriers(true);
    expect_race("fm_fold_kernel", orders[k], fm_cuda_norm(&list, &o, result, NULL));
    expect_race("fm_fold_rows_kernel", orders[k], fm_cuda_row_norms(&list, &o, result, NULL));
    fm_emu_omit_barriers(false);
    ran_well("norm", FM_F32, orders[k], fm_cuda_norm(&list, &o, result, NULL));
    ran_well("row_norms", FM_F32, orders[k], fm_cuda_row_norms(&list, &o, result, NULL));
  }
  free_list(&list);
}

int main(int argc, char **argv) {
  const struct {
    const char *name;
    void (*run)(void);
  } tests[] = {{"norms", test_norms},     {"dots", test_dots},
               {"rows", test_rows},       {"long_row", test_long_row},
               {"updates", test_updates}, {"many_tensors", test_many_tensors},
               {"strides", test_strides}, {"omitted_barriers", test_omitted_barriers}};
  for (size_t k = 0; k < sizeof tests / sizeof *tests; k++) {
    if (argc == 2 && strcmp(argv[1], tests[k].name) == 0) {
      tests[k].run();
      return fm_failures == 0 ? 0 : 1;
    }
  }
  fprintf(stderr, "give the name of one test\n");
  return 2;
}
