/* The update rules, one line of mathematics each. Included by updates.h twice: FM_REAL is the type of the arithmetic
 * (float for float32, bfloat16 and float16; double for float64), FM_NAME(x) is x_f32 or x_f64. */

/* T(w). */
FM_HD FM_REAL FM_NAME(fm_scaling)(FM_REAL w, int scaling, FM_REAL eta) {
  FM_REAL magnitude = FM_ABS(w);
  return scaling == FM_SCALE_NONE ? (FM_REAL)1 : scaling == FM_SCALE_ASAM ? magnitude + eta : magnitude;
}

/* T(w) g as the norm and its powers see it, in double: the product of two floats is exact there. */
FM_HD double FM_NAME(fm_scaled_gradient)(FM_REAL w, FM_REAL g, int scaling, double eta) {
  return scaling == FM_SCALE_BIG_VISION ? (double)g : fm_scaling_double(w, scaling, eta) * (double)g;
}

/* Whether an ascent moves anything. A zero or non-finite norm, radius or step does not: a skipped AMP step must not
 * cost the weights. */
FM_HD bool FM_NAME(fm_ascend_moves)(const fm_options *o) {
  FM_REAL step = (FM_REAL)(o->rho / (o->norm + o->eps));
  return isfinite(o->norm) && isfinite(step) && step != 0;
}

/* w + e for q = 2: e = step T^2 g with step = rho / (norm + eps) (Foret et al. 2020, arXiv 2010.01412, Eq. 2). */
FM_HD FM_REAL FM_NAME(fm_ascend_2)(FM_REAL w, FM_REAL g, FM_REAL step, int scaling, FM_REAL eta) {
  FM_REAL t = FM_NAME(fm_scaling)(w, scaling, eta);
  FM_REAL d = scaling == FM_SCALE_NONE ? g : scaling == FM_SCALE_BIG_VISION ? t * g : t * (t * g);
  return FM_FMA(step, d, w);
}

/* w + e for any other q: e = rho T sign(g) (|T g| / denominator)^(q-1). q = 1 is the sign; for q = infinity the
 * elements that attain the norm share the radius (rho is already divided by their number). The power is taken in
 * double. */
FM_HD FM_REAL FM_NAME(fm_ascend_q)(FM_REAL w, FM_REAL g, int scaling, const fm_options *o) {
  double x = fabs(FM_NAME(fm_scaled_gradient)(w, g, scaling, o->eta));
  double power = isinf(o->q)   ? (x == o->norm ? 1.0 : 0.0)
                 : o->q == 1.0 ? (x > 0.0 ? 1.0 : 0.0)
                               : fm_pow(x / (o->norm + o->eps), o->q - 1.0);
  double e = o->rho * fm_scaling_double(w, scaling, o->eta) * power;
  return w + (FM_REAL)(g > 0 ? e : g < 0 ? -e : 0.0);
}

/* torch.optim.SGD, in torch's order and with its roundings: each add with a factor is one fma. A flag is a number, 0 or
 * 1: gcc vectorises a choice by a number that does not change in the loop, and none by such a bool. */
typedef struct FM_NAME(fm_sgd) {
  FM_REAL minus_lr, momentum, one_minus_dampening, weight_decay;
  FM_REAL first_step, nesterov, maximize;
} FM_NAME(fm_sgd);

FM_HD FM_NAME(fm_sgd) FM_NAME(fm_sgd_of)(const fm_options *o) {
  FM_NAME(fm_sgd) sgd;
  sgd.minus_lr = (FM_REAL)-o->lr;
  sgd.momentum = (FM_REAL)o->momentum;
  sgd.one_minus_dampening = (FM_REAL)(1.0 - o->dampening);
  sgd.weight_decay = (FM_REAL)o->weight_decay;
  sgd.first_step = (FM_REAL)o->first_step;
  sgd.nesterov = (FM_REAL)o->nesterov;
  sgd.maximize = (FM_REAL)o->maximize;
  return sgd;
}

FM_HD FM_REAL FM_NAME(fm_sgd_direction)(FM_REAL w, FM_REAL g, const FM_NAME(fm_sgd) * o) {
  FM_REAL d = o->maximize != 0 ? -g : g;
  return o->weight_decay != 0 ? FM_FMA(o->weight_decay, w, d) : d;
}

FM_HD FM_REAL FM_NAME(fm_sgd_buffer)(FM_REAL d, FM_REAL buffer, const FM_NAME(fm_sgd) * o) {
  return o->first_step != 0 ? d : FM_FMA(o->one_minus_dampening, d, o->momentum * buffer);
}

FM_HD FM_REAL FM_NAME(fm_sgd_look_ahead)(FM_REAL d, FM_REAL buffer, const FM_NAME(fm_sgd) * o) {
  return o->nesterov != 0 ? FM_FMA(o->momentum, buffer, d) : buffer;
}

FM_HD FM_REAL FM_NAME(fm_sgd_step)(FM_REAL w, FM_REAL d, const FM_NAME(fm_sgd) * o) {
  return FM_FMA(o->minus_lr, d, w);
}

/* torch.optim.Adam and AdamW (decoupled weight decay). */
typedef struct FM_NAME(fm_adam) {
  FM_REAL one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, shrink; /* shrink = 1 - lr * weight_decay */
  FM_REAL minus_step_size, root_bias_correction2;
  FM_REAL l2; /* weight decay that is part of the gradient: AdamW has none */
  FM_REAL decoupled, maximize;
} FM_NAME(fm_adam);

FM_HD FM_NAME(fm_adam) FM_NAME(fm_adam_of)(const fm_options *o, double bias_correction1, double root_bias_correction) {
  FM_NAME(fm_adam) adam;
  adam.one_minus_beta1 = (FM_REAL)(1.0 - o->beta1);
  adam.beta2 = (FM_REAL)o->beta2;
  adam.one_minus_beta2 = (FM_REAL)(1.0 - o->beta2);
  adam.eps = (FM_REAL)o->adam_eps;
  adam.weight_decay = (FM_REAL)o->weight_decay;
  adam.shrink = (FM_REAL)(1.0 - o->lr * o->weight_decay);
  adam.minus_step_size = (FM_REAL) - (o->lr / bias_correction1);
  adam.root_bias_correction2 = (FM_REAL)root_bias_correction;
  adam.l2 = o->decoupled ? (FM_REAL)0 : adam.weight_decay;
  adam.decoupled = (FM_REAL)o->decoupled;
  adam.maximize = (FM_REAL)o->maximize;
  return adam;
}

FM_HD FM_REAL FM_NAME(fm_adam_gradient)(FM_REAL w, FM_REAL g, const FM_NAME(fm_adam) * o) {
  FM_REAL d = o->maximize != 0 ? -g : g;
  return o->l2 != 0 ? FM_FMA(o->l2, w, d) : d;
}

FM_HD FM_REAL FM_NAME(fm_adam_mean)(FM_REAL m, FM_REAL d, const FM_NAME(fm_adam) * o) {
  FM_REAL weight = o->one_minus_beta1; /* torch's lerp: from the nearer end */
  return weight < (FM_REAL)0.5 ? FM_FMA(weight, d - m, m) : d - (d - m) * ((FM_REAL)1 - weight);
}

FM_HD FM_REAL FM_NAME(fm_adam_square)(FM_REAL v, FM_REAL d, const FM_NAME(fm_adam) * o) {
  return FM_FMA(o->one_minus_beta2 * d, d, o->beta2 * v);
}

FM_HD FM_REAL FM_NAME(fm_adam_step)(FM_REAL w, FM_REAL m, FM_REAL v, const FM_NAME(fm_adam) * o) {
  FM_REAL start = o->decoupled != 0 ? w * o->shrink : w;
  FM_REAL denominator = FM_SQRT(v) / o->root_bias_correction2 + o->eps;
  return start + o->minus_step_size * (m / denominator);
}

/* Lion (Chen et al. 2023, arXiv 2302.06675, Algorithm 2), in the order and with the roundings of its implementations in
 * torch: the decay first, a step of lr by the sign of one average, and then the other average. A NaN of the gradient
 * stays one. */
typedef struct FM_NAME(fm_lion) {
  FM_REAL beta1, one_minus_beta1, beta2, one_minus_beta2, minus_lr, shrink; /* shrink = 1 - lr * weight_decay */
  FM_REAL maximize;
} FM_NAME(fm_lion);

FM_HD FM_NAME(fm_lion) FM_NAME(fm_lion_of)(const fm_options *o) {
  FM_NAME(fm_lion) lion;
  lion.beta1 = (FM_REAL)o->beta1;
  lion.one_minus_beta1 = (FM_REAL)(1.0 - o->beta1);
  lion.beta2 = (FM_REAL)o->beta2;
  lion.one_minus_beta2 = (FM_REAL)(1.0 - o->beta2);
  lion.minus_lr = (FM_REAL)-o->lr;
  lion.shrink = (FM_REAL)(1.0 - o->lr * o->weight_decay);
  lion.maximize = (FM_REAL)o->maximize;
  return lion;
}

FM_HD FM_REAL FM_NAME(fm_lion_step)(FM_REAL w, FM_REAL m, FM_REAL d, const FM_NAME(fm_lion) * o) {
  const FM_REAL c = FM_FMA(o->one_minus_beta1, d, o->beta1 * m);
  const FM_REAL sign = c > 0 ? (FM_REAL)1 : c < 0 ? (FM_REAL)-1 : c; /* 0, or a NaN */
  return FM_FMA(o->minus_lr, sign, w * o->shrink);
}

FM_HD FM_REAL FM_NAME(fm_lion_mean)(FM_REAL m, FM_REAL d, const FM_NAME(fm_lion) * o) {
  return FM_FMA(o->one_minus_beta2, d, o->beta2 * m);
}

/* ---- linear combinations ---- */

/* c y + (b x + a g), from the inside out, each sum one fma. A term whose coefficient is 0 in this arithmetic is left
 * out, so that a list that has no part in the result passes no NaN or infinity on. */
typedef struct FM_NAME(fm_blend) {
  FM_REAL a, b, c;
} FM_NAME(fm_blend);

FM_HD FM_NAME(fm_blend) FM_NAME(fm_blend_of)(const fm_options *o) {
  FM_NAME(fm_blend) blend;
  blend.a = (FM_REAL)o->coefficient[0];
  blend.b = (FM_REAL)o->coefficient[1];
  blend.c = (FM_REAL)o->coefficient[2];
  return blend;
}

/* sum + factor x. */
FM_HD FM_REAL FM_NAME(fm_add_multiple)(FM_REAL sum, FM_REAL factor, FM_REAL x) {
  return factor != 0 ? FM_FMA(factor, x, sum) : sum;
}

/* ---- noise by curvature (Wang et al. 2018, arXiv 1809.07402) ---- */

typedef struct FM_NAME(fm_noise) {
  FM_REAL gamma, eps, scale, lipschitz, curvature_scale;
  FM_REAL most; /* of N: 1, or 0 if scale is 0; a choice in the loop would keep it from being vectorised */
} FM_NAME(fm_noise);

FM_HD FM_NAME(fm_noise) FM_NAME(fm_noise_of)(const fm_options *o) {
  FM_NAME(fm_noise) noise;
  noise.gamma = (FM_REAL)o->gamma;
  noise.eps = (FM_REAL)o->eps;
  noise.scale = (FM_REAL)o->scale;
  noise.lipschitz = (FM_REAL)o->lipschitz;
  noise.curvature_scale = (FM_REAL)o->curvature_scale;
  noise.most = noise.scale != 0 ? (FM_REAL)1 : (FM_REAL)0;
  return noise;
}

/* N = gamma |w| + eps. */
FM_HD FM_REAL FM_NAME(fm_neighbourhood)(FM_REAL w, const FM_NAME(fm_noise) * o) {
  return FM_FMA(o->gamma, FM_ABS(w), o->eps);
}

/* Square root of c = max(h + rho N, 0); NaN if h + rho N is not finite, whichever way: it says nothing of a size. */
FM_HD FM_REAL FM_NAME(fm_root_curvature)(FM_REAL h, FM_REAL lipschitz, FM_REAL n, const FM_NAME(fm_noise) * o) {
  const FM_REAL c = FM_FMA(o->lipschitz * lipschitz, n, o->curvature_scale * h), zero = c - c;
  return FM_SQRT(c < 0 ? zero : c + zero);
}

/* w + sigma xi; w itself where sigma is 0 or not finite. A given size may be negative: the other side of w. */
FM_HD FM_REAL FM_NAME(fm_add_noise)(FM_REAL w, FM_REAL sigma, FM_REAL xi) {
  return sigma != 0 && FM_ABS(sigma) < FM_HUGE ? FM_FMA(sigma, xi, w) : w;
}

/* A normal variable cut at a >= 1 of its standard deviations, from a uniform one: Phi^-1(Phi(-a) + U (Phi(a) -
 * Phi(-a))), which by symmetry is the quantile of a mass. In float whatever the type: noise has no digits to lose. */
FM_HD FM_REAL FM_NAME(fm_truncate)(FM_REAL uniform, FM_REAL a) {
  const float cut = (float)(a < (FM_REAL)8 ? a : (FM_REAL)8);
  const float x = fm_normal_quantile((float)uniform * fm_normal_mass(cut));
  return (FM_REAL)(x > cut ? cut : x < -cut ? -cut : x);
}

/* ---- averages of a curvature, and difference quotients ---- */

typedef struct FM_NAME(fm_average) {
  FM_REAL decay, one_minus_decay, lipschitz_decay, one_minus_lipschitz_decay, min_step, before, after, source_scale;
} FM_NAME(fm_average);

FM_HD FM_NAME(fm_average) FM_NAME(fm_average_of)(const fm_options *o) {
  FM_NAME(fm_average) average;
  average.decay = (FM_REAL)o->decay;
  average.one_minus_decay = (FM_REAL)(1.0 - o->decay);
  average.lipschitz_decay = (FM_REAL)o->lipschitz_decay;
  average.one_minus_lipschitz_decay = (FM_REAL)(1.0 - o->lipschitz_decay);
  average.min_step = (FM_REAL)o->min_step;
  average.before = (FM_REAL)o->correction_before;
  average.after = (FM_REAL)o->correction_after;
  average.source_scale = (FM_REAL)o->source_scale;
  return average;
}

FM_HD FM_REAL FM_NAME(fm_average_curvature)(FM_REAL h, FM_REAL x, const FM_NAME(fm_average) * o) {
  return FM_FMA(o->one_minus_decay, o->source_scale * x, o->decay * h);
}

/* |k' h' - k h| over a step of the weight, 0 where it is none or h held nothing; NaN stays. */
FM_HD FM_REAL FM_NAME(fm_quotient)(FM_REAL step, FM_REAL h, FM_REAL new_h, const FM_NAME(fm_average) * o) {
  const FM_REAL change = FM_ABS(FM_FMA(o->after, new_h, -(o->before * h)));
  return step > o->min_step && o->before != 0 ? change / step : (FM_REAL)0;
}

FM_HD FM_REAL FM_NAME(fm_average_lipschitz)(FM_REAL rho, FM_REAL quotient, FM_REAL step,
                                            const FM_NAME(fm_average) * o) {
  const FM_REAL mixed = FM_FMA(o->one_minus_lipschitz_decay, quotient, o->lipschitz_decay * rho);
  return step > o->min_step && o->before != 0 ? mixed : rho;
}

/* ---- the updates: one element's operands, read and written in place ---- */

/* The constants of every rule; an update sets those that it uses. */
typedef struct FM_NAME(fm_rule) {
  const fm_options *options;
  FM_REAL step, eta;
  FM_NAME(fm_sgd) sgd;
  FM_NAME(fm_adam) adam;
  FM_NAME(fm_lion) lion;
  FM_NAME(fm_blend) blend;
  FM_NAME(fm_noise) noise;
  FM_NAME(fm_average) average;
} FM_NAME(fm_rule);

FM_HD void FM_NAME(fm_set_rule)(FM_NAME(fm_rule) * rule, fm_update update, const fm_options *o, const fm_traits *t) {
  rule->options = o;
  switch (update) {
    case FM_ASCEND:
      rule->step = (FM_REAL)(o->rho / (o->norm + o->eps));
      rule->eta = (FM_REAL)o->eta;
      break;
    case FM_AXPY: rule->step = (FM_REAL)o->scale; break;
    case FM_BLEND: rule->blend = FM_NAME(fm_blend_of)(o); break;
    case FM_RESTORE_SGD:
    case FM_RESTORE_SGD_CURVATURE: rule->sgd = FM_NAME(fm_sgd_of)(o); break;
    case FM_RESTORE_ADAM:
    case FM_RESTORE_ADAM_CURVATURE:
      rule->adam = FM_NAME(fm_adam_of)(o, t->bias_correction1, t->root_bias_correction);
      break;
    case FM_RESTORE_LION:
    case FM_RESTORE_LION_CURVATURE: rule->lion = FM_NAME(fm_lion_of)(o); break;
    case FM_SCALED_NOISE: rule->noise = FM_NAME(fm_noise_of)(o); break;
    default: break;
  }
  if (fm_shape_of(update).writes & FM_BIT(FM_CURVATURE)) {
    rule->average = FM_NAME(fm_average_of)(o);
  }
}

FM_HD void FM_NAME(fm_apply_sgd)(FM_REAL *v, const FM_NAME(fm_sgd) * o, bool momentum) {
  FM_REAL d = FM_NAME(fm_sgd_direction)(v[FM_OLD], v[FM_GRAD], o);
  if (momentum) {
    v[FM_BUFFER] = FM_NAME(fm_sgd_buffer)(d, v[FM_BUFFER], o);
    d = FM_NAME(fm_sgd_look_ahead)(d, v[FM_BUFFER], o);
  }
  v[FM_PARAM] = FM_NAME(fm_sgd_step)(v[FM_OLD], d, o);
}

FM_HD void FM_NAME(fm_apply_adam)(FM_REAL *v, const FM_NAME(fm_adam) * o, bool amsgrad) {
  const FM_REAL d = FM_NAME(fm_adam_gradient)(v[FM_OLD], v[FM_GRAD], o);
  v[FM_MEAN] = FM_NAME(fm_adam_mean)(v[FM_MEAN], d, o);
  v[FM_SQUARE] = FM_NAME(fm_adam_square)(v[FM_SQUARE], d, o);
  FM_REAL square = v[FM_SQUARE];
  if (amsgrad) {
    square = FM_NAME(fm_larger)(v[FM_LARGEST], square);
    v[FM_LARGEST] = square;
  }
  v[FM_PARAM] = FM_NAME(fm_adam_step)(v[FM_OLD], v[FM_MEAN], square, o);
}

FM_HD void FM_NAME(fm_apply_lion)(FM_REAL *v, const FM_NAME(fm_lion) * o) {
  const FM_REAL d = o->maximize != 0 ? -v[FM_GRAD] : v[FM_GRAD];
  v[FM_PARAM] = FM_NAME(fm_lion_step)(v[FM_OLD], v[FM_MEAN], d, o);
  v[FM_MEAN] = FM_NAME(fm_lion_mean)(v[FM_MEAN], d, o);
}

FM_HD void FM_NAME(fm_apply_blend)(FM_REAL *v, const FM_NAME(fm_blend) * o, bool third) {
  FM_REAL sum = o->a != 0 ? o->a * v[FM_PARAM] : (FM_REAL)0;
  sum = FM_NAME(fm_add_multiple)(sum, o->b, v[FM_GRAD]);
  v[FM_PARAM] = third ? FM_NAME(fm_add_multiple)(sum, o->c, v[FM_THIRD]) : sum;
}

/* Feeds the average with x and takes the quotient over the displacement of the weight; NaN if the average broke. */
FM_HD void FM_NAME(fm_apply_average)(FM_REAL *v, FM_REAL x, const FM_NAME(fm_average) * o) {
  const FM_REAL h = v[FM_CURVATURE], step = FM_ABS(v[FM_PARAM] - v[FM_OLD]);
  v[FM_CURVATURE] = FM_NAME(fm_average_curvature)(h, x, o);
  const FM_REAL quotient = FM_NAME(fm_quotient)(step, h, v[FM_CURVATURE], o);
  v[FM_LIPSCHITZ] = FM_NAME(fm_average_lipschitz)(v[FM_LIPSCHITZ], quotient, step, o);
  v[FM_TALLY] = quotient + (v[FM_CURVATURE] - v[FM_CURVATURE]);
}

FM_HD void FM_NAME(fm_apply_noise)(FM_REAL *v, const FM_NAME(fm_noise) * o, int sizing, bool truncated) {
  const FM_REAL n = sizing == FM_SIZE_GIVEN ? v[FM_CURVATURE] : FM_NAME(fm_neighbourhood)(v[FM_PARAM], o);
  FM_REAL sigma = o->scale * n;
  FM_REAL cut = (FM_REAL)1, capped = (FM_REAL)0;
  if (sizing == FM_SIZE_CURVATURE) {
    const FM_REAL root = FM_NAME(fm_root_curvature)(v[FM_CURVATURE], v[FM_LIPSCHITZ], n, o);
    const FM_REAL reach = n * root, free = o->scale / root, ratio = reach / o->scale;
    const bool cap = reach <= o->scale;
    sigma = cap ? o->most * n : free;
    capped = cap ? (FM_REAL)1 : (FM_REAL)0;
    cut = cap ? (FM_REAL)1 : ratio; /* N / sigma */
  }
  const bool finite = FM_ABS(sigma) < FM_HUGE;
  const FM_REAL xi = truncated ? FM_NAME(fm_truncate)(v[FM_DRAW], cut) : v[FM_DRAW];
  v[FM_PARAM] = FM_NAME(fm_add_noise)(v[FM_PARAM], sigma, xi);
  v[FM_TALLY] = finite ? sigma : (FM_REAL)0;
  v[FM_TALLY + 1] = capped;
  v[FM_TALLY + 2] = finite ? (FM_REAL)0 : (FM_REAL)1;
}

/* One element of an update. `update` and `form` (see fm_form in updates.h) are constants where this is inlined. */
FM_HD void FM_NAME(fm_apply)(fm_update update, int form, FM_REAL *v, const FM_NAME(fm_rule) * rule) {
  switch (update) {
    case FM_ASCEND:
      v[FM_PARAM] = form < FM_FORM_ANY_POWER
                        ? FM_NAME(fm_ascend_2)(v[FM_PARAM], v[FM_GRAD], rule->step, form, rule->eta)
                        : FM_NAME(fm_ascend_q)(v[FM_PARAM], v[FM_GRAD], form - FM_FORM_ANY_POWER, rule->options);
      break;
    case FM_AXPY: v[FM_PARAM] = FM_NAME(fm_add_multiple)(v[FM_PARAM], rule->step, v[FM_GRAD]); break;
    case FM_BLEND: FM_NAME(fm_apply_blend)(v, &rule->blend, form); break;
    case FM_RESTORE_SGD:
    case FM_RESTORE_SGD_CURVATURE: FM_NAME(fm_apply_sgd)(v, &rule->sgd, form); break;
    case FM_RESTORE_ADAM:
    case FM_RESTORE_ADAM_CURVATURE: FM_NAME(fm_apply_adam)(v, &rule->adam, form); break;
    case FM_RESTORE_LION:
    case FM_RESTORE_LION_CURVATURE: FM_NAME(fm_apply_lion)(v, &rule->lion); break;
    case FM_SCALED_NOISE: FM_NAME(fm_apply_noise)(v, &rule->noise, form / 2, form % 2); break;
    case FM_AVERAGE:
      FM_NAME(fm_apply_average)(v,
                                form == FM_SOURCE_SQUARE   ? v[FM_GRAD] * v[FM_GRAD]
                                : form == FM_SOURCE_PROBED ? v[FM_DRAW] * v[FM_GRAD]
                                                           : v[FM_GRAD],
                                &rule->average);
      break;
    case FM_PROBE: v[FM_PARAM] = v[FM_DRAW]; break;
    default: break;
  }
  if (update != FM_AVERAGE && (fm_shape_of(update).writes & FM_BIT(FM_CURVATURE))) { /* a base step that learns */
    FM_NAME(fm_apply_average)(v, v[FM_GRAD] * v[FM_GRAD], &rule->average);
  }
}
