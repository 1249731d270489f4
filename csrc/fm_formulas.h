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

/* w + e for q = 2: e = step T^2 g with step = rho / (norm + eps) (Foret et al. 2020, arXiv 2010.01412, Eq. 2). */
FM_HD FM_REAL FM_NAME(fm_ascend_2)(FM_REAL w, FM_REAL g, FM_REAL step, int scaling, FM_REAL eta) {
  FM_REAL t = FM_NAME(fm_scaling)(w, scaling, eta);
  FM_REAL d = scaling == FM_SCALE_NONE ? g : scaling == FM_SCALE_BIG_VISION ? t * g : t * (t * g);
  return FM_FMA(step, d, w);
}

/* w + e for any other q: e = rho T sign(g) (|T g| / denominator)^(q-1). q = 1 is the sign; for q = infinity the
 * elements that attain the norm share the radius (rho is already divided by their number). The power is taken in
 * double. */
FM_HD FM_REAL FM_NAME(fm_ascend_q)(FM_REAL w, FM_REAL g, double rho, double norm, double denominator, double q,
                                   int scaling, double eta) {
  double x = fabs(FM_NAME(fm_scaled_gradient)(w, g, scaling, eta));
  double power = q == 1.0   ? (x > 0.0 ? 1.0 : 0.0)
                 : isinf(q) ? (x == norm ? 1.0 : 0.0)
                            : fm_pow(x / denominator, q - 1.0);
  double e = rho * fm_scaling_wide(w, scaling, eta) * power;
  return w + (FM_REAL)(g > 0 ? e : g < 0 ? -e : 0.0);
}

/* torch.optim.SGD, in torch's order and with its roundings: each add with a factor is one fma. */
typedef struct FM_NAME(fm_sgd) {
  FM_REAL minus_lr, momentum, one_minus_dampening, weight_decay;
  bool first_step, nesterov, maximize;
} FM_NAME(fm_sgd);

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
