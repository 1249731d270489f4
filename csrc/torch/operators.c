/* The operators: schema, checks, and the call of the backend that this file is linked with. Nothing of a device is
 * here. Arguments are taken by the names that they have in the schema. */
#include <inttypes.h>

#include "label_operators.h"
#include "named_args.h"
#include "schemas.h"

/* ---- reductions ---- */

static bool reduce(fm_args *args, fm_operator op, fm_options *o, const fm_scalars *scalars, StableIValue *stack) {
  fm_lists lists = {.count = 0};
  fm_list list = {0};
  const int64_t scaling = integer(args, "scaling");
  add_list(args, &lists, "tensors", FM_GRAD, FM_READ);
  if (scaling == FM_SCALE_ASAM || scaling == FM_SCALE_DAVDA54) {
    add_list(args, &lists, "weights", FM_PARAM, FM_READ_ANY_TYPE);
  }
  return take_not_negative(args, "eta", &o->eta) && fm_take_rows(args, lists.operand, lists.count, &list) &&
         take_scaling(args, &args->arg[0], true, &list) &&
         run_to_result(args, op, FM_UPDATE_COUNT, &list, o, scalars, 0, NULL, stack);
}

static bool op_norm(fm_args *args, StableIValue *stack) {
  fm_options o = {0};
  const fm_scalars none = {0};
  return take_exponent(args, &o.q) && reduce(args, FM_OP_NORM, &o, &none, stack);
}

static bool op_ties(fm_args *args, StableIValue *stack) {
  fm_options o = {0};
  fm_scalars s = {0};
  return take_scalar(args, "norm", &s.norm) && reduce(args, FM_OP_TIES, &o, &s, stack);
}

/* The operands of the inner products are the lists in their order, whatever the names of the operands. */
static bool op_dot(fm_args *args, StableIValue *stack) {
  const char *const names[FM_DOT_LISTS] = {"a", "b", "c", "d"};
  fm_lists lists = {.count = 0};
  fm_options o = {0};
  const fm_scalars none = {0};
  fm_list list = {0};
  for (int k = 0; k < FM_DOT_LISTS; k++) {
    if (k < 2 || length(args, names[k]) > 0) {
      add_list(args, &lists, names[k], k, FM_READ_ANY_TYPE);
      if (lists.count != k + 1) {
        return fm_fail(args, "%s has 0 tensors and %s has %" PRId64 "; give one for each", names[k - 1], names[k],
                       length(args, names[k]));
      }
    }
  }
  o.lists = lists.count;
  const int64_t sums = fm_dot_sums(o.lists);
  return fm_take_rows(args, lists.operand, lists.count, &list) &&
         run_to_result(args, FM_OP_DOT, FM_UPDATE_COUNT, &list, &o, &none, 1, &sums, stack);
}

static bool op_pacgen(fm_args *args, StableIValue *stack) {
  fm_lists lists = {.count = 0};
  fm_options o = {0};
  fm_scalars s = {0};
  fm_list list = {0};
  add_list(args, &lists, "params", FM_PARAM, FM_READ);
  add_list(args, &lists, "curvatures", FM_CURVATURE, FM_READ);
  add_if_any(args, &lists, "lipschitz", FM_LIPSCHITZ, FM_READ);
  const int64_t sizes[2] = {length(args, "params"), 2};
  return take_not_negative(args, "gamma", &o.gamma) && take_not_negative(args, "eps", &o.eps) &&
         fm_take_rows(args, lists.operand, lists.count, &list) &&
         take_scalar(args, "lipschitz_constant", &s.lipschitz) &&
         take_scalar(args, "curvature_scale", &s.curvature_scale) &&
         run_to_result(args, FM_OP_PACGEN, FM_UPDATE_COUNT, &list, &o, &s, 2, sizes, stack);
}

static bool op_filter_norm(fm_args *args, StableIValue *stack) {
  fm_options o = {.q = 2.0};
  const fm_scalars none = {0};
  fm_list list = {0};
  if (!fm_take_filters(args, find(args, "tensors"), FM_GRAD, integer(args, "whole"), &list)) {
    return false;
  }
  return run_to_result(args, FM_OP_ROW_NORMS, FM_UPDATE_COUNT, &list, &o, &none, 1, &list.count, stack);
}

/* ---- updates ---- */

/* Makes the rows of an update's lists; `backup` is the argument's name or NULL. Nothing that is written may share
 * memory. */
static bool take_lists(fm_args *args, const fm_lists *lists, const char *backup, fm_list *list) {
  const int at = backup != NULL ? find(args, backup) : -1;
  return fm_take_rows(args, lists->operand, lists->count, list) && (at < 0 || fm_take_backup(args, at, list)) &&
         fm_check_disjoint(args, lists->operand, lists->count, at, list);
}

static bool run_update(fm_args *args, fm_update update, const fm_list *list, const fm_options *o, const fm_scalars *s) {
  return fm_this_backend.run(args, FM_OP_UPDATE, update, list, o, s, NULL);
}

/* What an ascent takes besides the norm and T(w). */
static bool take_ascent(fm_args *args, fm_options *o, fm_scalars *s, fm_list *list) {
  fm_lists lists = {.count = 0};
  add_list(args, &lists, "params", FM_PARAM, FM_WRITE);
  add_list(args, &lists, "grads", FM_GRAD, FM_READ);
  return take_exponent(args, &o->q) && take_not_negative(args, "eta", &o->eta) &&
         take_not_negative(args, "eps", &o->eps) && take_lists(args, &lists, "backup", list) &&
         take_own_scalars(args, "rho", 1, list, &s->rho, &s->each) && fm_take_key(args, find(args, "key"), &s->key);
}

static bool op_sam_ascend_(fm_args *args, StableIValue *stack) {
  (void)stack;
  fm_options o = {0};
  fm_scalars s = {0};
  fm_list list = {0};
  return take_ascent(args, &o, &s, &list) && take_scalar(args, "norm", &s.norm) &&
         take_scaling(args, &args->arg[0], false, &list) && run_update(args, FM_ASCEND, &list, &o, &s);
}

/* Norm and ascent. Each list that crosses from Python costs 0.17 us per tensor; twice that once the norm's stream has
 * driven torch's tensors out of the cache, which is why this is not two calls. */
static bool op_sam_norm_ascend_(fm_args *args, StableIValue *stack) {
  const fm_scalars none = {0};
  fm_options o = {0};
  fm_scalars s = {0};
  fm_list list = {0};
  fm_stack_value result = {.tensor = NULL};
  double *norm = NULL;
  if (!take_ascent(args, &o, &s, &list)) {
    return false;
  }
  if (isinf(o.q)) {
    return fm_fail(args, "q: infinity given, where ties share the radius; call norm, ties and sam_ascend_");
  }
  if (!take_scaling(args, &args->arg[0], true, &list) || !fm_take_partials(args, fm_this_backend.partials, 1, &list) ||
      !new_result(args, 0, NULL, &result, &norm)) {
    return false;
  }
  s.norm = norm;
  if (!fm_this_backend.run(args, FM_OP_NORM, FM_UPDATE_COUNT, &list, &o, &none, norm) ||
      !take_scaling(args, &args->arg[0], false, &list) || !run_update(args, FM_ASCEND, &list, &o, &s)) {
    aoti_torch_delete_tensor_object(result.tensor);
    return false;
  }
  stack[0] = result.value;
  return true;
}

static bool op_save_(fm_args *args, StableIValue *stack) {
  (void)stack;
  fm_lists lists = {.count = 0};
  const fm_options o = {0};
  const fm_scalars s = {0};
  fm_list list = {0};
  add_list(args, &lists, "params", FM_PARAM,
           FM_WRITE); /* by what brings them back: no overlap, no byte of the backup */
  return take_lists(args, &lists, "backup", &list) && run_update(args, FM_SAVE, &list, &o, &s);
}

static bool op_restore_(fm_args *args, StableIValue *stack) {
  (void)stack;
  fm_lists lists = {.count = 0};
  const fm_options o = {0};
  const fm_scalars s = {0};
  fm_list list = {0};
  add_list(args, &lists, "params", FM_PARAM, FM_WRITE);
  return take_lists(args, &lists, "backup", &list) && run_update(args, FM_RESTORE, &list, &o, &s);
}

/* The lists that hold averages of a curvature and of its quotients, and how they are averaged. */
static bool take_averages(fm_args *args, fm_lists *lists, fm_options *o) {
  add_list(args, lists, "curvatures", FM_CURVATURE, FM_WRITE);
  add_if_any(args, lists, "lipschitz", FM_LIPSCHITZ, FM_WRITE);
  return take_fraction(args, "decay", &o->decay) && take_fraction(args, "lipschitz_decay", &o->lipschitz_decay) &&
         take_not_negative(args, "min_step", &o->min_step);
}

/* The same beside a base step, if there are any: `curvatures` may be empty. A 16-bit weight moves by other than what
 * the step computed, and mostly not at all. */
static bool take_averages_of_step(fm_args *args, fm_lists *lists, fm_options *o) {
  if (length(args, "curvatures") == 0) {
    const int64_t quotients = length(args, "lipschitz");
    return quotients == 0 ||
           fm_fail(args, "curvatures has 0 tensors and lipschitz has %" PRId64 "; give one for each", quotients);
  }
  o->source_scale = 1.0;
  const fm_arg *params = &args->arg[0];
  for (int64_t i = 0; i < params->count; i++) {
    if (params->tensors[i].dtype == aoti_torch_dtype_bfloat16() ||
        params->tensors[i].dtype == aoti_torch_dtype_float16()) {
      return fm_fail(args,
                     "params[%lld] is of 16 bits, too few for the displacement of a step; call the step without "
                     "curvature, then curvature_",
                     (long long)i);
    }
  }
  return take_averages(args, lists, o);
}

/* An empty one is none. What is sparse, and so has no elements here, take_lists refuses. */
static bool has_backup(const fm_args *args) {
  const fm_tensor *backup = &get(args, "backup")->tensors[0];
  return backup->numel != 0 || backup->layout != aoti_torch_layout_strided();
}

/* The lists of a base step. An empty backup stands for the parameters as they are: a step from where they are is the
 * same pass, which reads each element before it writes it. */
static bool take_stepped(fm_args *args, const fm_lists *lists, fm_list *list) {
  if (has_backup(args)) {
    return take_lists(args, lists, "backup", list);
  }
  if (!take_lists(args, lists, NULL, list)) {
    return false;
  }
  for (int64_t i = 0; i < list->count; i++) {
    list->rows[i].operand[FM_OLD] = list->rows[i].operand[FM_PARAM];
  }
  return true;
}

/* Runs a base step: by itself, when there is nothing to return, or with averages, when the largest quotient is. */
static bool run_step(fm_args *args, fm_update step, fm_list *list, const fm_options *o, fm_scalars *s,
                     StableIValue *stack) {
  const int64_t none = 0;
  fm_stack_value result = {.tensor = NULL};
  double *data = NULL;
  if (length(args, "curvatures") > 0) {
    return fm_take_scalars(args, find(args, "corrections"), 2, &s->corrections) &&
           run_to_result(args, FM_OP_UPDATE, fm_with_curvature(step), list, o, s, 0, NULL, stack);
  }
  if (!new_result(args, 1, &none, &result, &data)) {
    return false;
  }
  if (!run_update(args, step, list, o, s)) {
    aoti_torch_delete_tensor_object(result.tensor);
    return false;
  }
  stack[0] = result.value;
  return true;
}

static bool op_restore_sgd_(fm_args *args, StableIValue *stack) {
  fm_lists lists = {.count = 0};
  fm_options o = {.momentum = number(args, "momentum"),
                  .dampening = number(args, "dampening"),
                  .weight_decay = number(args, "weight_decay"),
                  .nesterov = integer(args, "nesterov"),
                  .maximize = integer(args, "maximize"),
                  .first_step = integer(args, "first_step")};
  fm_scalars s = {0};
  fm_list list = {0};
  if (o.momentum == 0.0 && length(args, "momentum_buffers") != 0) {
    return fm_fail(args, "momentum_buffers are given but momentum is 0; give an empty list");
  }
  add_list(args, &lists, "params", FM_PARAM, FM_WRITE);
  add_list(args, &lists, "grads", FM_GRAD, FM_READ);
  if (o.momentum != 0.0) {
    add_list(args, &lists, "momentum_buffers", FM_BUFFER, FM_WRITE);
  }
  return take_averages_of_step(args, &lists, &o) && take_stepped(args, &lists, &list) &&
         take_own_scalars(args, "lr", 2, &list, &s.lr, &s.each) && run_step(args, FM_RESTORE_SGD, &list, &o, &s, stack);
}

/* The last count from which float64 goes on by 1. */
#define FM_MOST_STEPS 9007199254740992.0

/* Adam's step counters: float32 or float64 tensors of one element, as torch keeps them. */
static bool step_count(fm_args *args, const fm_arg *arg, int64_t i, double *count) {
  const fm_tensor *t = &arg->tensors[i];
  float narrow = 0.0F;
  const bool single = t->dtype == aoti_torch_dtype_float32();
  if (t->device_type != aoti_torch_device_type_cpu() || t->numel != 1 || t->data == NULL ||
      (!single && t->dtype != aoti_torch_dtype_float64())) {
    return fm_fail(args, "%s[%lld] must be a float32 tensor of one element on the CPU", arg->name, (long long)i);
  }
  if (single) {
    memcpy(&narrow, t->data, sizeof narrow);
    *count = (double)narrow;
  } else {
    memcpy(count, t->data, sizeof *count);
  }
  return (*count >= 0.0 && *count < FM_MOST_STEPS) ||
         fm_fail(args, "%s[%lld] is %g, but it counts steps", arg->name, (long long)i, *count);
}

static void set_step_count(const fm_tensor *t, double count) {
  const float narrow = (float)count;
  if (t->dtype == aoti_torch_dtype_float32()) {
    memcpy(t->data, &narrow, sizeof narrow);
  } else {
    memcpy(t->data, &count, sizeof count);
  }
}

/* Counts of the steps so far, and the bias corrections of each row's coming step, in double as torch computes them. */
static const double *take_steps(fm_args *args, int a, const fm_options *o, fm_list *list) {
  const fm_arg *arg = &args->arg[a];
  if (arg->count != list->count) {
    fm_fail(args, "steps has %lld tensors and params has %lld; give one for each", (long long)arg->count,
            (long long)list->count);
    return NULL;
  }
  double *counts = fm_args_alloc(args, (size_t)list->count * sizeof *counts);
  if (counts == NULL) {
    return NULL;
  }
  for (int64_t r = 0; r < list->count; r++) {
    if (!step_count(args, arg, r, &counts[r])) {
      return NULL;
    }
    const int64_t coming = (int64_t)counts[r] + 1;
    list->rows[r].traits.bias_correction1 = 1.0 - fm_pow_int(o->beta1, coming);
    list->rows[r].traits.root_bias_correction = sqrt(1.0 - fm_pow_int(o->beta2, coming));
  }
  return counts;
}

static bool op_restore_adam_(fm_args *args, StableIValue *stack) {
  fm_lists lists = {.count = 0};
  fm_options o = {.beta1 = number(args, "beta1"),
                  .beta2 = number(args, "beta2"),
                  .adam_eps = number(args, "eps"),
                  .weight_decay = number(args, "weight_decay"),
                  .decoupled = integer(args, "decoupled"),
                  .amsgrad = integer(args, "amsgrad"),
                  .maximize = integer(args, "maximize")};
  fm_scalars s = {0};
  fm_list list = {0};
  const int steps = find(args, "steps");
  if (!o.amsgrad && length(args, "max_exp_avg_sqs") != 0) {
    return fm_fail(args, "max_exp_avg_sqs are given but amsgrad is False; give an empty list");
  }
  add_list(args, &lists, "params", FM_PARAM, FM_WRITE);
  add_list(args, &lists, "grads", FM_GRAD, FM_READ);
  add_list(args, &lists, "exp_avgs", FM_MEAN, FM_WRITE);
  add_list(args, &lists, "exp_avg_sqs", FM_SQUARE, FM_WRITE);
  if (o.amsgrad) {
    add_list(args, &lists, "max_exp_avg_sqs", FM_LARGEST, FM_WRITE);
  }
  if (!take_averages_of_step(args, &lists, &o) || !take_stepped(args, &lists, &list) ||
      !take_own_scalars(args, "lr", 2, &list, &s.lr, &s.each)) {
    return false;
  }
  const double *counts = take_steps(args, steps, &o, &list);
  if (counts == NULL || !run_step(args, FM_RESTORE_ADAM, &list, &o, &s, stack)) {
    return false;
  }
  for (int64_t r = 0; r < list.count; r++) {
    set_step_count(&args->arg[steps].tensors[r], counts[r] + 1.0);
  }
  return true;
}

static bool op_restore_lion_(fm_args *args, StableIValue *stack) {
  fm_lists lists = {.count = 0};
  fm_options o = {.beta1 = number(args, "beta1"),
                  .beta2 = number(args, "beta2"),
                  .weight_decay = number(args, "weight_decay"),
                  .maximize = integer(args, "maximize")};
  fm_scalars s = {0};
  fm_list list = {0};
  add_list(args, &lists, "params", FM_PARAM, FM_WRITE);
  add_list(args, &lists, "grads", FM_GRAD, FM_READ);
  add_list(args, &lists, "exp_avgs", FM_MEAN, FM_WRITE);
  return take_averages_of_step(args, &lists, &o) && take_stepped(args, &lists, &list) &&
         take_own_scalars(args, "lr", 2, &list, &s.lr, &s.each) &&
         run_step(args, FM_RESTORE_LION, &list, &o, &s, stack);
}

/* ---- linear combinations ---- */

static bool op_blend_(fm_args *args, StableIValue *stack) {
  (void)stack;
  fm_lists lists = {.count = 0};
  const fm_options o = {0};
  fm_scalars s = {0};
  fm_list list = {0};
  add_list(args, &lists, "grads", FM_PARAM, FM_WRITE);
  add_list(args, &lists, "x", FM_GRAD, FM_READ);
  add_if_any(args, &lists, "y", FM_THIRD, FM_READ);
  return take_lists(args, &lists, NULL, &list) &&
         fm_take_scalars(args, find(args, "coefficients"), 3, &s.coefficients) &&
         run_update(args, FM_BLEND, &list, &o, &s);
}

/* An empty backup is none: nothing is saved. */
static bool op_axpy_(fm_args *args, StableIValue *stack) {
  (void)stack;
  fm_lists lists = {.count = 0};
  const fm_options o = {0};
  fm_scalars s = {0};
  fm_list list = {0};
  add_list(args, &lists, "params", FM_PARAM, FM_WRITE);
  add_list(args, &lists, "x", FM_GRAD, FM_READ);
  return take_lists(args, &lists, has_backup(args) ? "backup" : NULL, &list) && take_scalar(args, "scale", &s.scale) &&
         run_update(args, FM_AXPY, &list, &o, &s);
}

/* ---- noise and curvature ---- */

static bool op_scaled_noise_(fm_args *args, StableIValue *stack) {
  const int64_t three = 3;
  fm_lists lists = {.count = 0};
  fm_options o = {0};
  fm_scalars s = {0};
  fm_list list = {0};
  const bool curved = length(args, "curvatures") > 0, given = length(args, "sizes") > 0;
  if (curved && given) {
    return fm_fail(args, "curvatures and sizes are both given, but the size of the noise comes from one of them");
  }
  o.sizing = curved ? FM_SIZE_CURVATURE : given ? FM_SIZE_GIVEN : FM_SIZE_NEIGHBOURHOOD;
  if (!take_choice(args, "law", FM_LAW_RADEMACHER, "0 (uniform), 1 (normal), 2 (truncated_normal) or 3 (rademacher)",
                   &o.law)) {
    return false;
  }
  add_list(args, &lists, "params", FM_PARAM, FM_WRITE);
  if (curved || given) {
    add_list(args, &lists, curved ? "curvatures" : "sizes", FM_CURVATURE, FM_READ);
  }
  add_if_any(args, &lists, "lipschitz", FM_LIPSCHITZ, FM_READ);
  return take_not_negative(args, "gamma", &o.gamma) && take_not_negative(args, "eps", &o.eps) &&
         take_lists(args, &lists, "backup", &list) && take_own_scalars(args, "scale", 3, &list, &s.scale, &s.each) &&
         take_scalar(args, "lipschitz_constant", &s.lipschitz) &&
         take_scalar(args, "curvature_scale", &s.curvature_scale) &&
         fm_take_keys(args, find(args, "key"), list.count, &s.key, &s.each_key) &&
         run_to_result(args, FM_OP_UPDATE, FM_SCALED_NOISE, &list, &o, &s, 1, &three, stack);
}

static bool op_probe_(fm_args *args, StableIValue *stack) {
  (void)stack;
  fm_lists lists = {.count = 0};
  fm_options o = {0};
  fm_scalars s = {0};
  fm_list list = {0};
  add_list(args, &lists, "tensors", FM_PARAM, FM_WRITE);
  if (integer(args, "law") == FM_LAW_TRUNCATED) {
    return fm_fail(args, "law: 2 (truncated_normal) given, but without a size there is no cut; give 0, 1 or 3");
  }
  return take_choice(args, "law", FM_LAW_RADEMACHER, "0 (uniform), 1 (normal) or 3 (rademacher)", &o.law) &&
         take_lists(args, &lists, NULL, &list) && fm_take_full_key(args, find(args, "key"), &s.key) &&
         run_update(args, FM_PROBE, &list, &o, &s);
}

static bool op_curvature_(fm_args *args, StableIValue *stack) {
  fm_lists lists = {.count = 0};
  fm_options o = {0};
  fm_scalars s = {0};
  fm_list list = {0};
  const bool quotients = length(args, "params") > 0;
  if (!take_choice(args, "source", FM_SOURCE_PROBED, "0 (square), 1 (plain) or 2 (probed)", &o.source)) {
    return false;
  }
  if (quotients) { /* first: the backup has the parameters' order */
    add_list(args, &lists, "params", FM_PARAM, FM_READ);
  }
  if (!take_averages(args, &lists, &o) || !take_finite(args, "source_scale", &o.source_scale)) {
    return false;
  }
  add_list(args, &lists, "sources", FM_GRAD, FM_READ_ANY_TYPE);
  return take_lists(args, &lists, quotients ? "backup" : NULL, &list) &&
         fm_take_scalars(args, find(args, "corrections"), 2, &s.corrections) &&
         (o.source == FM_SOURCE_PROBED ? fm_take_full_key(args, find(args, "key"), &s.key)
                                       : fm_take_key(args, find(args, "key"), &s.key)) &&
         run_to_result(args, FM_OP_UPDATE, FM_AVERAGE, &list, &o, &s, 0, NULL, stack);
}

static bool op_isa(fm_args *args, StableIValue *stack) {
  (void)args;
  stack[0] = (fm_stack_value){.integer = fm_this_backend.isa()}.value;
  return true;
}

static bool op_best_isa(fm_args *args, StableIValue *stack) {
  (void)args;
  stack[0] = (fm_stack_value){.integer = fm_this_backend.best_isa()}.value;
  return true;
}

/* ---- the table ---- */

typedef bool fm_body(fm_args *args, StableIValue *stack);

static void call(const char *schema, fm_body *body, StableIValue *stack) {
  fm_args args;
  fm_args_open(&args, fm_this_backend.device_type(), schema, stack);
  if (args.error[0] == '\0') {
    body(&args, stack);
  }
  fm_args_close(&args);
  if (args.error[0] != '\0') { /* throws through this frame, so everything is freed by now */
    aoti_torch_check(false, __func__, __FILE__, __LINE__, args.error);
  }
}

#define FM_BOXED(name, per_device, schema)                                             \
  static void boxed_##name(StableIValue *stack, uint64_t n_args, uint64_t n_outputs) { \
    (void)n_args;                                                                      \
    (void)n_outputs;                                                                   \
    call(schema, op_##name, stack);                                                    \
  }
FM_OPERATORS(FM_BOXED)

/* A kernel for one operator and dispatch key; non-zero if torch refuses it. */
static AOTITorchError implement(const char *name, const char *key, void (*boxed)(StableIValue *, uint64_t, uint64_t)) {
  TorchLibraryHandle impl = NULL;
  return aoti_torch_library_init_impl(FM_NAMESPACE, key, __FILE__, __LINE__, &impl) ||
         torch_library_impl(impl, name, boxed, FM_TORCH_ABI_VERSION);
}

/* python/flatmin/ops/_library.py finds an operator missing, should torch refuse one, and says what to do. */
__attribute__((constructor)) static void register_operators(void) {
  const fm_backend *backend = &fm_this_backend;
  TorchLibraryHandle def = NULL;
  AOTITorchError failed = 0;
  if (backend->defines_operators) {
    failed = aoti_torch_library_init_def(FM_NAMESPACE, __FILE__, __LINE__, &def);
  }
#define FM_REGISTER(name, per_device, schema)                                                  \
  if (def != NULL) {                                                                           \
    failed = failed || aoti_torch_library_def(def, (schema));                                  \
  }                                                                                            \
  for (const char *const *key = backend->dispatch_keys; (per_device) && *key != NULL; key++) { \
    failed = failed || implement(#name, *key, boxed_##name);                                   \
  }                                                                                            \
  if (!(per_device) && def != NULL) {                                                          \
    failed = failed || implement(#name, "CompositeExplicitAutograd", boxed_##name);            \
  }
  FM_OPERATORS(FM_REGISTER)
#undef FM_REGISTER
}
