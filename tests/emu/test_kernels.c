/* The emulated CUDA kernels against the C kernels: the same bytes in every order. Built with AddressSanitizer, where
 * memory is allocated to the byte, and with the race check. */
#include "check.h"
#include "emu_control.h"
#include "fm_cuda.h"
#include "lists.h"

#include <stdlib.h>

int fm_failures = 0;

static const char *const orders[] = {"random:5", "reverse", "forward"};
enum { ORDERS = sizeof orders / sizeof *orders };

static void serial(int64_t begin, int64_t end, int64_t grain, fm_range_fn fn, void *context) {
  (void)grain;
  fn(begin, end, context);
}

static void ran_well(const char *name, int type, const char *order, const char *error) {
  CHECK(error == NULL, "%s type %d %s: %s", name, type, order, error);
}

/* ---- reductions ---- */

/* Replaces the room for partial results by what the CUDA kernels ask for. */
static void resize_partials(fm_list *list) {
  free(list->partials);
  list->partials = malloc((size_t)fm_cuda_partials(list->first_chunk[list->count]) * sizeof *list->partials);
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
    ran_well("norm", type, orders[k], fm_cuda_norm(list, &o, &got, NULL));
    CHECK(fm_bits_f64(got) == fm_bits_f64(norm), "type %d q %g %s: %.17g, not %.17g", type, q, orders[k], got, norm);
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

static void test_norms(void) {
  const double exponents[] = {1.0, 1.5, 2.0, 51.0, INFINITY};
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    for (int e = 0; e < 5; e++) {
      fm_list list = make_list(type, 2, 1);
      check_norm(&list, (int)type, exponents[e], ORDERS);
      check_norms_of_rows(&list, (int)type, exponents[e]);
      free_list(&list);
    }
  }
}

/* One chunk a tensor: numbers of partial results around what one block folds (1024), and of tensors around what one
 * launch carries (300). */
static void test_many_tensors(void) {
  const int64_t counts[] = {0, 1, 2, 300, 301, 1024, 1025};
  enum { MOST = 1025 };
  int64_t *sizes = malloc(MOST * sizeof *sizes);
  for (int64_t r = 0; r < MOST; r++) {
    sizes[r] = 1 + r % 3;
  }
  for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
    fm_list list = make_list_of(sizes, counts[k], FM_F32, 2, 1);
    check_norm(&list, FM_F32, 2.0, 1);
    const int64_t before = fm_emu_launches();
    fm_scalars none = {.norm = NULL};
    const fm_options o = some_options();
    ran_well("restore", FM_F32, "random", fm_cuda_restore(&list, &o, &none, NULL));
    const int64_t launches = fm_emu_launches() - before, expected = (counts[k] + 299) / 300;
    CHECK(launches == expected, "%lld tensors: %lld launches", (long long)counts[k], (long long)launches);
    free_list(&list);
  }
  free(sizes);
}

/* ---- element-wise operators ---- */

typedef void c_operator(const fm_list *list, const fm_options *options, fm_parallel_for parallel_for);
typedef const char *cuda_operator(const fm_list *list, const fm_options *options, const fm_scalars *scalars,
                                  void *stream);

typedef struct operator_pair {
  const char *name;
  c_operator *run;
  cuda_operator *emulate;
  int operands;
  unsigned exact; /* operands of the parameter's type */
} operator_pair;

static const operator_pair ascend = {"ascend", fm_sam_ascend, fm_cuda_sam_ascend, 3,
                                     1u << FM_ASCEND_PARAM | 1u << FM_ASCEND_OLD};
static const operator_pair restore = {"restore", fm_restore, fm_cuda_restore, 2,
                                      1u << FM_STEP_PARAM | 1u << FM_STEP_OLD};
static const operator_pair sgd = {"restore_sgd", fm_restore_sgd, fm_cuda_restore_sgd, 4,
                                  1u << FM_STEP_PARAM | 1u << FM_STEP_OLD};
static const operator_pair adam = {"restore_adam", fm_restore_adam, fm_cuda_restore_adam, 6,
                                   1u << FM_STEP_PARAM | 1u << FM_STEP_OLD};

/* The kernels read some options from device memory, as operators.c hands them over. */
static void check_update(const operator_pair *op, fm_dtype type, const fm_options *options) {
  const uint64_t key[] = {options->seed, options->step};
  const fm_scalars scalars = {&options->norm, &options->rho, &options->lr, options->random ? key : NULL};
  fm_options o = *options;
  fm_read_scalars(&o, &scalars);
  fm_list list = make_list(type, op->operands, op->exact);
  op->run(&list, &o, serial);
  const uint64_t expected = hash_list(&list);
  free_list(&list);
  o.norm = o.rho = o.lr = NAN;
  for (int k = 0; k < ORDERS; k++) {
    list = make_list(type, op->operands, op->exact);
    fm_emu_set_order(orders[k]);
    ran_well(op->name, (int)type, orders[k], op->emulate(&list, &o, &scalars, NULL));
    CHECK(hash_list(&list) == expected, "%s type %d %s differs", op->name, (int)type, orders[k]);
    free_list(&list);
  }
}

static void test_updates(void) {
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    fm_options o = some_options();
    const double exponents[] = {1.0, 1.5, 2.0, INFINITY};
    for (int e = 0; e < 4; e++) {
      o.q = exponents[e];
      check_update(&ascend, type, &o);
      o.random = !o.random;
    }
    check_update(&restore, type, &o);
    check_update(&sgd, type, &o);
    check_update(&adam, type, &o);
    o.maximize = o.decoupled = o.first_step = true;
    o.nesterov = o.amsgrad = false;
    check_update(&sgd, type, &o);
    check_update(&adam, type, &o);
  }
}

/* ---- strides ---- */

/* Rows of 7 in a matrix of width 11 between two dense tensors: three launches, and gaps that nothing may touch. */
static void test_strides(void) {
  enum { ROWS = 300, COLUMNS = 7, WIDTH = 11, SPAN = (ROWS - 1) * WIDTH + COLUMNS };
  const int64_t sizes[] = {33, SPAN, 4097};
  const fm_layout by_rows = {2, {ROWS, COLUMNS}, {WIDTH, 1}}, by_columns = {2, {COLUMNS, ROWS}, {1, WIDTH}};
  const fm_layout *const layouts[] = {&by_rows, &by_columns};
  const fm_options o = some_options();
  const fm_scalars scalars = {&o.norm, &o.rho, &o.lr, NULL};
  for (fm_dtype type = FM_F32; type <= FM_F16; type++) {
    for (int l = 0; l < 2; l++) {
      uint64_t hash[2];
      const int64_t before = fm_emu_launches();
      for (int emulated = 0; emulated < 2; emulated++) {
        fm_list list = make_list_of(sizes, 3, type, 3, ascend.exact);
        for (int k = 0; k < 3; k++) {
          list.rows[1].operand[k].numel = (int64_t)ROWS * COLUMNS;
          list.rows[1].operand[k].layout = k == FM_ASCEND_OLD ? NULL : layouts[l];
        }
        fm_list_plan(&list);
        if (emulated) {
          ran_well("ascend", (int)type, "random", fm_cuda_sam_ascend(&list, &o, &scalars, NULL));
        } else {
          fm_sam_ascend(&list, &o, serial);
        }
        for (int k = 0; k < 3; k++) {
          list.rows[1].operand[k].numel = SPAN; /* the gaps count */
        }
        hash[emulated] = hash_list(&list);
        free_list(&list);
      }
      CHECK(hash[0] == hash[1], "type %d layout %d", (int)type, l);
      CHECK(fm_emu_launches() - before == 3, "a tensor with strides goes alone");
    }
  }
}

/* ---- the race check sees the real kernels: without their barriers they must not pass ---- */

static void test_omitted_barriers(void) {
  fm_list list = make_list(FM_F32, 2, 1);
  const fm_options o = some_options();
  double norm = 0.0;
  resize_partials(&list);
  for (int k = 0; k < ORDERS; k++) {
    fm_emu_set_order(orders[k]);
    fm_emu_omit_barriers(true);
    const char *error = fm_cuda_norm(&list, &o, &norm, NULL);
    CHECK(error != NULL && strstr(error, "fm_fold_kernel: race") != NULL, "%s: %s", orders[k], error ? error : "");
    fm_emu_omit_barriers(false);
    ran_well("norm", FM_F32, orders[k], fm_cuda_norm(&list, &o, &norm, NULL));
  }
  free_list(&list);
}

int main(int argc, char **argv) {
  const struct {
    const char *name;
    void (*run)(void);
  } tests[] = {{"norms", test_norms},
               {"many_tensors", test_many_tensors},
               {"updates", test_updates},
               {"strides", test_strides},
               {"omitted_barriers", test_omitted_barriers}};
  for (size_t k = 0; k < sizeof tests / sizeof *tests; k++) {
    if (argc == 2 && strcmp(argv[1], tests[k].name) == 0) {
      tests[k].run();
      return fm_failures == 0 ? 0 : 1;
    }
  }
  fprintf(stderr, "give the name of one test\n");
  return 2;
}
