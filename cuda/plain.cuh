/* Rows that are plain: every operand is dense float32 and begins on a boundary of 16 bytes, as in the lists of ordinary
 * training. The host finds out once a launch what general.cuh asks for each vector, so an element costs a third of
 * the instructions, and a thread half of the registers. Formulas, lanes and trees are those of the general text, hence
 * the bits. */

struct __align__(16) fm_floats {
  float value[4];
};

/* `count` elements of operand k from element i on, at most 4; zeros for the others. */
FM_DEVICE fm_floats fm_plain_load(const fm_cuda_row *row, int k, int64_t i, int count) {
  const float *at = (const float *)row->data[k] + i;
  if (count >= 4) {
    return *(const fm_floats *)at;
  }
  fm_floats v = {{0.0F, 0.0F, 0.0F, 0.0F}};
#pragma unroll
  for (int j = 0; j < 3; j++) {
    if (j < count) {
      v.value[j] = at[j];
    }
  }
  return v;
}

FM_DEVICE void fm_plain_store(const fm_cuda_row *row, int k, int64_t i, int count, const fm_floats &v) {
  float *at = (float *)row->data[k] + i;
  if (count >= 4) {
    *(fm_floats *)at = v;
    return;
  }
#pragma unroll
  for (int j = 0; j < 3; j++) {
    if (j < count) {
      at[j] = v.value[j];
    }
  }
}

/* The lanes of a chunk in halves on halves. Here thread t of a warp has lanes 4 t to 4 t + 3 and those 128 further on,
 * so that the threads of a warp read neighbours, and the first halving is a thread's own. The sum is thread 0's. */
template <int TERM>
FM_DEVICE fm_sum fm_fold_plain_lanes(fm_sum *lanes) {
#pragma unroll
  for (int j = 0; j < 4; j++) {
    lanes[j] = fm_fold(lanes[j], lanes[4 + j], TERM);
#pragma unroll 1
    for (unsigned by = 16; by > 0; by /= 2) {
      lanes[j] = fm_fold(lanes[j], fm_shuffle_down(lanes[j], by, fm_has_parts(TERM, false)), TERM);
    }
  }
  lanes[0] = fm_fold(lanes[0], lanes[2], TERM);
  lanes[1] = fm_fold(lanes[1], lanes[3], TERM);
  return fm_fold(lanes[0], lanes[1], TERM);
}

/* A worker's run of neighbouring chunks, and the row of the first. */
struct fm_run {
  int64_t chunk, end;
  const fm_cuda_row *row;
};

FM_DEVICE fm_run fm_run_of(const fm_cuda_launch *l, int64_t worker, int64_t workers) {
  const int64_t each = (l->chunk_end - l->chunk_begin + workers - 1) / workers;
  fm_run run;
  run.chunk = l->chunk_begin + worker * each;
  run.end = run.chunk + each < l->chunk_end ? run.chunk + each : l->chunk_end;
  run.row = run.chunk < run.end ? fm_row_of(l, run.chunk) : NULL;
  return run;
}

/* Where the run leaves its row. */
FM_DEVICE int64_t fm_row_end(const fm_run *run) {
  const int64_t end = run->row->first_chunk + (run->row->numel + FM_CHUNK - 1) / FM_CHUNK;
  return end < run->end ? end : run->end;
}

/* ---- reductions ---- */

template <int TERM>
FM_DEVICE void fm_plain_terms(fm_sum *lanes, const fm_cuda_row *row, int64_t start, int64_t n, int thread,
                              bool products, const fm_options *o) {
  const bool pacgen = TERM == FM_TERM_PACGEN;
  const int scaling = pacgen ? FM_SCALE_NONE : row->traits.scaling, k = pacgen ? FM_CURVATURE : FM_GRAD;
  const bool weighs = pacgen || scaling != FM_SCALE_NONE, bounds = pacgen && row->data[FM_LIPSCHITZ] != NULL;
  const float one = (float)fm_default(FM_LIPSCHITZ);
  const fm_floats ones = {{one, one, one, one}};
#pragma unroll 2
  for (int64_t span = 4 * thread; span < n; span += FM_LANES) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t i = span + half * (FM_LANES / 2);
      const int count = n - i < 4 ? (int)(n - i) : 4;
      if (count <= 0) {
        continue;
      }
      const fm_floats a = fm_plain_load(row, k, start + i, count);
      const fm_floats w = weighs ? fm_plain_load(row, FM_PARAM, start + i, count) : a;
      const fm_floats rho = bounds ? fm_plain_load(row, FM_LIPSCHITZ, start + i, count) : ones;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        fm_sum *lane = &lanes[4 * half + j];
        if (j < count && pacgen && products) {
          fm_pacgen_product(lane, (double)w.value[j], (double)a.value[j], (double)rho.value[j], o);
        } else if (j < count) {
          fm_add_term_f32<TERM>(lane, a.value[j], w.value[j], rho.value[j], scaling, o);
        }
      }
    }
  }
}

static_assert(FM_CHUNK <= FM_PRODUCTS * FM_LANES, "a lane of a chunk has no more weights than PACGen's products hold");

/* PACGen's lanes are products first, as on the CPU, and terms where those leave the range: the same bits. */
template <int TERM>
FM_DEVICE fm_sum fm_plain_reduce_chunk(const fm_cuda_row *row, int64_t start, int thread, const fm_options *o) {
  const int64_t n = fm_chunk_size(row, start);
  const bool pacgen = TERM == FM_TERM_PACGEN;
  const fm_sum none = {0.0, 0.0, 0.0, 0.0}, unit = {0.0, 1.0, 1.0, 0.0}, first = pacgen ? unit : none;
  fm_sum lanes[8] = {first, first, first, first, first, first, first, first};
  fm_plain_terms<TERM>(lanes, row, start, n, thread, true, o);
  if (pacgen) {
    bool normal = true;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      normal = normal && fm_pacgen_normal(&lanes[j]);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (normal) {
        fm_pacgen_normalise(&lanes[j]);
      } else {
        lanes[j] = none;
      }
    }
    if (!normal) {
      fm_plain_terms<TERM>(lanes, row, start, n, thread, false, o);
    }
  }
  return fm_fold_plain_lanes<TERM>(lanes);
}

/* ---- inner products ---- */

template <int LISTS, int PLANE>
FM_DEVICE fm_sum fm_plain_dot_plane(const fm_cuda_row *row, int64_t start, int thread) {
  const int first = PLANE * FM_DOT_PLANE, sums = fm_dot_sums(LISTS);
  const int64_t n = fm_chunk_size(row, start);
  const fm_sum none = {0.0, 0.0, 0.0, 0.0};
  fm_sum lanes[8] = {none, none, none, none, none, none, none, none};
#pragma unroll 1
  for (int64_t span = 4 * thread; span < n; span += FM_LANES) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t i = span + half * (FM_LANES / 2);
      const int count = n - i < 4 ? (int)(n - i) : 4;
      if (count <= 0) {
        continue;
      }
      fm_floats in[LISTS];
#pragma unroll
      for (int k = fm_dot_a(LISTS, first); k < LISTS; k++) {
        in[k] = fm_plain_load(row, k, start + i, count);
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (j < count) {
          double product[FM_DOT_PLANE];
#pragma unroll
          for (int p = 0; p < FM_DOT_PLANE; p++) {
            const int pair = first + p < sums ? first + p : first, a = fm_dot_a(LISTS, pair), b = fm_dot_b(LISTS, pair);
            product[p] = first + p < sums ? (double)in[a].value[j] * (double)in[b].value[j] : 0.0;
          }
          const fm_sum add = {product[0], product[1], product[2], product[3]};
          lanes[4 * half + j] = fm_fold(lanes[4 * half + j], add, FM_TERM_DOT);
        }
      }
    }
  }
  return fm_fold_plain_lanes<FM_TERM_DOT>(lanes);
}

template <int LISTS>
FM_DEVICE fm_sum fm_plain_dot_chunk(const fm_cuda_row *row, int64_t start, int thread, int plane) {
  enum { LAST = (LISTS * (LISTS + 1) / 2 + FM_DOT_PLANE - 1) / FM_DOT_PLANE - 1 };
  if (LAST == 0 || plane == 0) {
    return fm_plain_dot_plane<LISTS, 0>(row, start, thread);
  }
  if (LAST == 1 || plane == 1) {
    return fm_plain_dot_plane < LISTS, LAST<1 ? LAST : 1>(row, start, thread);
  }
  return fm_plain_dot_plane<LISTS, LAST>(row, start, thread);
}

/* ---- updates ---- */

/* Ascents by other norms than 2 take most of their time in powers, and are left to the general text. */
FM_HD bool fm_is_plain_update(fm_update update, const fm_options *o) { return update != FM_ASCEND || o->q == 2.0; }

template <fm_update UPDATE>
FM_DEVICE constexpr int fm_plain_forms() {
#define FM_KIND(kind, count, which, absent) (int)fm_columns_of<UPDATE>::forms == (int)(kind) ? (count):
  return UPDATE == FM_ASCEND ? FM_FORM_ANY_POWER : FM_FORM_KINDS(FM_KIND) 0;
#undef FM_KIND
}

/* Four neighbours, of which the row has `count`. */
template <fm_update UPDATE, int FORM>
FM_DEVICE void fm_plain_quad(const fm_cuda_row *row, int64_t i, int count, bool moves, const fm_scalars *scalars,
                             const fm_rule_f32 *rule, fm_sum *lanes) {
  const fm_shape shape = fm_shape_of_form(UPDATE, FORM);
  const fm_options *o = rule->options;
  const fm_floats empty = {{0.0F, 0.0F, 0.0F, 0.0F}};
  if ((shape.reads | shape.writes) == 0) { /* copies, and nothing else */
    const bool saves = shape.copy == FM_COPY_TO_BACKUP;
    fm_plain_store(row, saves ? FM_OLD : FM_PARAM, i, count, fm_plain_load(row, saves ? FM_PARAM : FM_OLD, i, count));
    return;
  }
#define FM_OPEN(k)                                                                         \
  const bool has_##k = ((shape.reads | shape.writes) & FM_BIT(k)) && row->data[k] != NULL; \
  fm_floats v_##k = (shape.reads & FM_BIT(k)) && has_##k ? fm_plain_load(row, k, i, count) : empty;
  FM_EACH_OPERAND(FM_OPEN)
  if (shape.copy == FM_COPY_TO_BACKUP && row->data[FM_OLD] != NULL) {
    fm_plain_store(row, FM_OLD, i, count, v_0);
  }
  if (UPDATE == FM_ASCEND && !moves) {
    return;
  }
  fm_draws drawn = {{0.0F, 0.0F, 0.0F, 0.0F}};
  if (shape.reads & FM_BIT(FM_DRAW)) {
    const bool own = fm_has_own_scalars(UPDATE) && scalars->each_key;
    const uint64_t *key = own ? fm_own_key(scalars, row->index) : NULL;
    const uint64_t seed = own ? key[0] : o->seed, step = own ? key[1] : o->step;
    const uint32_t number = own ? (uint32_t)key[2] : row->index;
    drawn = fm_draw_quad(fm_random_quad(seed, step, number, (uint64_t)i / 4), fm_law_of(UPDATE, o));
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    float v[FM_VALUES];
#define FM_GET(k)                                           \
  if (shape.reads & FM_BIT(k)) {                            \
    v[k] = has_##k ? v_##k.value[j] : (float)fm_default(k); \
  }
#define FM_PUT(k)                 \
  if (shape.writes & FM_BIT(k)) { \
    v_##k.value[j] = v[k];        \
  }
    FM_EACH_OPERAND(FM_GET)
    v[FM_DRAW] = drawn.value[j];
    fm_apply_f32(UPDATE, FORM, v, rule);
    FM_EACH_OPERAND(FM_PUT)
    if (shape.tally >= 0 && j < count) {
      fm_sum add = {(double)v[FM_TALLY], 0.0, 0.0, 0.0};
      if (shape.tally == FM_TERM_NOISE) {
        add.big = (double)v[FM_TALLY + 1];
        add.small = (double)v[FM_TALLY + 2];
      }
      lanes[j] = fm_fold(lanes[j], add, shape.tally);
    }
  }
#define FM_CLOSE(k)                            \
  if ((shape.writes & FM_BIT(k)) && has_##k) { \
    fm_plain_store(row, k, i, count, v_##k);   \
  }
  FM_EACH_OPERAND(FM_CLOSE)
#undef FM_OPEN
#undef FM_GET
#undef FM_PUT
#undef FM_CLOSE
}

/* One chunk by `threads` threads; by a warp where the update is summed over. */
template <fm_update UPDATE, int FORM>
FM_DEVICE fm_sum fm_plain_chunk(const fm_cuda_row *row, int64_t start, int thread, int threads, bool moves,
                                const fm_scalars *scalars, const fm_rule_f32 *rule) {
  constexpr int tally = fm_columns_of<UPDATE>::term;
  const int64_t n = fm_chunk_size(row, start);
  const fm_sum none = {0.0, 0.0, 0.0, 0.0};
  if (tally < 0) {
#pragma unroll 1
    for (int64_t i = 4 * thread; i < n; i += 4 * threads) {
      fm_plain_quad<UPDATE, FORM>(row, start + i, n - i < 4 ? (int)(n - i) : 4, moves, scalars, rule, NULL);
    }
    return none;
  }
  fm_sum lanes[8] = {none, none, none, none, none, none, none, none};
#pragma unroll 1
  for (int64_t span = 4 * thread; span < n; span += FM_LANES) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t i = span + half * (FM_LANES / 2);
      if (i < n) {
        fm_plain_quad<UPDATE, FORM>(row, start + i, n - i < 4 ? (int)(n - i) : 4, moves, scalars, rule,
                                    lanes + 4 * half);
      }
    }
  }
  return fm_fold_plain_lanes < tally<0 ? FM_TERM_LARGEST : tally>(lanes);
}

template <fm_update UPDATE, int FORM>
FM_DEVICE fm_sum fm_plain_chunk_of(int form, const fm_cuda_row *row, int64_t start, int thread, int threads, bool moves,
                                   const fm_scalars *scalars, const fm_rule_f32 *rule) {
  if constexpr (FORM + 1 < fm_plain_forms<UPDATE>()) {
    if (form != FORM) {
      return fm_plain_chunk_of<UPDATE, FORM + 1>(form, row, start, thread, threads, moves, scalars, rule);
    }
  }
  return fm_plain_chunk<UPDATE, FORM>(row, start, thread, threads, moves, scalars, rule);
}

/* ---- kernels ---- */

template <int TERM>
__global__ void fm_plain_reduce_kernel(FM_KERNEL_ARGUMENT fm_cuda_launch l) {
  fm_options o = l.options;
  fm_read_scalars(&o, &l.scalars);
  const int warp = (int)threadIdx.x / FM_CUDA_WARP, thread = (int)threadIdx.x % FM_CUDA_WARP;
  fm_run run = fm_run_of(&l, (int64_t)blockIdx.x * FM_CUDA_CHUNKS + warp, (int64_t)gridDim.x * FM_CUDA_CHUNKS);
  for (; run.chunk < run.end; run.row++) {
    for (const int64_t end = fm_row_end(&run); run.chunk < end; run.chunk++) {
      const int64_t start = (run.chunk - run.row->first_chunk) * FM_CHUNK;
      const fm_sum sum = fm_plain_reduce_chunk<TERM>(run.row, start, thread, &o);
      if (thread == 0) {
        l.partials[run.chunk] = sum;
      }
    }
  }
}

template <int LISTS>
__global__ void fm_plain_dot_kernel(FM_KERNEL_ARGUMENT fm_cuda_launch l, int64_t apart) {
  const int planes = fm_dot_planes(LISTS);
  const int warp = (int)threadIdx.x / FM_CUDA_WARP, thread = (int)threadIdx.x % FM_CUDA_WARP;
  const int64_t tasks = (l.chunk_end - l.chunk_begin) * planes;
  for (int64_t task = (int64_t)blockIdx.x * FM_CUDA_CHUNKS + warp; task < tasks;
       task += (int64_t)gridDim.x * FM_CUDA_CHUNKS) {
    const int64_t c = l.chunk_begin + task / planes;
    const int plane = (int)(task % planes);
    const fm_cuda_row *row = fm_row_of(&l, c);
    const fm_sum sum = fm_plain_dot_chunk<LISTS>(row, (c - row->first_chunk) * FM_CHUNK, thread, plane);
    if (thread == 0) {
      l.partials[plane * apart + c] = sum;
    }
  }
}

/* Blocks of a processor, by what they bring: registers of a thread that are enough without a spill. */
template <fm_update UPDATE>
FM_DEVICE constexpr int fm_plain_residents() {
  return UPDATE == FM_AVERAGE ? 6 : UPDATE == FM_RESTORE_ADAM ? 3 : 4;
}

template <fm_update UPDATE>
__global__ void __launch_bounds__(fm_columns_of<UPDATE>::term >= 0 ? FM_CUDA_CHUNKS * FM_CUDA_WARP : FM_CUDA_THREADS,
                                  fm_plain_residents<UPDATE>())
    fm_plain_update_kernel(FM_KERNEL_ARGUMENT fm_cuda_launch l) {
  fm_options o = l.options;
  fm_read_scalars(&o, &l.scalars);
  const bool tallies = fm_shape_of(UPDATE).tally >= 0;
  const int threads = tallies ? FM_CUDA_WARP : FM_CUDA_THREADS, at_once = tallies ? FM_CUDA_CHUNKS : 1;
  const int thread = (int)threadIdx.x % threads;
  fm_run run = fm_run_of(&l, (int64_t)blockIdx.x * at_once + threadIdx.x / threads, (int64_t)gridDim.x * at_once);
  for (; run.chunk < run.end; run.row++) {
    if (UPDATE == FM_SCALED_NOISE) { /* read anew: carried along, they would take registers */
      o = l.options;
      fm_read_scalars(&o, &l.scalars);
    }
    if (fm_has_own_scalars(UPDATE)) {
      fm_read_own_scalars(&o, &l.scalars, run.row->index);
    }
    const int form = fm_form(UPDATE, &o, &run.row->traits, fm_present_in(run.row));
    const bool moves = UPDATE != FM_ASCEND || fm_ascend_moves_f32(&o);
    fm_rule_f32 rule;
    fm_set_rule_f32(&rule, UPDATE, &o, &run.row->traits);
    for (const int64_t end = fm_row_end(&run); run.chunk < end; run.chunk++) {
      const int64_t start = (run.chunk - run.row->first_chunk) * FM_CHUNK;
      const fm_sum sum = fm_plain_chunk_of<UPDATE, 0>(form, run.row, start, thread, threads, moves, &l.scalars, &rule);
      if (tallies && thread == 0) {
        l.partials[run.chunk] = sum;
      }
    }
  }
}
