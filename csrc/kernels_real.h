/* The loops of kernels.c for one type of arithmetic. Included twice: FM_REAL is float (float32, bfloat16 and float16
 * tensors) or double (float64 tensors, with float32 gradients or state allowed); FM_NATIVE is its fm_dtype. */

/* One block of every operand, and the scratch that strided tensors are gathered in. */
typedef struct FM_NAME(fm_blocks) {
  FM_REAL operand[FM_MAX_OPERANDS][FM_BLOCK];
  double scratch[FM_BLOCK];
} FM_NAME(fm_blocks);

/* ---- load and store ---- */

static const FM_REAL *FM_NAME(load)(const fm_view *v, int64_t at, int64_t n, FM_REAL *block, double *scratch) {
  const char *raw = raw_block(v, at, n, (char *)scratch);
  if (v->dtype == FM_NATIVE && v->layout == NULL) {
    return (const FM_REAL *)(const void *)raw;
  }
  if (v->dtype == FM_NATIVE) {
    memcpy(block, raw, (size_t)n * sizeof *block);
  } else if (v->dtype == FM_F32) {
    const float *from = (const float *)(const void *)raw;
    for (int64_t i = 0; i < n; i++) {
      block[i] = (FM_REAL)from[i];
    }
  } else {
    const uint16_t *from = (const uint16_t *)(const void *)raw;
    if (v->dtype == FM_BF16) {
      for (int64_t i = 0; i < n; i++) {
        block[i] = (FM_REAL)fm_bf16_to_f32(from[i]);
      }
    } else {
      for (int64_t i = 0; i < n; i++) {
        block[i] = (FM_REAL)fm_f16_to_f32(from[i]);
      }
    }
  }
  return block;
}

/* Where to compute a result: the tensor itself if its elements need no conversion and no streaming store. */
FM_INLINE FM_REAL *FM_NAME(target)(const fm_view *v, int64_t at, FM_REAL *block, bool streaming) {
  const bool direct = v->dtype == FM_NATIVE && v->layout == NULL && !streaming;
  return direct ? (FM_REAL *)(void *)v->data + at : block;
}

/* Takes a result from `target` to the tensor. `random` (one word per element, or NULL) rounds 16-bit types by chance.
 */
static void FM_NAME(store)(const fm_view *v, int64_t at, int64_t n, const FM_REAL *block, double *scratch,
                           const uint32_t *random, bool streaming) {
  const char *raw = (const char *)block;
  if (v->dtype == FM_NATIVE) {
    if (v->layout == NULL && raw == v->data + at * (int64_t)sizeof *block) {
      return;
    }
  } else if (v->dtype == FM_F32) {
    float *to = (float *)(void *)scratch;
    for (int64_t i = 0; i < n; i++) {
      to[i] = (float)block[i];
    }
    raw = (const char *)scratch;
  } else {
    uint16_t *to = (uint16_t *)(void *)scratch;
    if (random != NULL) {
      for (int64_t i = 0; i < n; i++) {
        float x = (float)block[i];
        to[i] = v->dtype == FM_BF16 ? fm_f32_to_bf16_random(x, random[i]) : fm_f32_to_f16_random(x, random[i]);
      }
    } else if (v->dtype == FM_BF16) {
      for (int64_t i = 0; i < n; i++) {
        to[i] = fm_f32_to_bf16((float)block[i]);
      }
    } else {
      for (int64_t i = 0; i < n; i++) {
        to[i] = fm_f32_to_f16((float)block[i]);
      }
    }
    raw = (const char *)scratch;
  }
  put_raw(v, at, n, raw, streaming);
}

/* ---- reductions ---- */

/* Adds elements to lanes [first, first + count). */
FM_INLINE void FM_NAME(add_terms)(fm_lanes *lanes, int first, const FM_REAL *g, const FM_REAL *w, int count,
                                  int scaling, const fm_options *o, int term) {
  const bool wide = FM_NATIVE == FM_F64;
  for (int l = 0; l < count; l++) {
    double x = fabs(scaling == FM_SCALE_NONE ? (double)g[l] : FM_NAME(fm_scaled_gradient)(w[l], g[l], scaling, o->eta));
    const fm_sum t = fm_term(x, term, wide, o);
    double *mid = &lanes->mid[first + l];
    *mid = term == FM_TERM_LARGEST ? fm_larger(*mid, t.mid) : *mid + t.mid;
    if (term == FM_TERM_SQUARE && wide) { /* the others have one sum */
      lanes->big[first + l] += t.big;
      lanes->small[first + l] += t.small;
    }
  }
}

/* One partial result per chunk. `scaled` is a constant where it is inlined, so that the common case loads no weights.
 */
FM_INLINE void FM_NAME(reduce_chunks)(const fm_job *job, int64_t r, int64_t begin, int64_t end, int term, bool scaled) {
  enum { SPAN = 8 * FM_LANES };
  const fm_row *row = &job->list->rows[r];
  const int scaling = scaled ? row->scaling : FM_SCALE_NONE;
  FM_REAL blocks[2][SPAN];
  double scratch[SPAN];
  for (int64_t chunk = begin; chunk < end; chunk += FM_CHUNK) {
    fm_lanes lanes = {{0.0}, {0.0}, {0.0}};
    for (int64_t at = chunk; at < min64(chunk + FM_CHUNK, end); at += SPAN) {
      const int64_t n = min64(SPAN, end - at), rows = n / FM_LANES;
      const FM_REAL *g = FM_NAME(load)(&row->operand[FM_REDUCE_GRAD], at, n, blocks[0], scratch);
      const FM_REAL *w = scaled ? FM_NAME(load)(&row->operand[FM_REDUCE_WEIGHT], at, n, blocks[1], scratch) : g;
      for (int first = 0; first < FM_LANES; first += FM_LANE_GROUP) {
        fm_lanes held;
        copy_lanes(&held, 0, &lanes, first, FM_LANE_GROUP);
        for (int64_t i = first; i < rows * FM_LANES; i += FM_LANES) {
          FM_NAME(add_terms)(&held, 0, g + i, w + i, FM_LANE_GROUP, scaling, job->options, term);
        }
        copy_lanes(&lanes, first, &held, 0, FM_LANE_GROUP);
      }
      const int64_t done = rows * FM_LANES;
      FM_NAME(add_terms)(&lanes, 0, g + done, w + done, (int)(n - done), scaling, job->options, term);
    }
    job->list->partials[job->list->first_chunk[r] + chunk / FM_CHUNK] = fold_lanes(&lanes, term, FM_NATIVE == FM_F64);
  }
}

#define FM_REDUCTION(name, term)                                                          \
  static void FM_NAME(name)(const fm_job *job, int64_t row, int64_t begin, int64_t end) { \
    if (job->list->rows[row].scaling == FM_SCALE_NONE) {                                  \
      FM_NAME(reduce_chunks)(job, row, begin, end, term, false);                          \
    } else {                                                                              \
      FM_NAME(reduce_chunks)(job, row, begin, end, term, true);                           \
    }                                                                                     \
  }

FM_REDUCTION(square_sum, FM_TERM_SQUARE)
FM_REDUCTION(power_sum, FM_TERM_POWER)
FM_REDUCTION(largest, FM_TERM_LARGEST)
FM_REDUCTION(ties, FM_TERM_TIES)
#undef FM_REDUCTION

/* ---- ascend ---- */

/* One constant scaling per call site: each becomes its own branch-free loop. In and out may be the same block. */
FM_INLINE void FM_NAME(ascend_2_block)(FM_REAL *out, const FM_REAL *w, const FM_REAL *g, int64_t n, FM_REAL step,
                                       int scaling, FM_REAL eta) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    out[i] = FM_NAME(fm_ascend_2)(w[i], g[i], step, scaling, eta);
  }
}

static void FM_NAME(ascend_block)(FM_REAL *out, const FM_REAL *w, const FM_REAL *g, int64_t n, int scaling,
                                  const fm_options *o) {
  if (o->q != 2.0) {
    for (int64_t i = 0; i < n; i++) {
      out[i] = FM_NAME(fm_ascend_q)(w[i], g[i], scaling, o);
    }
    return;
  }
  const FM_REAL step = (FM_REAL)(o->rho / (o->norm + o->eps)), eta = (FM_REAL)o->eta;
  switch (scaling) {
    case FM_SCALE_NONE: FM_NAME(ascend_2_block)(out, w, g, n, step, FM_SCALE_NONE, eta); break;
    case FM_SCALE_ASAM: FM_NAME(ascend_2_block)(out, w, g, n, step, FM_SCALE_ASAM, eta); break;
    case FM_SCALE_DAVDA54: FM_NAME(ascend_2_block)(out, w, g, n, step, FM_SCALE_DAVDA54, eta); break;
    default: FM_NAME(ascend_2_block)(out, w, g, n, step, FM_SCALE_BIG_VISION, eta); break;
  }
}

static void FM_NAME(ascend)(const fm_job *job, int64_t r, int64_t begin, int64_t end) {
  const fm_row *row = &job->list->rows[r];
  const fm_options *o = job->options;
  const fm_view *param = &row->operand[FM_ASCEND_PARAM];
  const bool moves = FM_NAME(fm_ascend_moves)(o);
  const bool random = o->random && fm_dtype_size(param->dtype) == 2;
  FM_NAME(fm_blocks) blocks;
  uint32_t words[FM_BLOCK];
  for (int64_t at = begin; at < end; at += FM_BLOCK) {
    const int64_t n = min64(FM_BLOCK, end - at);
    put_raw(&row->operand[FM_ASCEND_OLD], at, n, raw_block(param, at, n, (char *)blocks.scratch), job->streaming);
    if (!moves) {
      continue;
    }
    const FM_REAL *w = FM_NAME(load)(param, at, n, blocks.operand[0], blocks.scratch);
    const FM_REAL *g = FM_NAME(load)(&row->operand[FM_ASCEND_GRAD], at, n, blocks.operand[1], blocks.scratch);
    FM_REAL *out = FM_NAME(target)(param, at, blocks.operand[0], false); /* just read: its lines are in cache */
    FM_NAME(ascend_block)(out, w, g, n, row->scaling, o);
    if (random) {
      for (int64_t quad = 0; quad < (n + 3) / 4; quad++) { /* at is a multiple of FM_BLOCK, hence of 4 */
        const fm_quad lanes = fm_random_quad(o->seed, o->step, (uint32_t)r, (uint64_t)(at / 4 + quad));
        memcpy(words + 4 * quad, lanes.lane, sizeof lanes.lane);
      }
    }
    FM_NAME(store)(param, at, n, out, blocks.scratch, random ? words : NULL, false);
  }
}

/* ---- restore fused with the base step ---- */

FM_INLINE void FM_NAME(sgd_block)(FM_REAL *out, const FM_REAL *w, const FM_REAL *g, int64_t n,
                                  const FM_NAME(fm_sgd) * o) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    out[i] = FM_NAME(fm_sgd_step)(w[i], FM_NAME(fm_sgd_direction)(w[i], g[i], o), o);
  }
}

FM_INLINE void FM_NAME(sgd_momentum_block)(FM_REAL *out, FM_REAL *buffer_out, const FM_REAL *w, const FM_REAL *g,
                                           const FM_REAL *buffer, int64_t n, const FM_NAME(fm_sgd) * o) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    const FM_REAL d = FM_NAME(fm_sgd_direction)(w[i], g[i], o);
    const FM_REAL b = FM_NAME(fm_sgd_buffer)(d, buffer[i], o);
    buffer_out[i] = b;
    out[i] = FM_NAME(fm_sgd_step)(w[i], FM_NAME(fm_sgd_look_ahead)(d, b, o), o);
  }
}

static void FM_NAME(restore_sgd)(const fm_job *job, int64_t r, int64_t begin, int64_t end) {
  const fm_row *row = &job->list->rows[r];
  const fm_options *o = job->options;
  const FM_NAME(fm_sgd) sgd = FM_NAME(fm_sgd_of)(o);
  const fm_view *param = &row->operand[FM_STEP_PARAM], *buffer = &row->operand[FM_SGD_BUFFER];
  FM_NAME(fm_blocks) blocks;
  for (int64_t at = begin; at < end; at += FM_BLOCK) {
    const int64_t n = min64(FM_BLOCK, end - at);
    const FM_REAL *w = FM_NAME(load)(&row->operand[FM_STEP_OLD], at, n, blocks.operand[0], blocks.scratch);
    const FM_REAL *g = FM_NAME(load)(&row->operand[FM_STEP_GRAD], at, n, blocks.operand[1], blocks.scratch);
    FM_REAL *out = FM_NAME(target)(param, at, blocks.operand[2], job->streaming);
    if (buffer->data != NULL) {
      const FM_REAL *b = FM_NAME(load)(buffer, at, n, blocks.operand[3], blocks.scratch);
      FM_REAL *b_out = FM_NAME(target)(buffer, at, blocks.operand[3], false);
      FM_NAME(sgd_momentum_block)(out, b_out, w, g, b, n, &sgd);
      FM_NAME(store)(buffer, at, n, b_out, blocks.scratch, NULL, false);
    } else {
      FM_NAME(sgd_block)(out, w, g, n, &sgd);
    }
    FM_NAME(store)(param, at, n, out, blocks.scratch, NULL, job->streaming);
  }
}

FM_INLINE void FM_NAME(adam_block)(FM_REAL *out, FM_REAL *mean, FM_REAL *square, FM_REAL *largest, const FM_REAL *w,
                                   const FM_REAL *g, int64_t n, const FM_NAME(fm_adam) * o) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    const FM_REAL d = FM_NAME(fm_adam_gradient)(w[i], g[i], o);
    const FM_REAL m = FM_NAME(fm_adam_mean)(mean[i], d, o);
    FM_REAL v = FM_NAME(fm_adam_square)(square[i], d, o);
    mean[i] = m;
    square[i] = v;
    if (o->amsgrad) {
      v = FM_NAME(fm_adam_largest)(largest[i], v);
      largest[i] = v;
    }
    out[i] = FM_NAME(fm_adam_step)(w[i], m, v, o);
  }
}

/* State that needs no conversion is updated where it lies; the rest passes through a block. */
static FM_REAL *FM_NAME(load_state)(const fm_view *v, int64_t at, int64_t n, FM_REAL *block, double *scratch) {
  if (v->data == NULL) {
    return block;
  }
  FM_REAL *place = FM_NAME(target)(v, at, block, false);
  if (place == block) {
    FM_NAME(load)(v, at, n, block, scratch);
  }
  return place;
}

static void FM_NAME(restore_adam)(const fm_job *job, int64_t r, int64_t begin, int64_t end) {
  const fm_row *row = &job->list->rows[r];
  const fm_options *o = job->options;
  const FM_NAME(fm_adam) adam = FM_NAME(fm_adam_of)(o, row->bias_correction1, row->root_bias_correction);
  const fm_view *param = &row->operand[FM_STEP_PARAM];
  FM_NAME(fm_blocks) blocks;
  for (int64_t at = begin; at < end; at += FM_BLOCK) {
    const int64_t n = min64(FM_BLOCK, end - at);
    const FM_REAL *w = FM_NAME(load)(&row->operand[FM_STEP_OLD], at, n, blocks.operand[0], blocks.scratch);
    const FM_REAL *g = FM_NAME(load)(&row->operand[FM_STEP_GRAD], at, n, blocks.operand[1], blocks.scratch);
    FM_REAL *state[3];
    for (int k = 0; k < 3; k++) {
      state[k] = FM_NAME(load_state)(&row->operand[FM_ADAM_MEAN + k], at, n, blocks.operand[2 + k], blocks.scratch);
    }
    FM_REAL *out = FM_NAME(target)(param, at, blocks.operand[5], job->streaming);
    FM_NAME(adam_block)(out, state[0], state[1], state[2], w, g, n, &adam);
    for (int k = 0; k < (o->amsgrad ? 3 : 2); k++) {
      FM_NAME(store)(&row->operand[FM_ADAM_MEAN + k], at, n, state[k], blocks.scratch, NULL, false);
    }
    FM_NAME(store)(param, at, n, out, blocks.scratch, NULL, job->streaming);
  }
}
