/* The updates of kernels_real.h. */

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
    open_stream(&stream, o, job->scalars != NULL ? fm_number_in_stream(job->scalars, r) : (uint32_t)r);
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
