/* What an operator is asked to do: the operands of a tensor by number, the options of a call, the numbers among them
 * that lie on the device, and what differs from tensor to tensor. */
#ifndef FM_OPTIONS_H
#define FM_OPTIONS_H

#include "fm_random.h"

#include <assert.h>

/* Where each value of a tensor is found: the operands that an operator has not are absent. The lists of dot are
 * operands 0, 1 and so on. */
enum {
  FM_PARAM,
  FM_OLD, /* the backup */
  FM_GRAD,
  FM_BUFFER,            /* SGD's momentum */
  FM_MEAN = FM_BUFFER,  /* Adam's and Lion's */
  FM_THIRD = FM_BUFFER, /* blend's third list */
  FM_SQUARE,
  FM_LARGEST,   /* amsgrad only */
  FM_CURVATURE, /* an average of the Hessian's diagonal, or sizes that are given */
  FM_LIPSCHITZ, /* of the Hessian, per element */
  FM_MAX_OPERANDS,
  FM_DRAW = FM_MAX_OPERANDS, /* a random number of the element */
  FM_TALLY,                  /* three values that are added up beside the update */
  FM_VALUES = FM_TALLY + 3,
};

/* The set of one operand. */
#define FM_BIT(operand) (1u << (operand))

/* X(k) for each operand k, in straight text, so that arrays of operands become registers. */
#define FM_EACH_OPERAND(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
static_assert(FM_MAX_OPERANDS == 8, "FM_EACH_OPERAND names every one");

/* Adaptive conventions T(w) of ASAM and its relatives (Kwon et al. 2021, arXiv 2102.11600, and two others in use). */
enum {
  FM_SCALE_NONE = 0,       /* T = 1 */
  FM_SCALE_ASAM = 1,       /* T = |w| + eta; tensors of one dimension or none are left unscaled */
  FM_SCALE_DAVDA54 = 2,    /* T = |w| */
  FM_SCALE_BIG_VISION = 3, /* T = |w| on the perturbation only: the norm and its powers see g itself */
};

/* How the size of the noise is given. */
enum { FM_SIZE_NEIGHBOURHOOD, FM_SIZE_CURVATURE, FM_SIZE_GIVEN };

/* What a curvature average is fed with. */
enum { FM_SOURCE_SQUARE, FM_SOURCE_PLAIN, FM_SOURCE_PROBED };

typedef struct fm_options {
  double q, eta, norm;
  double rho, eps; /* ascend; eps is the neighbourhood's too */
  bool random;     /* ascend: stochastic rounding of 16-bit parameters by (seed, step) */
  uint64_t seed, step;
  double lr, momentum, dampening, weight_decay; /* the base steps */
  double beta1, beta2, adam_eps;
  bool nesterov, maximize, first_step, decoupled, amsgrad;
  double scale;                             /* noise, and axpy's factor */
  double lipschitz, curvature_scale, gamma; /* noise and PACGen */
  double source_scale, decay, lipschitz_decay, min_step, correction_before, correction_after; /* curvature */
  double coefficient[3]; /* blend: of what is written, FM_GRAD and FM_THIRD */
  int sizing, law, source;
  int lists; /* dot: 2 to FM_DOT_LISTS */
} fm_options;

/* The numbers that change from step to step, where the kernels read them: on a GPU their values are unknown to the
 * host. */
typedef struct fm_scalars {
  const double *norm, *rho, *lr, *scale, *lipschitz, *curvature_scale;
  const double *corrections;  /* before and after */
  const double *coefficients; /* blend: three */
  const uint64_t *key;        /* seed, step; NULL to round to nearest */
  bool each;     /* tensors have numbers of their own: a rho; a rate and a weight decay; a scale, gamma and eps */
  bool each_key; /* seed, step and tensor of each */
} fm_scalars;

FM_HD void fm_read_scalars(fm_options *o, const fm_scalars *s) {
  o->norm = s->norm ? *s->norm : o->norm;
  o->rho = s->rho ? *s->rho : o->rho;
  o->lr = s->lr ? *s->lr : o->lr;
  o->scale = s->scale ? *s->scale : o->scale;
  o->lipschitz = s->lipschitz ? *s->lipschitz : o->lipschitz;
  o->curvature_scale = s->curvature_scale ? *s->curvature_scale : o->curvature_scale;
  o->correction_before = s->corrections ? s->corrections[0] : o->correction_before;
  o->correction_after = s->corrections ? s->corrections[1] : o->correction_after;
  for (int k = 0; k < 3; k++) {
    o->coefficient[k] = s->coefficients ? s->coefficients[k] : o->coefficient[k];
  }
  o->random = s->key != NULL;
  o->seed = s->key ? s->key[0] : 0;
  o->step = s->key ? s->key[1] : 0;
}

/* Where each tensor has a key of its own: seed, step and its number in that stream. */
FM_HD const uint64_t *fm_own_key(const fm_scalars *s, int64_t tensor) { return s->key + 3 * tensor; }

/* The numbers of one tensor, where a call has some for each. */
FM_HD void fm_read_own_scalars(fm_options *o, const fm_scalars *s, int64_t tensor) {
  if (s->each_key) {
    o->seed = fm_own_key(s, tensor)[0];
    o->step = fm_own_key(s, tensor)[1];
  }
  if (s->each && s->rho) {
    o->rho = s->rho[tensor];
  }
  if (s->each && s->lr) {
    o->lr = s->lr[2 * tensor];
    o->weight_decay = s->lr[2 * tensor + 1];
  }
  if (s->each && s->scale) {
    o->scale = s->scale[3 * tensor];
    o->gamma = s->scale[3 * tensor + 1];
    o->eps = s->scale[3 * tensor + 2];
  }
}

/* The number of a tensor in the stream of its key. */
FM_HD uint32_t fm_number_in_stream(const fm_scalars *s, int64_t tensor) {
  return s->each_key ? (uint32_t)fm_own_key(s, tensor)[2] : (uint32_t)tensor;
}

/* What differs from tensor to tensor. */
typedef struct fm_traits {
  int scaling;                 /* T(w): ASAM leaves biases and norm layers unscaled */
  double bias_correction1;     /* Adam: 1 - beta1^step */
  double root_bias_correction; /* Adam: square root of 1 - beta2^step */
} fm_traits;

#endif
