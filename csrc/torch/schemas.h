/* The one list of operators. Python and the tests ask torch for it: a new operator is an entry here and its function,
 * op_<name>, in operators.c (of labels: label_operators.c). */
#ifndef FM_SCHEMAS_H
#define FM_SCHEMAS_H

/* What every restore-and-step operator takes last: averages of a curvature to keep beside the step, or empty lists
 * (`corrections` is not looked at then). It returns the largest difference quotient, or an empty tensor. */
#define FM_AVERAGED                                                                                                 \
  "Tensor(y!)[] curvatures, Tensor(z!)[] lipschitz, Tensor corrections, float decay, float lipschitz_decay, float " \
  "min_step) -> Tensor"

/* Name, whether it has a kernel for each device (no tensor argument: nothing to dispatch on), schema */
#define FM_OPERATORS(X)                                                                                         \
  X(norm, true, "norm(Tensor[] tensors, Tensor[] weights, float q, int scaling, float eta) -> Tensor")          \
  X(ties, true, "ties(Tensor[] tensors, Tensor[] weights, Tensor norm, int scaling, float eta) -> Tensor")      \
  X(sam_ascend_, true,                                                                                          \
    "sam_ascend_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) backup, Tensor norm, Tensor rho, Tensor key, " \
    "float q, int scaling, float eta, float eps) -> ()")                                                        \
  X(sam_norm_ascend_, true,                                                                                     \
    "sam_norm_ascend_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) backup, Tensor rho, Tensor key, "         \
    "float q, int scaling, float eta, float eps) -> Tensor")                                                    \
  X(save_, true, "save_(Tensor[] params, Tensor(a!) backup) -> ()")                                             \
  X(restore_, true, "restore_(Tensor(a!)[] params, Tensor backup) -> ()")                                       \
  X(restore_sgd_, true,                                                                                         \
    "restore_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor backup, "          \
    "Tensor lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, "            \
    "bool first_step, " FM_AVERAGED)                                                                            \
  X(restore_adam_, true,                                                                                        \
    "restore_adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "      \
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor backup, Tensor lr, float beta1, float beta2, "    \
    "float eps, float weight_decay, bool decoupled, bool amsgrad, bool maximize, " FM_AVERAGED)                 \
  X(restore_lion_, true,                                                                                        \
    "restore_lion_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor backup, Tensor lr, "      \
    "float beta1, float beta2, float weight_decay, bool maximize, " FM_AVERAGED)                                \
  X(dot, true, "dot(Tensor[] a, Tensor[] b, Tensor[] c, Tensor[] d) -> Tensor")                                 \
  X(blend_, true, "blend_(Tensor(a!)[] grads, Tensor[] x, Tensor[] y, Tensor coefficients) -> ()")              \
  X(axpy_, true, "axpy_(Tensor(a!)[] params, Tensor[] x, Tensor(b!) backup, Tensor scale) -> ()")               \
  X(scaled_noise_, true,                                                                                        \
    "scaled_noise_(Tensor(a!)[] params, Tensor[] curvatures, Tensor[] sizes, Tensor[] lipschitz, "              \
    "Tensor(b!) backup, Tensor key, Tensor scale, Tensor lipschitz_constant, Tensor curvature_scale, int law, " \
    "float gamma, float eps) -> Tensor")                                                                        \
  X(probe_, true, "probe_(Tensor(a!)[] tensors, Tensor key, int law) -> ()")                                    \
  X(curvature_, true,                                                                                           \
    "curvature_(Tensor(a!)[] curvatures, Tensor[] sources, Tensor(b!)[] lipschitz, Tensor[] params, "           \
    "Tensor backup, Tensor key, Tensor corrections, int source, float source_scale, float decay, "              \
    "float lipschitz_decay, float min_step) -> Tensor")                                                         \
  X(pacgen, true,                                                                                               \
    "pacgen(Tensor[] params, Tensor[] curvatures, Tensor[] lipschitz, Tensor lipschitz_constant, "              \
    "Tensor curvature_scale, float gamma, float eps) -> Tensor")                                                \
  X(filter_norm, true, "filter_norm(Tensor[] tensors, bool whole) -> Tensor")                                   \
  X(corrupt_labels, true,                                                                                       \
    "corrupt_labels(Tensor labels, Tensor index, Tensor bounds, Tensor targets, Tensor key, Tensor(a!) out, "   \
    "int classes, int threshold, int span, int offset, int ignore_index) -> ()")                                \
  X(draw_samples, true, "draw_samples(Tensor index, Tensor key, int count, int inner, int law) -> Tensor")      \
  X(isa, false, "isa() -> int")                                                                                 \
  X(best_isa, false, "best_isa() -> int")

#endif
