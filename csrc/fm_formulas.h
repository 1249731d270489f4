/* The update rules, one line of mathematics each. Included by fm_math.h twice: FM_REAL is the type of the arithmetic
 * (float for float32, bfloat16 and float16; double for float64), FM_NAME(x) is x_f32 or x_f64. */

/* T(w). */
FM_HD FM_REAL FM_NAME(fm_scaling)(FM_REAL w, int scaling, FM_REAL eta) {
  FM_REAL magnitude = FM_ABS(w);
  return scaling == FM_SCALE_NONE ? (FM_REAL)1 : scaling == FM_SCALE_ASAM ? magnitude + eta : magnitude;
}

/* T(w) g as the norm and its powers see it, in double: the product of two floats is exact there. */
FM_HD double FM_NAME(fm_scaled_gradient)(FM_REAL w, FM_REAL g, int scaling, double eta) {
  return scaling == FM_SCALE_BIG_VISION ? (double)g : fm_scaling_wide(w, scaling, eta) * (double)g;
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
  double e = o->rho * fm_scaling_wide(w, scaling, o->eta) * power;
  return w + (FM_REAL)(g > 0 ? e : g < 0 ? -e : 0.0);
}

/* torch.optim.SGD, in torch's order and with its roundings: each add with a factor is one fma. */
typedef struct FM_NAME(fm_sgd) {
  FM_REAL minus_lr, momentum, one_minus_dampening, weight_decay;
  bool first_step, nesterov, maximize;
} FM_NAME(fm_sgd);

FM_HD FM_NAME(fm_sgd) FM_NAME(fm_sgd_of)(const fm_options *o) {
  FM_NAME(fm_sgd) sgd;
  sgd.minus_lr = (FM_REAL)-o->lr;
  sgd.momentum = (FM_REAL)o->momentum;
  sgd.one_minus_dampening = (FM_REAL)(1.0 - o->dampening);
  sgd.weight_decay = (FM_REAL)o->weight_decay;
  sgd.first_step = o->first_step;
  sgd.nesterov = o->nesterov;
  sgd.maximize = o->maximize;
  return sgd;
}

FM_HD FM_REAL FM_NAME(fm_sgd_direction)(FM_REAL w, FM_REAL g, const FM_NAME(fm_sgd) * o) {
  FM_REAL d = o->maximize ? -g : g;
  return o->weight_decay != 0 ? FM_FMA(o->weight_decay, w, d) : d;
}

FM_HD FM_REAL FM_NAME(fm_sgd_buffer)(FM_REAL d, FM_REAL buffer, const FM_NAME(fm_sgd) * o) {
  return o->first_step ? d : FM_FMA(o->one_minus_dampening, d, o->momentum * buffer);
}

FM_HD FM_REAL FM_NAME(fm_sgd_look_ahead)(FM_REAL d, FM_REAL buffer, const FM_NAME(fm_sgd) * o) {
  return o->nesterov ? FM_FMA(o->momentum, buffer, d) : buffer;
}

FM_HD FM_REAL FM_NAME(fm_sgd_step)(FM_REAL w, FM_REAL d, const FM_NAME(fm_sgd) * o) {
  return FM_FMA(o->minus_lr, d, w);
}

/* torch.optim.Adam and AdamW (decoupled weight decay). */
typedef struct FM_NAME(fm_adam) {
  FM_REAL one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, shrink; /* shrink = 1 - lr * weight_decay */
  FM_REAL minus_step_size, root_bias_correction2;
  bool decoupled, amsgrad, maximize;
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
  adam.decoupled = o->decoupled;
  adam.amsgrad = o->amsgrad;
  adam.maximize = o->maximize;
  return adam;
}

FM_HD FM_REAL FM_NAME(fm_adam_gradient)(FM_REAL w, FM_REAL g, const FM_NAME(fm_adam) * o) {
  FM_REAL d = o->maximize ? -g : g;
  return o->weight_decay != 0 && !o->decoupled ? FM_FMA(o->weight_decay, w, d) : d;
}

FM_HD FM_REAL FM_NAME(fm_adam_mean)(FM_REAL m, FM_REAL d, const FM_NAME(fm_adam) * o) {
  FM_REAL weight = o->one_minus_beta1; /* torch's lerp: from the nearer end */
  return weight < (FM_REAL)0.5 ? FM_FMA(weight, d - m, m) : d - (d - m) * ((FM_REAL)1 - weight);
}

FM_HD FM_REAL FM_NAME(fm_adam_square)(FM_REAL v, FM_REAL d, const FM_NAME(fm_adam) * o) {
  return FM_FMA(o->one_minus_beta2 * d, d, o->beta2 * v);
}

FM_HD FM_REAL FM_NAME(fm_adam_largest)(FM_REAL largest, FM_REAL v) {
  return v > largest || v != v ? v : largest; /* a NaN of either stays, as in torch.maximum */
}

FM_HD FM_REAL FM_NAME(fm_adam_step)(FM_REAL w, FM_REAL m, FM_REAL v, const FM_NAME(fm_adam) * o) {
  FM_REAL start = o->decoupled ? w * o->shrink : w;
  FM_REAL denominator = FM_SQRT(v) / o->root_bias_correction2 + o->eps;
  return start + o->minus_step_size * (m / denominator);
}
