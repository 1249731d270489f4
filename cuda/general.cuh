/* The device code of rows.cuh for one type of arithmetic; see csrc/cpu/kernels_real.h, its twin on the CPU. */

/* Elements that are loaded together: 16 or 32 bytes of any type that this arithmetic reads; and those whose arithmetic
 * is written out. The two halves of a vector share one text in a loop, which halves nvcc's time. */
enum { FM_NAME(FM_WIDTH) = sizeof(FM_REAL) == 8 ? 4 : 8, FM_NAME(FM_STEP) = FM_NAME(FM_WIDTH) / 2 };

FM_DEVICE uint32_t FM_NAME(fm_word)(const fm_bits &q, int half, int apart, int j) {
  return half ? q.word[(apart + j) % 8] : q.word[j % 8];
}

/* Element j of a half. */
FM_DEVICE FM_REAL FM_NAME(fm_get)(const fm_bits &q, int dtype, int half, int j) {
  const int step = FM_NAME(FM_STEP);
  if (FM_NATIVE == FM_F64 && dtype == FM_F64) {
    const uint32_t low = FM_NAME(fm_word)(q, half, 2 * step, 2 * j),
                   high = FM_NAME(fm_word)(q, half, 2 * step, 2 * j + 1);
    return (FM_REAL)fm_f64_bits((uint64_t)high << 32 | low);
  }
  if (dtype == FM_F32) {
    return (FM_REAL)fm_f32_bits(FM_NAME(fm_word)(q, half, step, j));
  }
  const uint16_t bits = (uint16_t)(FM_NAME(fm_word)(q, half, step / 2, j / 2) >> 16 * (j % 2));
  return (FM_REAL)(dtype == FM_BF16 ? fm_bf16_to_f32(bits) : fm_f16_to_f32(bits));
}

/* Sets bits of a word of a half, which are zero before. */
FM_DEVICE void FM_NAME(fm_add_word)(fm_bits *q, int half, int apart, int j, uint32_t bits) {
  if (half) {
    q->word[(apart + j) % 8] |= bits;
  } else {
    q->word[j % 8] |= bits;
  }
}

/* Rounds a 16-bit type by `random` if `by_chance`. */
FM_DEVICE void FM_NAME(fm_put)(fm_bits *q, int dtype, int half, int j, FM_REAL x, bool by_chance, uint32_t random) {
  const int step = FM_NAME(FM_STEP);
  if (FM_NATIVE == FM_F64 && dtype == FM_F64) {
    const uint64_t bits = fm_bits_f64((double)x);
    FM_NAME(fm_add_word)(q, half, 2 * step, 2 * j, (uint32_t)bits);
    FM_NAME(fm_add_word)(q, half, 2 * step, 2 * j + 1, (uint32_t)(bits >> 32));
  } else if (dtype == FM_F32) {
    FM_NAME(fm_add_word)(q, half, step, j, fm_bits_f32((float)x));
  } else {
    uint16_t bits = dtype == FM_BF16 ? fm_f32_to_bf16((float)x) : fm_f32_to_f16((float)x);
    if (by_chance) {
      bits = dtype == FM_BF16 ? fm_f32_to_bf16_random((float)x, random) : fm_f32_to_f16_random((float)x, random);
    }
    FM_NAME(fm_add_word)(q, half, step / 2, j / 2, (uint32_t)bits << 16 * (j % 2));
  }
}

/* ---- reductions ---- */

template <int TERM>
FM_DEVICE void FM_NAME(fm_add_term)(fm_sum *lane, FM_REAL a, FM_REAL w, FM_REAL rho, int scaling, const fm_options *o) {
  if (TERM == FM_TERM_PACGEN) {
    fm_pacgen_term(lane, (double)w, (double)a, (double)rho, o);
    return;
  }
  const double x = fabs(scaling == FM_SCALE_NONE ? (double)a : FM_NAME(fm_scaled_gradient)(w, a, scaling, o->eta));
  *lane = fm_fold(*lane, fm_term(x, TERM, FM_NATIVE == FM_F64, o), TERM);
}

/* Lanes that the halves of a vector choose among by number would go to local memory; each half has its own, and the two
 * vectors of float64 that make a span theirs. */
template <int TERM>
FM_DEVICE fm_sum FM_NAME(fm_reduce_chunk)(const fm_cuda_launch *l, const fm_cuda_row *row, int64_t start, int thread,
                                          const fm_options *o) {
  const int width = FM_NAME(FM_WIDTH), step = FM_NAME(FM_STEP);
  const bool pacgen = TERM == FM_TERM_PACGEN;
  const int scaling = pacgen ? FM_SCALE_NONE : row->traits.scaling, k = pacgen ? FM_CURVATURE : FM_GRAD;
  const bool has_lipschitz = pacgen && row->data[FM_LIPSCHITZ] != NULL;
  const int64_t n = fm_chunk_size(row, start);
  const fm_sum none = {0.0, 0.0, 0.0, 0.0};
  fm_sum lanes[FM_CUDA_SPAN] = {none, none, none, none, none, none, none, none};
  for (int64_t span = FM_CUDA_SPAN * thread; span < n; span += FM_LANES) {
#pragma unroll
    for (int part = 0; part < FM_CUDA_SPAN; part += width) {
      const int64_t i = span + part;
      const int count = (int)(n - i < width ? n - i : width);
      if (count <= 0) {
        continue;
      }
      const fm_bits a = fm_load<width>(l, row, k, start + i, count);
      const fm_bits w = pacgen || scaling != FM_SCALE_NONE ? fm_load<width>(l, row, FM_PARAM, start + i, count) : a;
      const fm_bits rho = has_lipschitz ? fm_load<width>(l, row, FM_LIPSCHITZ, start + i, count) : a;
#pragma unroll
      for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int j = 0; j < step; j++) {
          if (half * step + j < count) {
            const FM_REAL one = (FM_REAL)fm_default(FM_LIPSCHITZ);
            FM_NAME(fm_add_term)<TERM>(
                &lanes[(part + half * step + j) % FM_CUDA_SPAN], FM_NAME(fm_get)(a, row->dtype[k], half, j),
                FM_NAME(fm_get)(w, row->dtype[FM_PARAM], half, j),
                has_lipschitz ? FM_NAME(fm_get)(rho, row->dtype[FM_LIPSCHITZ], half, j) : one, scaling, o);
          }
        }
      }
    }
  }
  return fm_fold_lanes<TERM, FM_NATIVE == FM_F64>(lanes);
}

/* ---- inner products ---- */

/* The sums of one plane over a chunk, by a warp: thread t has lanes 8 t to 8 t + 7. */
template <int LISTS, int PLANE>
FM_DEVICE fm_sum FM_NAME(fm_dot_plane)(const fm_cuda_launch *l, const fm_cuda_row *row, int64_t start, int thread) {
  const int width = FM_NAME(FM_WIDTH), step = FM_NAME(FM_STEP);
  const int first = PLANE * FM_DOT_PLANE, sums = fm_dot_sums(LISTS);
  const int64_t n = fm_chunk_size(row, start);
  const fm_sum none = {0.0, 0.0, 0.0, 0.0};
  fm_sum lanes[FM_CUDA_SPAN] = {none, none, none, none, none, none, none, none};
  for (int64_t span = FM_CUDA_SPAN * thread; span < n; span += FM_LANES) {
#pragma unroll
    for (int part = 0; part < FM_CUDA_SPAN; part += width) {
      const int64_t i = span + part;
      const int count = (int)(n - i < width ? n - i : width);
      if (count <= 0) {
        continue;
      }
      fm_bits in[LISTS];
#pragma unroll
      for (int k = fm_dot_a(LISTS, first); k < LISTS; k++) { /* no sum of a plane has a list before its first one's */
        in[k] = fm_load<width>(l, row, k, start + i, count);
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int j = 0; j < step; j++) {
          if (half * step + j < count) {
            double product[FM_DOT_PLANE];
#pragma unroll
            for (int p = 0; p < FM_DOT_PLANE; p++) {
              const int pair = first + p < sums ? first + p : first, a = fm_dot_a(LISTS, pair),
                        b = fm_dot_b(LISTS, pair);
              product[p] = first + p < sums ? (double)FM_NAME(fm_get)(in[a], row->dtype[a], half, j) *
                                                  (double)FM_NAME(fm_get)(in[b], row->dtype[b], half, j)
                                            : 0.0;
            }
            const fm_sum add = {product[0], product[1], product[2], product[3]};
            fm_sum *lane = &lanes[(part + half * step + j) % FM_CUDA_SPAN];
            *lane = fm_fold(*lane, add, FM_TERM_DOT);
          }
        }
      }
    }
  }
  return fm_fold_lanes<FM_TERM_DOT, FM_NATIVE == FM_F64>(lanes);
}

template <int LISTS>
FM_DEVICE fm_sum FM_NAME(fm_dot_chunk)(const fm_cuda_launch *l, const fm_cuda_row *row, int64_t start, int thread,
                                       int plane) {
  enum { LAST = (LISTS * (LISTS + 1) / 2 + FM_DOT_PLANE - 1) / FM_DOT_PLANE - 1 };
  if (LAST == 0 || plane == 0) {
    return FM_NAME(fm_dot_plane)<LISTS, 0>(l, row, start, thread);
  }
  if (LAST == 1 || plane == 1) {
    return FM_NAME(fm_dot_plane) < LISTS, LAST<1 ? LAST : 1>(l, row, start, thread);
  }
  return FM_NAME(fm_dot_plane)<LISTS, LAST>(l, row, start, thread);
}

/* ---- updates ---- */

static_assert(FM_PARAM == 0 && FM_OLD == 1, "the operands that the text below names by number");

/* Applies an update to `count` elements from i on, and adds to `lanes` what it tallies. */
template <fm_update UPDATE>
FM_DEVICE void FM_NAME(fm_update_vector)(const fm_cuda_launch *l, const fm_cuda_row *row, int64_t i, int count,
                                         int form, const FM_NAME(fm_rule) * rule, fm_sum *lanes) {
  const int width = FM_NAME(FM_WIDTH), step = FM_NAME(FM_STEP);
  const fm_shape shape = fm_shape_of(UPDATE);
  const fm_options *o = rule->options;
  const int dtype = row->dtype[FM_PARAM];
  const bool draws = (shape.reads & FM_BIT(FM_DRAW)) && !(fm_absent(UPDATE, form) & FM_BIT(FM_DRAW));
  const bool by_chance = UPDATE == FM_ASCEND && o->random && (dtype == FM_BF16 || dtype == FM_F16);
  const fm_bits empty = {{0, 0, 0, 0, 0, 0, 0, 0}};
  if ((shape.reads | shape.writes) == 0) { /* copies, and nothing else */
    const bool saves = shape.copy == FM_COPY_TO_BACKUP;
    const fm_bits bits = fm_load<width>(l, row, saves ? FM_PARAM : FM_OLD, i, count);
    fm_store<width>(l, row, saves ? FM_OLD : FM_PARAM, i, count, bits);
    return;
  }
  if (UPDATE == FM_ASCEND && !FM_NAME(fm_ascend_moves)(o)) {
    fm_store<width>(l, row, FM_OLD, i, count, fm_load<width>(l, row, FM_PARAM, i, count));
    return;
  }
#define FM_OPEN(k)                                                                                           \
  const bool has_##k = row->data[k] != NULL && !(fm_absent(UPDATE, form) & FM_BIT(k));                       \
  const fm_bits in_##k = (shape.reads & FM_BIT(k)) && has_##k ? fm_load<width>(l, row, k, i, count) : empty; \
  fm_bits out_##k = empty;
  FM_EACH_OPERAND(FM_OPEN)
  if (shape.copy == FM_COPY_TO_BACKUP && has_1) {
    fm_store<width>(l, row, FM_OLD, i, count, in_0);
  }
#pragma unroll 1
  for (int half = 0; half < 2; half++) {
    const int first = half * step; /* of a quad in float, of half a quad in double */
    fm_quad words = {{0, 0, 0, 0}};
    fm_draws drawn = {{0.0F, 0.0F, 0.0F, 0.0F}};
    if (draws || by_chance) {
      words = fm_random_quad(o->seed, o->step,
                             fm_has_own_scalars(UPDATE) ? fm_number_in_stream(&l->scalars, row->index) : row->index,
                             (uint64_t)(i + first) / 4);
    }
    if (draws) {
      drawn = fm_draw_quad(words, fm_law_of(UPDATE, o));
    }
#pragma unroll
    for (int j = 0; j < step; j++) {
      FM_REAL v[FM_VALUES];
#define FM_GET(k)                                                                              \
  if (shape.reads & FM_BIT(k)) {                                                               \
    v[k] = has_##k ? FM_NAME(fm_get)(in_##k, row->dtype[k], half, j) : (FM_REAL)fm_default(k); \
  }
#define FM_PUT(k)                                                                                \
  if (shape.writes & FM_BIT(k)) {                                                                \
    FM_NAME(fm_put)(&out_##k, row->dtype[k], half, j, v[k], (k) == FM_PARAM && by_chance, word); \
  }
      FM_EACH_OPERAND(FM_GET)
      const bool upper = step == 2 && half;
      const uint32_t word = upper ? words.word[(2 + j) % 4] : words.word[j];
      v[FM_DRAW] = (FM_REAL)(upper ? drawn.value[(2 + j) % 4] : drawn.value[j]);
      FM_NAME(fm_apply)(UPDATE, form, v, rule);
      FM_EACH_OPERAND(FM_PUT)
      if (shape.tally >= 0 && first + j < count) {
        fm_sum add = {(double)v[FM_TALLY], 0.0, 0.0, 0.0};
        if (shape.tally == FM_TERM_NOISE) {
          add.big = (double)v[FM_TALLY + 1];
          add.small = (double)v[FM_TALLY + 2];
        }
        if (half) {
          lanes[step + j] = fm_fold(lanes[step + j], add, shape.tally);
        } else {
          lanes[j] = fm_fold(lanes[j], add, shape.tally);
        }
      }
    }
  }
#define FM_CLOSE(k)                                \
  if ((shape.writes & FM_BIT(k)) && has_##k) {     \
    fm_store<width>(l, row, k, i, count, out_##k); \
  }
  FM_EACH_OPERAND(FM_CLOSE)
#undef FM_OPEN
#undef FM_GET
#undef FM_PUT
#undef FM_CLOSE
}

/* One chunk by `threads` threads. Returns what is tallied, to thread 0 of a warp. */
template <fm_update UPDATE>
FM_DEVICE fm_sum FM_NAME(fm_update_chunk)(const fm_cuda_launch *l, const fm_cuda_row *row, int64_t start, int thread,
                                          int threads, const fm_options *o) {
  const int width = FM_NAME(FM_WIDTH);
  constexpr int tally = fm_columns_of<UPDATE>::term;
  const int64_t n = fm_chunk_size(row, start);
  const int form = fm_form(UPDATE, o, &row->traits, fm_present_in(row));
  const fm_sum none = {0.0, 0.0, 0.0, 0.0};
  fm_sum lanes[FM_CUDA_SPAN] = {none, none, none, none, none, none, none, none};
  FM_NAME(fm_rule) rule;
  FM_NAME(fm_set_rule)(&rule, UPDATE, o, &row->traits);
  for (int64_t span = (int64_t)FM_CUDA_SPAN * thread; span < n; span += (int64_t)FM_CUDA_SPAN * threads) {
#pragma unroll
    for (int part = 0; part < FM_CUDA_SPAN; part += width) {
      const int64_t i = span + part;
      if (i < n) {
        FM_NAME(fm_update_vector)<UPDATE>(l, row, start + i, (int)(n - i < width ? n - i : width), form, &rule,
                                          lanes + part);
      }
    }
  }
  return tally >= 0 ? fm_fold_lanes<tally, false>(lanes) : none;
}
