/* The updates: the table of all of them, from which the CPU and the GPU make their loops, and the questions that it
 * answers. A new update is a row here and a case of fm_apply in fm_formulas.h, which this file includes for float and
 * for double; a new base step is a row of FM_BASE_STEPS. */
#ifndef FM_UPDATES_H
#define FM_UPDATES_H

#include "float16.h"
#include "options.h"
#include "reductions.h"

#define FM_SGD_STATE FM_BIT(FM_BUFFER)
#define FM_ADAM_STATE (FM_BIT(FM_MEAN) | FM_BIT(FM_SQUARE) | FM_BIT(FM_LARGEST))
#define FM_AVERAGES (FM_BIT(FM_CURVATURE) | FM_BIT(FM_LIPSCHITZ))
#define FM_AT_OLD (FM_BIT(FM_OLD) | FM_BIT(FM_GRAD))
#define FM_LION_STATE FM_BIT(FM_MEAN)

/* Bytes that an update moves as they are, before its rule. */
typedef enum fm_copy { FM_COPY_NOTHING, FM_COPY_TO_BACKUP, FM_COPY_FROM_BACKUP } fm_copy;

/* How the forms of an update are told apart, each compiled for itself: the kind, how many forms there are, which one it
 * is by the options `o`, the traits `t` and the operands that are `present`, and which operands a form has not. */
enum { FM_FORM_ANY_POWER = 4, FM_FORMS = 8 };
#define FM_FORM_KINDS(X)                                                                 \
  X(FM_ONE_FORM, 1, 0, 0)                                                                \
  X(FM_FORM_BY_SCALING, FM_FORMS, t->scaling + (o->q == 2.0 ? 0 : FM_FORM_ANY_POWER), 0) \
  X(FM_FORM_BY_OPTIONAL, 2, (present & optional) != 0, form != 0 ? 0 : optional)         \
  X(FM_FORM_BY_SIZING, 6, 2 * o->sizing + (o->law == FM_LAW_TRUNCATED),                  \
    form / 2 == FM_SIZE_CURVATURE ? 0                                                    \
    : form / 2 == FM_SIZE_GIVEN   ? FM_BIT(FM_LIPSCHITZ)                                 \
                                  : FM_AVERAGES)                                         \
  X(FM_FORM_BY_SOURCE, 3, o->source, form == FM_SOURCE_PROBED ? 0 : FM_BIT(FM_DRAW))

typedef enum fm_form_kind {
#define FM_ENUMERATOR(kind, count, which, absent) kind,
  FM_FORM_KINDS(FM_ENUMERATOR)
#undef FM_ENUMERATOR
} fm_form_kind;

/* Every update: its name, what an element's rule reads and writes, the kind of its forms and the operands that it can
 * do without, what is tallied over the elements (a FM_TERM_..., or -1) and what is copied. The loops of the CPU and of
 * the GPU are made from this table; the rules are in fm_formulas.h, fm_apply. */
#define FM_UPDATES(X)                                                                                                  \
  X(FM_ASCEND, ascend, FM_BIT(FM_PARAM) | FM_BIT(FM_GRAD), FM_BIT(FM_PARAM), FM_FORM_BY_SCALING, 0, -1,                \
    FM_COPY_TO_BACKUP)                                                                                                 \
  X(FM_SAVE, save, 0, 0, FM_ONE_FORM, 0, -1, FM_COPY_TO_BACKUP)                                                        \
  X(FM_RESTORE, restore, 0, 0, FM_ONE_FORM, 0, -1, FM_COPY_FROM_BACKUP)                                                \
  X(FM_AXPY, axpy, FM_BIT(FM_PARAM) | FM_BIT(FM_GRAD), FM_BIT(FM_PARAM), FM_FORM_BY_OPTIONAL, FM_BIT(FM_OLD), -1,      \
    FM_COPY_TO_BACKUP)                                                                                                 \
  X(FM_BLEND, blend, FM_BIT(FM_PARAM) | FM_BIT(FM_GRAD) | FM_BIT(FM_THIRD), FM_BIT(FM_PARAM), FM_FORM_BY_OPTIONAL,     \
    FM_BIT(FM_THIRD), -1, FM_COPY_NOTHING)                                                                             \
  FM_BASE_STEPS(X)                                                                                                     \
  X(FM_SCALED_NOISE, scaled_noise, FM_BIT(FM_PARAM) | FM_AVERAGES | FM_BIT(FM_DRAW), FM_BIT(FM_PARAM),                 \
    FM_FORM_BY_SIZING, 0, FM_TERM_NOISE, FM_COPY_TO_BACKUP)                                                            \
  X(FM_AVERAGE, average, FM_BIT(FM_PARAM) | FM_AT_OLD | FM_AVERAGES | FM_BIT(FM_DRAW), FM_AVERAGES, FM_FORM_BY_SOURCE, \
    0, FM_TERM_LARGEST, FM_COPY_NOTHING)                                                                               \
  X(FM_PROBE, probe, FM_BIT(FM_DRAW), FM_BIT(FM_PARAM), FM_ONE_FORM, 0, -1, FM_COPY_NOTHING)

/* The base steps: name, state, and which of that a step can do without. Each is two updates, of which the second,
 * FM_..._CURVATURE, also averages the squared gradient and tallies the largest difference quotient in the same pass:
 * a base that is added here learns curvature too. */
#define FM_BASE_STEPS(X)                                                            \
  FM_BASE_STEP(X, FM_RESTORE_SGD, restore_sgd, FM_SGD_STATE, FM_SGD_STATE)          \
  FM_BASE_STEP(X, FM_RESTORE_ADAM, restore_adam, FM_ADAM_STATE, FM_BIT(FM_LARGEST)) \
  FM_BASE_STEP(X, FM_RESTORE_LION, restore_lion, FM_LION_STATE, 0)
#define FM_BASE_STEP(X, update, name, state, optional)                                                                 \
  X(update, name, FM_AT_OLD | (state), FM_BIT(FM_PARAM) | (state), FM_FORM_OF_BASE(optional), optional, -1,            \
    FM_COPY_NOTHING)                                                                                                   \
  X(update##_CURVATURE, name##_curvature, FM_AT_OLD | (state) | FM_AVERAGES, FM_BIT(FM_PARAM) | (state) | FM_AVERAGES, \
    FM_FORM_OF_BASE(optional), optional, FM_TERM_LARGEST, FM_COPY_NOTHING)
#define FM_FORM_OF_BASE(optional) ((optional) != 0 ? FM_FORM_BY_OPTIONAL : FM_ONE_FORM)

typedef enum fm_update {
#define FM_ENUMERATOR(update, ...) update,
  FM_UPDATES(FM_ENUMERATOR)
#undef FM_ENUMERATOR
      FM_UPDATE_COUNT
} fm_update;

/* The base step that learns curvature too. */
FM_HD fm_update fm_with_curvature(fm_update base) { return (fm_update)(base + 1); }

typedef struct fm_shape {
  unsigned reads, writes, optional;
  fm_form_kind forms;
  int tally;
  fm_copy copy;
} fm_shape;

FM_HD fm_shape fm_shape_of(fm_update update) {
  fm_shape shape = {0, 0, 0, FM_ONE_FORM, -1, FM_COPY_NOTHING};
  switch (update) {
#define FM_CASE(update, name, its_reads, its_writes, its_forms, its_optional, its_tally, its_copy) \
  case update:                                                                                     \
    shape.reads = (its_reads);                                                                     \
    shape.writes = (its_writes);                                                                   \
    shape.optional = (its_optional);                                                               \
    shape.forms = (its_forms);                                                                     \
    shape.tally = (its_tally);                                                                     \
    shape.copy = (its_copy);                                                                       \
    break;
    FM_UPDATES(FM_CASE)
#undef FM_CASE
    default: break;
  }
  return shape;
}

/* The form of an update for a tensor. `present`: FM_BIT of each operand that there is. */
FM_HD int fm_form(fm_update update, const fm_options *o, const fm_traits *t, unsigned present) {
  const fm_shape shape = fm_shape_of(update);
  const fm_form_kind forms = shape.forms;
  const unsigned optional = shape.optional;
  (void)o;
  (void)t;
#define FM_KIND(kind, count, which, absent) \
  if (forms == (kind)) {                    \
    return (which);                         \
  }
  FM_FORM_KINDS(FM_KIND)
#undef FM_KIND
  return 0;
}

FM_HD int fm_form_count(fm_update update) {
  const fm_form_kind forms = fm_shape_of(update).forms;
#define FM_KIND(kind, count, which, absent) \
  if (forms == (kind)) {                    \
    return (count);                         \
  }
  FM_FORM_KINDS(FM_KIND)
#undef FM_KIND
  return 0;
}

/* The operands that a form has not. */
FM_HD unsigned fm_absent(fm_update update, int form) {
  const fm_shape shape = fm_shape_of(update);
  const fm_form_kind forms = shape.forms;
  const unsigned optional = shape.optional;
#define FM_KIND(kind, count, which, absent) \
  if (forms == (kind)) {                    \
    return (absent);                        \
  }
  FM_FORM_KINDS(FM_KIND)
#undef FM_KIND
  return 0;
}

/* The shape of a form: without a backup nothing is copied. */
FM_HD fm_shape fm_shape_of_form(fm_update update, int form) {
  const unsigned absent = fm_absent(update, form);
  fm_shape shape = fm_shape_of(update);
  shape.reads &= ~absent;
  shape.writes &= ~absent;
  shape.copy = absent & FM_BIT(FM_OLD) ? FM_COPY_NOTHING : shape.copy;
  return shape;
}

/* Whether tensors can have numbers of their own in it: an ascent, noise, and the base steps. */
FM_HD bool fm_has_own_scalars(fm_update update) {
  const fm_shape shape = fm_shape_of(update);
  const bool is_step = (shape.reads & FM_AT_OLD) == FM_AT_OLD && (shape.writes & FM_BIT(FM_PARAM)) != 0;
  return update == FM_ASCEND || update == FM_SCALED_NOISE || is_step;
}

/* The law of an update's draws. */
FM_HD int fm_law_of(fm_update update, const fm_options *o) { return update == FM_AVERAGE ? FM_LAW_RADEMACHER : o->law; }

/* What is read where an operand is absent. */
FM_HD double fm_default(int operand) { return operand == FM_LIPSCHITZ ? 1.0 : 0.0; }

/* ---- the update rules, once for float and once for double ---- */

/* T(w) in double, as the norm sees it. */
FM_HD double fm_scaling_double(double w, int scaling, double eta) {
  return scaling == FM_SCALE_NONE ? 1.0 : scaling == FM_SCALE_ASAM ? fabs(w) + eta : fabs(w);
}

#define FM_REAL float
#define FM_NAME(name) name##_f32
#define FM_FMA fmaf
#define FM_SQRT sqrtf
#define FM_ABS fabsf
#define FM_HUGE INFINITY
#include "fm_formulas.h"
#undef FM_REAL
#undef FM_NAME
#undef FM_FMA
#undef FM_SQRT
#undef FM_ABS

#define FM_REAL double
#define FM_NAME(name) name##_f64
#define FM_FMA fma
#define FM_SQRT sqrt
#define FM_ABS fabs
#include "fm_formulas.h"
#undef FM_REAL
#undef FM_NAME
#undef FM_FMA
#undef FM_SQRT
#undef FM_ABS

#endif
