/* Arguments by the names that they have in the schema, and results: what the operators in operators.c are made of. */
#ifndef FM_NAMED_ARGS_H
#define FM_NAMED_ARGS_H

#include <assert.h>

#include "backend.h"

/* ---- arguments by name ---- */

/* -1 if the operator has none of that name. */
static int find(const fm_args *args, const char *name) {
  for (int a = 0; a < args->count; a++) {
    if (strcmp(args->arg[a].name, name) == 0) {
      return a;
    }
  }
  return -1;
}

/* For a name that the schema has. */
static const fm_arg *get(const fm_args *args, const char *name) {
  const int a = find(args, name);
  assert(a >= 0);
  return &args->arg[a];
}

static double number(const fm_args *args, const char *name) { return get(args, name)->number; }

static int64_t integer(const fm_args *args, const char *name) { return get(args, name)->integer; }

static int64_t length(const fm_args *args, const char *name) { return get(args, name)->count; }

static bool take_scalar(fm_args *args, const char *name, const double **value) {
  return fm_take_scalars(args, find(args, name), 1, value);
}

/* One number for all tensors or, for each of them, `width` in a row: `each` says which. */
static bool take_own_scalars(fm_args *args, const char *name, int64_t width, const fm_list *list, const double **value,
                             bool *each) {
  const int64_t own = width * list->count;
  *each = own > 1 && get(args, name)->tensors[0].numel == own;
  return fm_take_scalars(args, find(args, name), *each ? own : 1, value);
}

static bool take_exponent(fm_args *args, double *q) {
  *q = number(args, "q");
  return *q >= 1.0 || fm_fail(args, "q: %g given, but a norm needs 1 <= q <= infinity", *q);
}

static bool take_not_negative(fm_args *args, const char *name, double *value) {
  *value = number(args, name);
  return *value >= 0.0 || fm_fail(args, "%s: %g given, but it must not be negative", name, *value);
}

static bool take_fraction(fm_args *args, const char *name, double *value) {
  *value = number(args, name);
  return (*value >= 0.0 && *value <= 1.0) || fm_fail(args, "%s: %g given, but it is from 0 to 1", name, *value);
}

static bool take_finite(fm_args *args, const char *name, double *value) {
  *value = number(args, name);
  return isfinite(*value) || fm_fail(args, "%s: %g given, but it must be finite", name, *value);
}

static bool take_choice(fm_args *args, const char *name, int most, const char *meaning, int *value) {
  const int64_t given = integer(args, name);
  *value = (int)given;
  return (given >= 0 && given <= most) ||
         fm_fail(args, "%s: %lld given, but it is %s", name, (long long)given, meaning);
}

/* Gives each row its T(w). ASAM scales weights only, not biases and norm layers: tensors of two dimensions or more. */
static bool take_scaling(fm_args *args, const fm_arg *tensors, bool for_norm, fm_list *list) {
  int scaling = 0;
  if (!take_choice(args, "scaling", FM_SCALE_BIG_VISION, "0 (none), 1 (asam), 2 (davda54) or 3 (big_vision)",
                   &scaling)) {
    return false;
  }
  for (int64_t r = 0; r < list->count; r++) {
    const bool unscaled =
        (scaling == FM_SCALE_ASAM && tensors->tensors[r].dims < 2) || (scaling == FM_SCALE_BIG_VISION && for_norm);
    list->rows[r].traits.scaling = unscaled ? FM_SCALE_NONE : scaling;
  }
  return true;
}

/* The lists of an operator, the first one first; a list that may be empty is an operand only if it is not. */
enum { FM_MOST_LISTS = FM_MAX_OPERANDS };
typedef struct fm_lists {
  fm_operand operand[FM_MOST_LISTS];
  int count;
} fm_lists;

static void add_list(const fm_args *args, fm_lists *lists, const char *name, int operand, fm_use use) {
  lists->operand[lists->count++] = (fm_operand){find(args, name), operand, use};
}

static void add_if_any(const fm_args *args, fm_lists *lists, const char *name, int operand, fm_use use) {
  if (length(args, name) > 0) {
    add_list(args, lists, name, operand, use);
  }
}

/* ---- results ---- */

static bool new_result(fm_args *args, int64_t dims, const int64_t *sizes, fm_stack_value *result, double **data) {
  const int64_t strides[2] = {dims == 2 ? sizes[1] : 1, 1};
  void *memory = NULL;
  if (aoti_torch_empty_strided(dims, sizes, strides, aoti_torch_dtype_float64(), args->device_type, args->device_index,
                               &result->tensor) ||
      torch_get_mutable_data_ptr(result->tensor, &memory)) {
    return fm_fail(args, "flatmin: torch could not allocate a result");
  }
  *data = memory;
  return true;
}

/* Runs an operator that returns a float64 tensor of these sizes, summed over chunks. */
static bool run_to_result(fm_args *args, fm_operator op, fm_update update, fm_list *list, const fm_options *o,
                          const fm_scalars *scalars, int64_t dims, const int64_t *sizes, StableIValue *stack) {
  fm_stack_value result = {.tensor = NULL};
  double *data = NULL;
  const int planes = op == FM_OP_DOT ? fm_dot_planes(o->lists) : 1;
  if (!fm_take_partials(args, fm_this_backend.partials, planes, list) ||
      !new_result(args, dims, sizes, &result, &data)) {
    return false;
  }
  if (!fm_this_backend.run(args, op, update, list, o, scalars, data)) {
    aoti_torch_delete_tensor_object(result.tensor);
    return false;
  }
  stack[0] = result.value;
  return true;
}

#endif
