/* The device code of kernels.cu for one type of arithmetic; see csrc/kernels_real.h, its twin on the CPU. */

FM_DEVICE FM_REAL FM_NAME(fm_get)(const fm_quad_bits &q, int dtype, int j) {
  if (dtype == FM_F64) {
    return (FM_REAL)fm_f64_bits((uint64_t)q.word[2 * j + 1] << 32 | q.word[2 * j]);
  }
  if (dtype == FM_F32) {
    return (FM_REAL)fm_f32_bits(q.word[j]);
  }
  const uint16_t half = (uint16_t)(q.word[j / 2] >> 16 * (j % 2));
  return (FM_REAL)(dtype == FM_BF16 ? fm_bf16_to_f32(half) : fm_f16_to_f32(half));
}

/* The quad must be zero where nothing was put. */
FM_DEVICE void FM_NAME(fm_put)(fm_quad_bits *q, int dtype, int j, FM_REAL x) {
  if (dtype == FM_F64) {
    const uint64_t bits = fm_bits_f64((double)x);
    q->word[2 * j] = (uint32_t)bits;
    q->word[2 * j + 1] = (uint32_t)(bits >> 32);
  } else if (dtype == FM_F32) {
    q->word[j] = fm_bits_f32((float)x);
  } else {
    const uint16_t half = dtype == FM_BF16 ? fm_f32_to_bf16((float)x) : fm_f32_to_f16((float)x);
    q->word[j / 2] |= (uint32_t)half << 16 * (j % 2);
  }
}

/* The same for a 16-bit type rounded by chance. */
FM_DEVICE void FM_NAME(fm_put_random)(fm_quad_bits *q, int dtype, int j, FM_REAL x, uint32_t random) {
  const uint16_t half =
      dtype == FM_BF16 ? fm_f32_to_bf16_random((float)x, random) : fm_f32_to_f16_random((float)x, random);
  q->word[j / 2] |= (uint32_t)half << 16 * (j % 2);
}

/* ---- reductions: thread `lane` of a warp has lanes 4 lane to 4 lane + 3 of the chunk ---- */

template <int TERM>
FM_DEVICE fm_sum FM_NAME(fm_reduce_chunk)(const fm_cuda_launch *l, const fm_cuda_row *row, int64_t start, int lane,
                                          const fm_options *o) {
  const bool wide = FM_NATIVE == FM_F64;
  const bool scaled = row->scaling != FM_SCALE_NONE;
  const int64_t n = fm_chunk_size(row, start);
  fm_sum lanes[4] = {{0.0, 0.0, 0.0}, {0.0, 0.0, 0.0}, {0.0, 0.0, 0.0}, {0.0, 0.0, 0.0}};
  for (int64_t i = 4 * lane; i < n; i += FM_LANES) {
    const int count = (int)(n - i < 4 ? n - i : 4);
    const fm_quad_bits g = fm_load_quad(l, row, FM_REDUCE_GRAD, start + i, count);
    const fm_quad_bits w = scaled ? fm_load_quad(l, row, FM_REDUCE_WEIGHT, start + i, count) : g;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (j < count) {
        const FM_REAL gj = FM_NAME(fm_get)(g, row->dtype[FM_REDUCE_GRAD], j);
        const double x = fabs(scaled ? FM_NAME(fm_scaled_gradient)(FM_NAME(fm_get)(w, row->dtype[FM_REDUCE_WEIGHT], j),
                                                                   gj, row->scaling, o->eta)
                                     : (double)gj);
        lanes[j] = fm_fold(lanes[j], fm_term(x, TERM, wide, o), TERM);
      }
    }
  }
#pragma unroll
  for (unsigned by = 16; by > 0; by /= 2) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      lanes[j] = fm_fold(lanes[j], fm_shuffle_down(lanes[j], by), TERM);
    }
  }
  return fm_fold(fm_fold(lanes[0], lanes[2], TERM), fm_fold(lanes[1], lanes[3], TERM), TERM);
}

/* ---- updates of one quad ---- */

FM_DEVICE void FM_NAME(fm_ascend_quad)(const fm_cuda_launch *l, const fm_cuda_row *row, int64_t i, int count,
                                       const fm_options *o) {
  const fm_quad_bits old = fm_load_quad(l, row, FM_ASCEND_PARAM, i, count);
  fm_store_quad(l, row, FM_ASCEND_OLD, i, count, old);
  if (!FM_NAME(fm_ascend_moves)(o)) {
    return;
  }
  const int dtype = row->dtype[FM_ASCEND_PARAM];
  const fm_quad_bits grad = fm_load_quad(l, row, FM_ASCEND_GRAD, i, count);
  const FM_REAL step = (FM_REAL)(o->rho / (o->norm + o->eps)), eta = (FM_REAL)o->eta;
  const bool by_chance = o->random && (dtype == FM_BF16 || dtype == FM_F16);
  const fm_quad random = by_chance ? fm_random_quad(o->seed, o->step, row->index, (uint64_t)i / 4) : fm_quad();
  fm_quad_bits out = {{0, 0, 0, 0, 0, 0, 0, 0}};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const FM_REAL w = FM_NAME(fm_get)(old, dtype, j), g = FM_NAME(fm_get)(grad, row->dtype[FM_ASCEND_GRAD], j);
    const FM_REAL x =
        o->q == 2.0 ? FM_NAME(fm_ascend_2)(w, g, step, row->scaling, eta) : FM_NAME(fm_ascend_q)(w, g, row->scaling, o);
    if (by_chance) {
      FM_NAME(fm_put_random)(&out, dtype, j, x, random.lane[j]);
    } else {
      FM_NAME(fm_put)(&out, dtype, j, x);
    }
  }
  fm_store_quad(l, row, FM_ASCEND_PARAM, i, count, out);
}

FM_DEVICE void FM_NAME(fm_sgd_quad)(const fm_cuda_launch *l, const fm_cuda_row *row, int64_t i, int count,
                                    const fm_options *o) {
  const FM_NAME(fm_sgd) sgd = FM_NAME(fm_sgd_of)(o);
  const bool has_buffer = row->data[FM_SGD_BUFFER] != NULL;
  const fm_quad_bits old = fm_load_quad(l, row, FM_STEP_OLD, i, count);
  const fm_quad_bits grad = fm_load_quad(l, row, FM_STEP_GRAD, i, count);
  const fm_quad_bits buffer = has_buffer ? fm_load_quad(l, row, FM_SGD_BUFFER, i, count) : grad;
  fm_quad_bits out = {{0, 0, 0, 0, 0, 0, 0, 0}}, kept = out;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const FM_REAL w = FM_NAME(fm_get)(old, row->dtype[FM_STEP_OLD], j);
    FM_REAL d = FM_NAME(fm_sgd_direction)(w, FM_NAME(fm_get)(grad, row->dtype[FM_STEP_GRAD], j), &sgd);
    if (has_buffer) {
      const FM_REAL b = FM_NAME(fm_sgd_buffer)(d, FM_NAME(fm_get)(buffer, row->dtype[FM_SGD_BUFFER], j), &sgd);
      FM_NAME(fm_put)(&kept, row->dtype[FM_SGD_BUFFER], j, b);
      d = FM_NAME(fm_sgd_look_ahead)(d, b, &sgd);
    }
    FM_NAME(fm_put)(&out, row->dtype[FM_STEP_PARAM], j, FM_NAME(fm_sgd_step)(w, d, &sgd));
  }
  if (has_buffer) {
    fm_store_quad(l, row, FM_SGD_BUFFER, i, count, kept);
  }
  fm_store_quad(l, row, FM_STEP_PARAM, i, count, out);
}

FM_DEVICE void FM_NAME(fm_adam_quad)(const fm_cuda_launch *l, const fm_cuda_row *row, int64_t i, int count,
                                     const fm_options *o) {
  const FM_NAME(fm_adam) adam = FM_NAME(fm_adam_of)(o, row->bias_correction1, row->root_bias_correction);
  const fm_quad_bits old = fm_load_quad(l, row, FM_STEP_OLD, i, count);
  const fm_quad_bits grad = fm_load_quad(l, row, FM_STEP_GRAD, i, count);
  const fm_quad_bits mean = fm_load_quad(l, row, FM_ADAM_MEAN, i, count);
  const fm_quad_bits square = fm_load_quad(l, row, FM_ADAM_SQUARE, i, count);
  const fm_quad_bits largest = adam.amsgrad ? fm_load_quad(l, row, FM_ADAM_LARGEST, i, count) : square;
  fm_quad_bits out = {{0, 0, 0, 0, 0, 0, 0, 0}}, new_mean = out, new_square = out, new_largest = out;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const FM_REAL w = FM_NAME(fm_get)(old, row->dtype[FM_STEP_OLD], j);
    const FM_REAL d = FM_NAME(fm_adam_gradient)(w, FM_NAME(fm_get)(grad, row->dtype[FM_STEP_GRAD], j), &adam);
    const FM_REAL m = FM_NAME(fm_adam_mean)(FM_NAME(fm_get)(mean, row->dtype[FM_ADAM_MEAN], j), d, &adam);
    FM_REAL v = FM_NAME(fm_adam_square)(FM_NAME(fm_get)(square, row->dtype[FM_ADAM_SQUARE], j), d, &adam);
    FM_NAME(fm_put)(&new_mean, row->dtype[FM_ADAM_MEAN], j, m);
    FM_NAME(fm_put)(&new_square, row->dtype[FM_ADAM_SQUARE], j, v);
    if (adam.amsgrad) {
      v = FM_NAME(fm_adam_largest)(FM_NAME(fm_get)(largest, row->dtype[FM_ADAM_LARGEST], j), v);
      FM_NAME(fm_put)(&new_largest, row->dtype[FM_ADAM_LARGEST], j, v);
    }
    FM_NAME(fm_put)(&out, row->dtype[FM_STEP_PARAM], j, FM_NAME(fm_adam_step)(w, m, v, &adam));
  }
  fm_store_quad(l, row, FM_ADAM_MEAN, i, count, new_mean);
  fm_store_quad(l, row, FM_ADAM_SQUARE, i, count, new_square);
  if (adam.amsgrad) {
    fm_store_quad(l, row, FM_ADAM_LARGEST, i, count, new_largest);
  }
  fm_store_quad(l, row, FM_STEP_PARAM, i, count, out);
}
