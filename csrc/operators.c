/* The operators: schema, checks, and the call of the backend that this file is linked with. Nothing of a device is
 * here. */
#include "backend.h"

/* ---- shared checks ---- */

static bool take_exponent(fm_args *args, int a, double *q) {
  *q = args->arg[a].number;
  return *q >= 1.0 || fm_fail(args, "%s: %g given, but a norm needs 1 <= q <= infinity", args->arg[a].name, *q);
}

static bool take_not_negative(fm_args *args, int a, double *value) {
  *value = args->arg[a].number;
  return *value >= 0.0 || fm_fail(args, "%s: %g given, but it must not be negative", args->arg[a].name, *value);
}

/* Gives each row its T(w). ASAM scales weights only, not biases and norm layers: tensors of two dimensions or more. */
static bool take_scaling(fm_args *args, int tensors, int a, bool for_norm, fm_list *list) {
  const int64_t scaling = args->arg[a].integer;
  if (scaling < FM_SCALE_NONE || scaling > FM_SCALE_BIG_VISION) {
    return fm_fail(args, "%s: %lld given, but it is 0 (none), 1 (asam), 2 (davda54) or 3 (big_vision)",
                   args->arg[a].name, (long long)scaling);
  }
  for (int64_t r = 0; r < list->count; r++) {
    const bool unscaled = (scaling == FM_SCALE_ASAM && args->arg[tensors].tensors[r].dims < 2) ||
                          (scaling == FM_SCALE_BIG_VISION && for_norm);
    list->rows[r].scaling = unscaled ? FM_SCALE_NONE : (int)scaling;
  }
  return true;
}

/* ---- reductions: a float64 0-dim tensor ---- */

static bool needs_weights(int64_t scaling) { return scaling == FM_SCALE_ASAM || scaling == FM_SCALE_DAVDA54; }

static bool reduce(fm_args *args, fm_operator op, int scaling, int eta, fm_options *o, const fm_scalars *scalars,
                   StableIValue *stack) {
  enum { TENSORS, WEIGHTS };
  fm_list list = {0};
  fm_slot result = {.tensor = NULL};
  void *data = NULL;
  if (!take_not_negative(args, eta, &o->eta) || !fm_take_rows(args, TENSORS, FM_REDUCE_GRAD, FM_READ, &list) ||
      !take_scaling(args, TENSORS, scaling, true, &list) || !fm_take_partials(args, fm_this_backend.partials, &list) ||
      (needs_weights(args->arg[scaling].integer) &&
       !fm_take_operand(args, TENSORS, WEIGHTS, FM_REDUCE_WEIGHT, FM_READ_ANY_TYPE, &list))) {
    return false;
  }
  if (aoti_torch_empty_strided(0, NULL, NULL, aoti_torch_dtype_float64(), args->device_type, args->device_index,
                               &result.tensor) ||
      torch_get_mutable_data_ptr(result.tensor, &data)) {
    return fm_fail(args, "flatmin: torch could not allocate a result");
  }
  if (!fm_this_backend.run(args, op, &list, o, scalars, data)) {
    aoti_torch_delete_tensor_object(result.tensor);
    return false;
  }
  stack[0] = result.value;
  return true;
}

static bool op_norm(fm_args *args, StableIValue *stack) {
  enum { Q = 2, SCALING, ETA };
  fm_options o = {0};
  const fm_scalars none = {0};
  return take_exponent(args, Q, &o.q) && reduce(args, FM_OP_NORM, SCALING, ETA, &o, &none, stack);
}

static bool op_ties(fm_args *args, StableIValue *stack) {
  enum { NORM = 2, SCALING, ETA };
  fm_options o = {0};
  fm_scalars s = {0};
  return fm_take_scalar(args, NORM, &s.norm) && reduce(args, FM_OP_TIES, SCALING, ETA, &o, &s, stack);
}

/* ---- element-wise operators ---- */

static bool op_sam_ascend_(fm_args *args, StableIValue *stack) {
  enum { PARAMS, GRADS, BACKUP, NORM, RHO, KEY, Q, SCALING, ETA, EPS };
  (void)stack;
  const fm_written written[] = {{PARAMS, FM_ASCEND_PARAM}, {BACKUP, FM_ASCEND_OLD}};
  fm_options o = {0};
  fm_scalars s = {0};
  fm_list list = {0};
  return take_exponent(args, Q, &o.q) && take_not_negative(args, ETA, &o.eta) && take_not_negative(args, EPS, &o.eps) &&
         fm_take_rows(args, PARAMS, FM_ASCEND_PARAM, FM_WRITE, &list) && fm_take_scalar(args, NORM, &s.norm) &&
         fm_take_scalar(args, RHO, &s.rho) && fm_take_key(args, KEY, &s.key) &&
         take_scaling(args, PARAMS, SCALING, false, &list) &&
         fm_take_operand(args, PARAMS, GRADS, FM_ASCEND_GRAD, FM_READ, &list) &&
         fm_take_backup(args, BACKUP, FM_ASCEND_OLD, &list) && fm_check_disjoint(args, written, 2, &list) &&
         fm_this_backend.run(args, FM_OP_ASCEND, &list, &o, &s, NULL);
}

static bool op_restore_(fm_args *args, StableIValue *stack) {
  enum { PARAMS, BACKUP };
  (void)stack;
  const fm_written written[] = {{PARAMS, FM_STEP_PARAM}, {BACKUP, FM_STEP_OLD}};
  fm_options o = {0};
  fm_scalars s = {0};
  fm_list list = {0};
  if (!fm_take_rows(args, PARAMS, FM_STEP_PARAM, FM_WRITE, &list) ||
      !fm_take_backup(args, BACKUP, FM_STEP_OLD, &list) || !fm_check_disjoint(args, written, 2, &list)) {
    return false;
  }
  return fm_this_backend.run(args, FM_OP_RESTORE, &list, &o, &s, NULL);
}

static bool op_restore_sgd_(fm_args *args, StableIValue *stack) {
  enum { PARAMS, GRADS, BUFFERS, BACKUP, LR, MOMENTUM, DAMPENING, WEIGHT_DECAY, NESTEROV, MAXIMIZE, FIRST_STEP };
  (void)stack;
  const fm_written written[] = {{PARAMS, FM_STEP_PARAM}, {BACKUP, FM_STEP_OLD}, {BUFFERS, FM_SGD_BUFFER}};
  fm_options o = {.momentum = args->arg[MOMENTUM].number,
                  .dampening = args->arg[DAMPENING].number,
                  .weight_decay = args->arg[WEIGHT_DECAY].number,
                  .nesterov = args->arg[NESTEROV].integer,
                  .maximize = args->arg[MAXIMIZE].integer,
                  .first_step = args->arg[FIRST_STEP].integer};
  fm_scalars s = {0};
  fm_list list = {0};
  if (o.momentum == 0.0 && args->arg[BUFFERS].count != 0) {
    return fm_fail(args, "momentum_buffers are given but momentum is 0; give an empty list");
  }
  if (!fm_take_rows(args, PARAMS, FM_STEP_PARAM, FM_WRITE, &list) || !fm_take_scalar(args, LR, &s.lr) ||
      !fm_take_operand(args, PARAMS, GRADS, FM_STEP_GRAD, FM_READ, &list) ||
      !fm_take_backup(args, BACKUP, FM_STEP_OLD, &list) ||
      (o.momentum != 0.0 && !fm_take_operand(args, PARAMS, BUFFERS, FM_SGD_BUFFER, FM_WRITE, &list)) ||
      !fm_check_disjoint(args, written, 3, &list)) {
    return false;
  }
  return fm_this_backend.run(args, FM_OP_RESTORE_SGD, &list, &o, &s, NULL);
}

/* Adam's step counters: float32 or float64 tensors of one element, as torch keeps them. */
static bool step_count(fm_args *args, const fm_arg *arg, int64_t i, double *count) {
  const fm_tensor *t = &arg->tensors[i];
  float narrow = 0.0F;
  const bool single = t->dtype == aoti_torch_dtype_float32();
  if (t->device_type != aoti_torch_device_type_cpu() || t->numel != 1 ||
      (!single && t->dtype != aoti_torch_dtype_float64())) {
    return fm_fail(args, "%s[%lld] must be a float32 tensor of one element on the CPU", arg->name, (long long)i);
  }
  if (single) {
    memcpy(&narrow, t->data, sizeof narrow);
    *count = (double)narrow;
  } else {
    memcpy(count, t->data, sizeof *count);
  }
  return true;
}

static void set_step_count(const fm_tensor *t, double count) {
  const float narrow = (float)count;
  if (t->dtype == aoti_torch_dtype_float32()) {
    memcpy(t->data, &narrow, sizeof narrow);
  } else {
    memcpy(t->data, &count, sizeof count);
  }
}

/* Bias corrections of each row's coming step, in double as torch computes them. */
static bool take_steps(fm_args *args, int a, const fm_options *o, fm_list *list) {
  const fm_arg *arg = &args->arg[a];
  if (arg->count != list->count) {
    return fm_fail(args, "steps has %lld tensors and params has %lld; give one for each", (long long)arg->count,
                   (long long)list->count);
  }
  for (int64_t r = 0; r < list->count; r++) {
    double count = 0.0;
    if (!step_count(args, arg, r, &count)) {
      return false;
    }
    list->rows[r].bias_correction1 = 1.0 - fm_pow_int(o->beta1, (int64_t)count + 1);
    list->rows[r].root_bias_correction = sqrt(1.0 - fm_pow_int(o->beta2, (int64_t)count + 1));
  }
  return true;
}

static bool op_restore_adam_(fm_args *args, StableIValue *stack) {
  enum {
    PARAMS,
    GRADS,
    MEANS,
    SQUARES,
    LARGEST,
    STEPS,
    BACKUP,
    LR,
    BETA1,
    BETA2,
    EPS,
    WEIGHT_DECAY,
    DECOUPLED,
    AMSGRAD,
    MAXIMIZE
  };
  (void)stack;
  const fm_written written[] = {{PARAMS, FM_STEP_PARAM},
                                {BACKUP, FM_STEP_OLD},
                                {MEANS, FM_ADAM_MEAN},
                                {SQUARES, FM_ADAM_SQUARE},
                                {LARGEST, FM_ADAM_LARGEST}};
  fm_options o = {.beta1 = args->arg[BETA1].number,
                  .beta2 = args->arg[BETA2].number,
                  .adam_eps = args->arg[EPS].number,
                  .weight_decay = args->arg[WEIGHT_DECAY].number,
                  .decoupled = args->arg[DECOUPLED].integer,
                  .amsgrad = args->arg[AMSGRAD].integer,
                  .maximize = args->arg[MAXIMIZE].integer};
  fm_scalars s = {0};
  fm_list list = {0};
  if (!o.amsgrad && args->arg[LARGEST].count != 0) {
    return fm_fail(args, "max_exp_avg_sqs are given but amsgrad is False; give an empty list");
  }
  if (!fm_take_rows(args, PARAMS, FM_STEP_PARAM, FM_WRITE, &list) || !fm_take_scalar(args, LR, &s.lr) ||
      !fm_take_operand(args, PARAMS, GRADS, FM_STEP_GRAD, FM_READ, &list) ||
      !fm_take_backup(args, BACKUP, FM_STEP_OLD, &list) ||
      !fm_take_operand(args, PARAMS, MEANS, FM_ADAM_MEAN, FM_WRITE, &list) ||
      !fm_take_operand(args, PARAMS, SQUARES, FM_ADAM_SQUARE, FM_WRITE, &list) ||
      (o.amsgrad && !fm_take_operand(args, PARAMS, LARGEST, FM_ADAM_LARGEST, FM_WRITE, &list)) ||
      !fm_check_disjoint(args, written, 5, &list) || !take_steps(args, STEPS, &o, &list)) {
    return false;
  }
  if (!fm_this_backend.run(args, FM_OP_RESTORE_ADAM, &list, &o, &s, NULL)) {
    return false;
  }
  for (int64_t r = 0; r < list.count; r++) {
    double count = 0.0;
    step_count(args, &args->arg[STEPS], r, &count);
    set_step_count(&args->arg[STEPS].tensors[r], count + 1.0);
  }
  return true;
}

static bool op_isa(fm_args *args, StableIValue *stack) {
  (void)args;
  stack[0] = (fm_slot){.integer = fm_this_backend.isa()}.value;
  return true;
}

/* ---- the table ---- */

/* name, whether it has a kernel for each device (no tensor argument: nothing to dispatch on), schema */
#define FM_OPERATORS(X)                                                                                               \
  X(norm, true, "norm(Tensor[] tensors, Tensor[] weights, float q, int scaling, float eta) -> Tensor")                \
  X(ties, true, "ties(Tensor[] tensors, Tensor[] weights, Tensor norm, int scaling, float eta) -> Tensor")            \
  X(sam_ascend_, true,                                                                                                \
    "sam_ascend_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) backup, Tensor norm, Tensor rho, Tensor key, float " \
    "q, "                                                                                                             \
    "int scaling, float eta, float eps) -> ()")                                                                       \
  X(restore_, true, "restore_(Tensor(a!)[] params, Tensor backup) -> ()")                                             \
  X(restore_sgd_, true,                                                                                               \
    "restore_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor backup, Tensor lr, "     \
    "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first_step) -> ()")      \
  X(restore_adam_, true,                                                                                              \
    "restore_adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "            \
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor backup, Tensor lr, float beta1, float beta2, float "    \
    "eps, "                                                                                                           \
    "float weight_decay, bool decoupled, bool amsgrad, bool maximize) -> ()")                                         \
  X(isa, false, "isa() -> int")

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

/* python/flatmin/_lib.py finds an operator missing, should torch refuse one, and says what to do. */
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
