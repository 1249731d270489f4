/* The reductions of kernels_real.h. */

/* Adds elements to lanes [first, first + count). v[k]: the elements of operand k, where the term needs them. */
FM_INLINE void FM_NAME(add_terms)(fm_lanes *lanes, int first, const FM_REAL *const *v, int64_t at, int count,
                                  const fm_options *o, fm_way way) {
  const bool fp64 = FM_NATIVE == FM_F64;
  const int term = way.term;
  const FM_REAL *g = v[FM_GRAD] + at, *w = v[FM_PARAM] + at;
  const FM_REAL *h = v[FM_CURVATURE] + at, *lipschitz = v[FM_LIPSCHITZ] + at;
  for (int l = 0; l < count; l++) {
    const int k = first + l;
    if (term == FM_TERM_PACGEN) {
      fm_sum sum = {lanes->mid[k], lanes->big[k], lanes->small[k], lanes->rest[k]};
      const double each = way.full ? (double)lipschitz[l] : fm_default(FM_LIPSCHITZ);
      if (way.products) {
        fm_pacgen_product(&sum, (double)w[l], (double)h[l], each, o);
      } else {
        fm_pacgen_term(&sum, (double)w[l], (double)h[l], each, o);
      }
      lanes->mid[k] = sum.mid;
      lanes->big[k] = sum.big;
      lanes->small[k] = sum.small;
      lanes->rest[k] = sum.rest;
      continue;
    }
    const double x = way.full ? FM_NAME(fm_scaled_gradient)(w[l], g[l], way.scaling, o->eta) : (double)g[l];
    double *mid = &lanes->mid[k];
#ifdef __FMA__
    if (term == FM_TERM_SQUARE && !fp64 && !way.full) { /* a float's square is exact: one rounding */
      *mid = fma(x, x, *mid);
      continue;
    }
#endif
    const fm_sum t = fm_term(fabs(x), term, fp64, o);
    *mid = term == FM_TERM_LARGEST ? fm_larger_f64(*mid, t.mid) : *mid + t.mid;
    if (fm_has_parts(term, fp64)) {
      lanes->big[k] += t.big;
      lanes->small[k] += t.small;
    }
  }
}

/* Whether square_lanes adds up the whole strips of lanes of n elements. It fills the lanes, which need not be clear. */
FM_INLINE bool FM_NAME(by_square_lanes)(fm_way way, int64_t n) {
#ifdef __FMA__
  return way.term == FM_TERM_SQUARE && FM_NATIVE == FM_F32 && !way.full && n >= FM_LANES;
#else
  (void)way;
  (void)n;
  return false;
#endif
}

/* Adds elements [begin, end) of row r, a chunk, to its lanes. */
FM_INLINE void FM_NAME(add_chunk)(fm_lanes *lanes, const fm_list *list, int64_t r, int64_t begin, int64_t end,
                                  const fm_options *o, fm_way way) {
  const fm_row *row = &list->rows[r];
  const int group = way.term == FM_TERM_PACGEN ? FM_LANE_GROUP / 2 : FM_LANE_GROUP; /* four sums a lane */
  const bool parts = fm_has_parts(way.term, FM_NATIVE == FM_F64);
  const unsigned own = way.term == FM_TERM_PACGEN ? FM_BIT(FM_PARAM) | FM_BIT(FM_CURVATURE) : FM_BIT(FM_GRAD);
  const unsigned more = way.term == FM_TERM_PACGEN ? FM_BIT(FM_LIPSCHITZ) : FM_BIT(FM_PARAM);
  const unsigned reads = way.full ? own | more : own;
  const int operands[4] = {FM_PARAM, FM_GRAD, FM_CURVATURE, FM_LIPSCHITZ};
  FM_REAL blocks[4][FM_CHUNK];
  double scratch[FM_CHUNK];
  const FM_REAL *v[FM_MAX_OPERANDS];
  for (int k = 0; k < FM_MAX_OPERANDS; k++) {
    v[k] = blocks[0];
  }
  const int64_t n = end - begin, strips = n / FM_LANES;
  for (int b = 0; b < 4; b++) {
    if (reads & FM_BIT(operands[b])) {
      v[operands[b]] = FM_NAME(load)(&row->operand[operands[b]], begin, n, blocks[b], scratch);
    }
  }
  int first = 0;
#ifdef __FMA__
  if (FM_NAME(by_square_lanes)(way, n)) {
    square_lanes(lanes->mid, (const float *)(const void *)v[FM_GRAD], strips, gradients_behind(list, r, end));
    first = FM_LANES;
  }
#endif
  for (; strips > 0 && first < FM_LANES; first += group) {
    fm_lanes held;
    copy_lanes(&held, 0, lanes, first, group, parts);
    for (int64_t i = first; i < strips * FM_LANES; i += FM_LANES) {
      /* line after line of the next chunk: asked for in the order of the sums, 1 KB apart, it would come late */
      const int64_t line = FM_CACHE_LINE / (int64_t)sizeof(FM_REAL);
      const int64_t next = FM_CHUNK + first * (FM_CHUNK / FM_LANES) + (i - first) / FM_LANES * group;
      for (int64_t ahead = next; ahead < next + group; ahead += line) {
        for (int b = 0; b < 4; b++) {
          if (reads & FM_BIT(operands[b])) {
            __builtin_prefetch(v[operands[b]] + ahead);
          }
        }
      }
      FM_NAME(add_terms)(&held, 0, v, i, group, o, way);
    }
    copy_lanes(lanes, first, &held, 0, group, parts);
  }
  FM_NAME(add_terms)(lanes, 0, v, strips * FM_LANES, (int)(n % FM_LANES), o, way);
}

/* One partial result per chunk. `full` is a constant where it is inlined, so that the common case loads no weights. */
FM_INLINE void FM_NAME(reduce_chunks)(const fm_job *job, int64_t r, int64_t begin, int64_t end, int term, bool full) {
  const fm_row *row = &job->list->rows[r];
  const fm_options options = *job->options; /* a copy, which no store can reach */
  const bool parts = fm_has_parts(term, FM_NATIVE == FM_F64), pacgen = term == FM_TERM_PACGEN;
  for (int64_t chunk = begin; chunk < end; chunk += FM_CHUNK) {
    const int64_t chunk_end = min64(chunk + FM_CHUNK, end);
    const int used = lanes_of(chunk_end - chunk);
    fm_way way = {term, row->traits.scaling, full, pacgen};
    fm_lanes lanes;
    if (!FM_NAME(by_square_lanes)(way, chunk_end - chunk)) { /* which fills them itself */
      clear_lanes(&lanes, used, parts);
    }
    if (pacgen) {
      start_products(&lanes, used);
    }
    FM_NAME(add_chunk)(&lanes, job->list, r, chunk, chunk_end, &options, way);
    if (pacgen && !normalise_products(&lanes, used)) {
      way.products = false;
      clear_lanes(&lanes, used, parts);
      FM_NAME(add_chunk)(&lanes, job->list, r, chunk, chunk_end, &options, way);
    }
    job->list->partials[job->list->first_chunk[r] + chunk / FM_CHUNK] =
        fold_lanes(&lanes, used, term, FM_NATIVE == FM_F64);
  }
}

#define FM_REDUCTION(term, name)                                                                              \
  static void FM_NAME(name)(const fm_job *job, int64_t row, int64_t begin, int64_t end) {                     \
    const fm_row *its = &job->list->rows[row];                                                                \
    const bool each = its->operand[FM_LIPSCHITZ].data != NULL, scaled = its->traits.scaling != FM_SCALE_NONE; \
    if ((term) == FM_TERM_PACGEN ? each : scaled) {                                                           \
      FM_NAME(reduce_chunks)(job, row, begin, end, term, true);                                               \
    } else {                                                                                                  \
      FM_NAME(reduce_chunks)(job, row, begin, end, term, false);                                              \
    }                                                                                                         \
  }
FM_REDUCTIONS(FM_REDUCTION)
#undef FM_REDUCTION

/* ---- inner products ---- */

FM_INLINE void FM_NAME(unpack)(fm_pack *pack, const FM_REAL *from) {
  typedef FM_REAL vector __attribute__((vector_size(FM_PACK * sizeof(FM_REAL))));
  vector elements;
  memcpy(&elements, from, sizeof elements);
  *pack = __builtin_convertvector(elements, fm_pack);
}

/* Fills the lanes of every sum with the products of n elements. */
FM_INLINE void FM_NAME(multiply_chunk)(fm_products *products, const FM_REAL *const *v, int64_t n, int used, int lists) {
  const int64_t strips = n / FM_LANES;
  const int count = fm_dot_sums(lists);
  if (strips == 0) {
    for (int pair = 0; pair < count; pair++) {
      clear(products->sum[pair], (size_t)used * sizeof(double));
    }
  }
  for (int first = 0; strips > 0 && first < FM_LANES; first += FM_PACK) {
    fm_pack x[FM_DOT_LISTS] = {{0.0}}, sum[FM_DOT_SUMS] = {{0.0}};
    for (int64_t strip = 0; strip < strips; strip++) {
      const int64_t ahead = FM_CHUNK + first * (FM_CHUNK / FM_LANES) + strip * FM_PACK; /* as add_chunk */
#pragma GCC unroll 4
      for (int k = 0; k < lists; k++) {
        __builtin_prefetch(v[k] + ahead);
        FM_NAME(unpack)(&x[k], v[k] + strip * FM_LANES + first);
      }
#pragma GCC unroll 10
      for (int pair = 0; pair < count; pair++) {
        sum[pair] += x[fm_dot_a(lists, pair)] * x[fm_dot_b(lists, pair)];
      }
    }
#pragma GCC unroll 10
    for (int pair = 0; pair < count; pair++) {
      memcpy(products->sum[pair] + first, &sum[pair], sizeof sum[pair]);
    }
  }
#pragma GCC unroll 10
  for (int pair = 0; pair < count; pair++) {
    const FM_REAL *a = v[fm_dot_a(lists, pair)] + strips * FM_LANES, *b = v[fm_dot_b(lists, pair)] + strips * FM_LANES;
    for (int l = 0; l < (int)(n % FM_LANES); l++) {
      /* Lanes below `used` are set, which the analyzer cannot follow. NOLINTNEXTLINE(clang-analyzer-core.*) */
      products->sum[pair][l] += (double)a[l] * (double)b[l];
    }
  }
}

/* `lists` is a constant where this is inlined. */
FM_INLINE void FM_NAME(dot_chunks)(const fm_job *job, int64_t r, int64_t begin, int64_t end, int lists) {
  const fm_list *list = job->list;
  FM_REAL blocks[FM_DOT_LISTS][FM_CHUNK];
  double scratch[FM_CHUNK];
  fm_products products;
  for (int64_t chunk = begin; chunk < end; chunk += FM_CHUNK) {
    const int64_t n = min64(FM_CHUNK, end - chunk);
    const int used = lanes_of(n);
    const FM_REAL *v[FM_DOT_LISTS];
    for (int k = 0; k < lists; k++) {
      v[k] = FM_NAME(load)(&list->rows[r].operand[k], chunk, n, blocks[k], scratch);
    }
    FM_NAME(multiply_chunk)(&products, v, n, used, lists);
    fold_products(&products, used, lists, list->partials + list->first_chunk[r] + chunk / FM_CHUNK,
                  list->first_chunk[list->count]);
  }
}

static void FM_NAME(dot)(const fm_job *job, int64_t row, int64_t begin, int64_t end) {
  switch (job->options->lists) {
    case 2: FM_NAME(dot_chunks)(job, row, begin, end, 2); break;
    case 3: FM_NAME(dot_chunks)(job, row, begin, end, 3); break;
    default: FM_NAME(dot_chunks)(job, row, begin, end, FM_DOT_LISTS); break;
  }
}
