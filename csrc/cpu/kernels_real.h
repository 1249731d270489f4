/* The loops of kernels.c for one type of arithmetic. Included twice: FM_REAL is float (float32, bfloat16 and float16
 * tensors) or double (float64 tensors, with float32 gradients or state allowed); FM_NATIVE is its fm_dtype. */

/* One block of every value, and the scratch that strided tensors are gathered in. */
typedef struct FM_NAME(fm_blocks) {
  FM_REAL value[FM_VALUES][FM_BLOCK];
  FM_REAL sink[FM_BLOCK]; /* what is written to an absent operand */
  double scratch[FM_BLOCK];
} FM_NAME(fm_blocks);

/* ---- load and store ---- */

/* Whether the elements lie in memory as the arithmetic takes them. */
FM_INLINE bool FM_NAME(is_native)(const fm_view *v) { return v->dtype == FM_NATIVE && v->layout == NULL; }

/* The values of an operand. */
static const FM_REAL *FM_NAME(load)(const fm_view *v, int64_t at, int64_t n, FM_REAL *block, double *scratch) {
  const char *raw = raw_block(v, at, n, (char *)scratch);
  if (FM_NAME(is_native)(v)) {
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
  const bool direct = FM_NAME(is_native)(v) && !streaming;
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

/* ---- updates ---- */

/* Applies a rule to n elements; in[k] and out[k], those of value k, may be one memory. */
FM_INLINE void FM_NAME(apply_block)(fm_update update, int form, const FM_REAL *const *in, FM_REAL *const *out,
                                    int64_t n, const FM_NAME(fm_rule) * rule) {
  const fm_shape shape = fm_shape_of_form(update, form);
#define FM_POINTERS(k)                 \
  const FM_REAL *const in_##k = in[k]; \
  FM_REAL *const out_##k = out[k];
  FM_EACH_OPERAND(FM_POINTERS)
  const FM_REAL *const draw = in[FM_DRAW];
  FM_REAL *const tally_0 = out[FM_TALLY], *const tally_1 = out[FM_TALLY + 1], *const tally_2 = out[FM_TALLY + 2];
  FM_INDEPENDENT
  for (int64_t i = 0; i < n; i++) {
    FM_REAL v[FM_VALUES] = {0};
#define FM_GET(k)                \
  if (shape.reads & FM_BIT(k)) { \
    v[k] = in_##k[i];            \
  }
#define FM_PUT(k)                 \
  if (shape.writes & FM_BIT(k)) { \
    out_##k[i] = v[k];            \
  }
    FM_EACH_OPERAND(FM_GET)
    if (shape.reads & FM_BIT(FM_DRAW)) {
      v[FM_DRAW] = draw[i];
    }
    FM_NAME(fm_apply)(update, form, v, rule);
    FM_EACH_OPERAND(FM_PUT)
    if (shape.tally >= 0) {
      tally_0[i] = v[FM_TALLY];
    }
    if (shape.tally == FM_TERM_NOISE) {
      tally_1[i] = v[FM_TALLY + 1];
      tally_2[i] = v[FM_TALLY + 2];
    }
#undef FM_POINTERS
#undef FM_GET
#undef FM_PUT
  }
}

/* Lanes of what is exact in FM_REAL in any order: maxima, and counts of at most FM_CHUNK / FM_LANES. In double
 * half as many go at a time. */
typedef struct FM_NAME(fm_exact) {
  FM_REAL first[FM_LANES], second[FM_LANES];
} FM_NAME(fm_exact);

/* Adds n elements of a block to lanes from `at` on. */
FM_INLINE void FM_NAME(add_tally)(fm_lanes *lanes, FM_NAME(fm_exact) * exact, int64_t at, FM_REAL *const *out,
                                  int64_t n, int term) {
  const FM_REAL *a = out[FM_TALLY], *b = out[FM_TALLY + 1], *c = out[FM_TALLY + 2];
  double *mid = lanes->mid + at;
  FM_REAL *first = exact->first + at, *second = exact->second + at;
  FM_INDEPENDENT
  for (int64_t i = 0; term == FM_TERM_LARGEST && i < n; i++) {
    first[i] = FM_NAME(fm_larger)(first[i], a[i]);
  }
  FM_INDEPENDENT
  for (int64_t i = 0; term == FM_TERM_NOISE && i < n; i++) {
    mid[i] += (double)a[i];
    first[i] += b[i];
    second[i] += c[i];
  }
}

/* Moves what is exact to the lanes in double. */
FM_INLINE void FM_NAME(take_exact)(fm_lanes *lanes, const FM_NAME(fm_exact) * exact, int used, int term) {
  for (int l = 0; l < used; l++) {
    if (term == FM_TERM_LARGEST) {
      lanes->mid[l] = (double)exact->first[l];
    } else {
      lanes->big[l] = (double)exact->first[l];
      lanes->small[l] = (double)exact->second[l];
    }
  }
}

/* The places of a block: where each is read and written. What is written and not read may be stored past the caches. */
typedef struct FM_NAME(fm_places) {
  const FM_REAL *in[FM_VALUES];
  FM_REAL *out[FM_VALUES];
} FM_NAME(fm_places);

/* What stays as it is over the blocks of a tensor, of which the first n elements of a value are used: where there is an
 * operand, and the values of one that is absent. */
FM_INLINE void FM_NAME(set_places)(FM_NAME(fm_places) * places, const fm_row *row, fm_shape shape, int64_t n,
                                   FM_NAME(fm_blocks) * blocks) {
  for (int k = 0; k < FM_VALUES; k++) {
    places->in[k] = places->out[k] = blocks->value[k];
    if (k < FM_MAX_OPERANDS && row->operand[k].data == NULL) {
      places->out[k] = blocks->sink;
      for (int64_t i = 0; (shape.reads & FM_BIT(k)) && i < n; i++) {
        blocks->value[k][i] = (FM_REAL)fm_default(k);
      }
    }
  }
}

FM_INLINE void FM_NAME(open_places)(FM_NAME(fm_places) * places, const fm_row *row, fm_shape shape, int64_t at,
                                    int64_t n, FM_NAME(fm_blocks) * blocks, bool streaming) {
#define FM_OPEN(k)                                                                                                     \
  if ((shape.reads & FM_BIT(k)) && row->operand[k].data != NULL) {                                                     \
    places->in[k] = FM_NAME(load)(&row->operand[k], at, n, blocks->value[k], blocks->scratch);                         \
  }                                                                                                                    \
  if ((shape.writes & FM_BIT(k)) && row->operand[k].data != NULL) {                                                    \
    places->out[k] = FM_NAME(target)(&row->operand[k], at, blocks->value[k], streaming && !(shape.reads & FM_BIT(k))); \
  }
  FM_EACH_OPERAND(FM_OPEN)
#undef FM_OPEN
}

FM_INLINE void FM_NAME(close_places)(const FM_NAME(fm_places) * places, const fm_row *row, fm_shape shape, int64_t at,
                                     int64_t n, FM_NAME(fm_blocks) * blocks, const uint32_t *random, bool streaming) {
#define FM_CLOSE(k)                                                                                           \
  if ((shape.writes & FM_BIT(k)) && row->operand[k].data != NULL) {                                           \
    FM_NAME(store)(&row->operand[k], at, n, places->out[k], blocks->scratch, (k) == FM_PARAM ? random : NULL, \
                   streaming && !(shape.reads & FM_BIT(k)));                                                  \
  }
  FM_EACH_OPERAND(FM_CLOSE)
#undef FM_CLOSE
}

/* Whether an update reads and writes memory alone, all of it as the arithmetic takes it. */
FM_INLINE bool FM_NAME(is_plain)(const fm_row *row, fm_shape shape) {
  bool plain = shape.tally < 0 && !(shape.reads & FM_BIT(FM_DRAW));
  for (int k = 0; k < FM_MAX_OPERANDS; k++) {
    plain = plain && (row->operand[k].data == NULL || FM_NAME(is_native)(&row->operand[k]));
  }
  return plain;
}

/* A whole block of a plain update: straight text for one length, much faster in cache. So few instructions go by a
 * line of memory that the processor has the next lines under way, and asking for them ahead only costs time
 * (docs/performance.md). */
FM_INLINE void FM_NAME(update_plain_block)(fm_update update, int form, FM_NAME(fm_places) * places, const fm_row *row,
                                           fm_shape shape, int64_t at, FM_NAME(fm_blocks) * blocks,
                                           const FM_NAME(fm_rule) * rule, bool moves, bool streaming) {
  const int64_t offset = at * (int64_t)sizeof(FM_REAL);
  const size_t bytes = FM_BLOCK * sizeof(FM_REAL);
  if (shape.copy != FM_COPY_NOTHING) {
    put_bytes(copy_target(row, shape)->data + offset, copy_source(row, shape)->data + offset, bytes, streaming);
  }
  if (!moves || (shape.reads | shape.writes) == 0) {
    return;
  }
#define FM_PLACE(k)                                                                      \
  if (((shape.reads | shape.writes) & FM_BIT(k)) && row->operand[k].data != NULL) {      \
    FM_REAL *const place = (FM_REAL *)(void *)(row->operand[k].data + offset);           \
    places->in[k] = place;                                                               \
    places->out[k] = streaming && !(shape.reads & FM_BIT(k)) ? blocks->value[k] : place; \
  }
#define FM_STREAM(k)                                                                            \
  if ((shape.writes & ~shape.reads & FM_BIT(k)) && row->operand[k].data != NULL && streaming) { \
    put_bytes(row->operand[k].data + offset, (const char *)blocks->value[k], bytes, true);      \
  }
  FM_EACH_OPERAND(FM_PLACE)
  FM_NAME(apply_block)(update, form, places->in, places->out, FM_BLOCK, rule);
  FM_EACH_OPERAND(FM_STREAM)
#undef FM_PLACE
#undef FM_STREAM
}

/* One update over a share of one tensor, for one form of it. */
FM_INLINE void FM_NAME(update_row)(const fm_job *job, int64_t r, int64_t begin, int64_t end, fm_update update,
                                   int form) {
  const fm_row *row = &job->list->rows[r];
  fm_options own;
  const fm_options *o = options_of(job, r, &own);
  const fm_shape shape = fm_shape_of_form(update, form);
  const bool moves = update != FM_ASCEND || FM_NAME(fm_ascend_moves)(o);
  const bool random = update == FM_ASCEND && o->random && fm_dtype_size(row->operand[FM_PARAM].dtype) == 2;
  const bool tallies = shape.tally >= 0 && job->list->partials != NULL;
  const bool plain = FM_NAME(is_plain)(row, shape);
  const int law = fm_law_of(update, o);
  FM_NAME(fm_rule) given;
  memset(&given, 0, sizeof given);
  FM_NAME(fm_set_rule)(&given, update, o, &row->traits);
  __asm__("" : "+m"(given));           /* gcc would see what its flags are made of, and have bools again */
  const FM_NAME(fm_rule) rule = given; /* which no store can reach, so that it stays in registers */
  FM_NAME(fm_blocks) blocks;
  FM_NAME(fm_places) places;
  fm_stream stream;
  uint32_t words[FM_BLOCK];
  if (random || (shape.reads & FM_BIT(FM_DRAW))) {
    open_stream(&stream, o, o == &own ? own.tensor : (uint32_t)r);
  }
  FM_NAME(set_places)(&places, row, shape, min64(FM_BLOCK, end - begin), &blocks);
  for (int64_t chunk = begin; chunk < end; chunk += FM_CHUNK) {
    const int64_t chunk_end = min64(chunk + FM_CHUNK, end);
    const int used = lanes_of(chunk_end - chunk);
    fm_lanes lanes;
    FM_NAME(fm_exact) exact;
    if (tallies) {
      clear(exact.first, (size_t)used * sizeof *exact.first);
      clear(exact.second, (size_t)used * sizeof *exact.second);
      clear_lanes(&lanes, used, fm_has_parts(shape.tally, FM_NATIVE == FM_F64));
    }
    for (int64_t at = chunk; at < chunk_end; at += FM_BLOCK) {
      const int64_t n = min64(FM_BLOCK, chunk_end - at);
      if (plain && n == FM_BLOCK) {
        FM_NAME(update_plain_block)(update, form, &places, row, shape, at, &blocks, &rule, moves, job->streaming);
        continue;
      }
      if (shape.copy != FM_COPY_NOTHING) {
        const char *bytes = raw_block(copy_source(row, shape), at, n, (char *)blocks.scratch);
        put_raw(copy_target(row, shape), at, n, bytes, job->streaming);
      }
      if (!moves || (shape.reads | shape.writes) == 0) {
        continue;
      }
      FM_NAME(open_places)(&places, row, shape, at, n, &blocks, job->streaming);
      if (shape.reads & FM_BIT(FM_DRAW)) {
        if (FM_NATIVE == FM_F32) {
          draw_block(&stream, law, at, (float *)(void *)blocks.value[FM_DRAW]);
        } else {
          float draws[FM_BLOCK];
          draw_block(&stream, law, at, draws);
          for (int i = 0; i < FM_BLOCK; i++) {
            blocks.value[FM_DRAW][i] = (FM_REAL)draws[i];
          }
        }
      }
      FM_NAME(apply_block)(update, form, places.in, places.out, n, &rule);
      if (tallies) {
        FM_NAME(add_tally)(&lanes, &exact, (at - chunk) % FM_LANES, places.out, n, shape.tally);
      }
      if (random) {
        random_block(&stream, at, words);
      }
      FM_NAME(close_places)(&places, row, shape, at, n, &blocks, random ? words : NULL, job->streaming);
    }
    if (tallies) {
      FM_NAME(take_exact)(&lanes, &exact, used, shape.tally);
      job->list->partials[job->list->first_chunk[r] + chunk / FM_CHUNK] =
          fold_lanes(&lanes, used, shape.tally, FM_NATIVE == FM_F64);
    }
  }
}

/* Each form is a constant in its call, hence a loop of its own without branches. */
#define FM_FORM_CASE(update, form)                             \
  case form:                                                   \
    if ((form) < fm_form_count(update)) {                      \
      FM_NAME(update_row)(job, row, begin, end, update, form); \
    }                                                          \
    break;
#define FM_UPDATE_ROW(update, name, ...)                                                                      \
  static FM_OUTLINE void FM_NAME(update_##name)(const fm_job *job, int64_t row, int64_t begin, int64_t end) { \
    const fm_row *const its = &job->list->rows[row];                                                          \
    switch (fm_form(update, job->options, &its->traits, fm_present(its))) {                                   \
      FM_FORM_CASE(update, 0)                                                                                 \
      FM_FORM_CASE(update, 1)                                                                                 \
      FM_FORM_CASE(update, 2)                                                                                 \
      FM_FORM_CASE(update, 3)                                                                                 \
      FM_FORM_CASE(update, 4)                                                                                 \
      FM_FORM_CASE(update, 5)                                                                                 \
      FM_FORM_CASE(update, 6)                                                                                 \
      FM_FORM_CASE(update, 7)                                                                                 \
      default: break;                                                                                         \
    }                                                                                                         \
  }
FM_UPDATES(FM_UPDATE_ROW)
#undef FM_FORM_CASE
#undef FM_UPDATE_ROW
