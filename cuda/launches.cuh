/* How the host launches a kernel over a list of tensors. */
#ifndef FM_LAUNCHES_CUH
#define FM_LAUNCHES_CUH

#include "rows.cuh"

typedef void fm_launch_fn(const fm_cuda_launch &l, void *context);

static inline int64_t blocks_for(int64_t blocks) {
  const int64_t most = (int64_t)fm_processors() * FM_CUDA_BLOCKS_PER_SM;
  return blocks < most ? blocks : most;
}

/* A block takes as many neighbouring chunks as leave each processor FM_CUDA_WAVES blocks to even out their ends. */
static inline int64_t plain_blocks_for(int64_t blocks) {
  const int64_t most = (int64_t)fm_processors() * FM_CUDA_WAVES;
  const int64_t each = blocks / most < 1 ? 1 : blocks / most < FM_CUDA_RUN ? blocks / most : FM_CUDA_RUN;
  return (blocks + each - 1) / each;
}

static inline void flush(fm_cuda_launch *l, bool empty_too, fm_launch_fn *launch, void *context) {
  if (l->rows > 0 && (l->chunk_end > l->chunk_begin || empty_too)) {
    launch(*l, context);
  }
  l->rows = 0;
  l->strided = false;
  l->plain = true;
}

static inline bool is_strided(const fm_row *row) {
  for (int k = 0; k < FM_MAX_OPERANDS; k++) {
    if (row->operand[k].layout != NULL) {
      return true;
    }
  }
  return false;
}

static inline bool is_plain(const fm_row *row) {
  for (int k = 0; k < FM_MAX_OPERANDS; k++) {
    const fm_view *its = &row->operand[k];
    if (its->data != NULL && (its->dtype != FM_F32 || its->layout != NULL || (uintptr_t)its->data % 16 != 0)) {
      return false;
    }
  }
  return true;
}

static inline void add_row(fm_cuda_launch *l, const fm_list *list, int64_t r) {
  const fm_row *from = &list->rows[r];
  fm_cuda_row *row = &l->row[l->rows];
  for (int k = 0; k < FM_MAX_OPERANDS; k++) {
    row->data[k] = from->operand[k].data;
    row->dtype[k] = (uint8_t)from->operand[k].dtype;
  }
  row->numel = from->numel;
  row->first_chunk = list->first_chunk[r];
  row->traits = from->traits;
  row->index = (uint32_t)r;
  row->fp64 = from->fp64;
  l->plain = l->plain && is_plain(from);
  l->chunk_begin = l->rows == 0 ? row->first_chunk : l->chunk_begin;
  l->chunk_end = list->first_chunk[r + 1];
  l->rows++;
}

/* Dense rows go together, up to a full table; a row with a layout goes alone. `of_rows`: the kernel reads no element,
 * so layouts do not matter, and rows without elements count. */
static inline void launch_rows(const fm_list *list, const fm_options *options, const fm_scalars *scalars, bool of_rows,
                               fm_launch_fn *launch, void *context) {
  fm_cuda_launch l;
  l.options = *options;
  l.scalars = *scalars;
  l.partials = list->partials;
  l.rows = 0;
  l.strided = false;
  l.plain = true;
  for (int64_t r = 0; r < list->count; r++) {
    const bool strided = is_strided(&list->rows[r]) && !of_rows;
    if (strided || l.rows == FM_CUDA_ROWS) {
      flush(&l, of_rows, launch, context);
    }
    add_row(&l, list, r);
    if (strided) {
      for (int k = 0; k < FM_MAX_OPERANDS; k++) {
        const fm_layout dense = {0, {0}, {0}};
        l.alone.layout[k] = list->rows[r].operand[k].layout != NULL ? *list->rows[r].operand[k].layout : dense;
      }
      l.strided = true;
      flush(&l, of_rows, launch, context);
    }
  }
  flush(&l, of_rows, launch, context);
}

static inline void launch_all(const fm_list *list, const fm_options *options, const fm_scalars *scalars,
                              fm_launch_fn *launch, void *context) {
  launch_rows(list, options, scalars, false, launch, context);
}

/* Folds list->partials to `numbers` sums (reductions.cu). */
void fm_fold_sums(const fm_list *list, int term, int numbers, double *result, void *stream);

#endif
