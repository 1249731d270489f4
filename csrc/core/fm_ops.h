/* The core's interface: lists of tensors as plain views, operators as functions. Nothing here knows of torch.
 *
 * A list is cut into chunks of FM_CHUNK elements (a tensor's last chunk may be shorter, no chunk spans two tensors).
 * Chunks are the unit of parallel work and of reduction: each has one partial result, and the partial results are
 * summed by a fixed tree. So no result depends on the number of threads or on where one thread's share ends. */
#ifndef FM_OPS_H
#define FM_OPS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "updates.h"

enum {
  FM_CHUNK = 4096,   /* elements of one partial result */
  FM_LANES = 256,    /* running sums inside a chunk: element i adds to lane i % 256, then lanes fold in halves */
  FM_BLOCK = 128,    /* elements that pass through a kernel's buffers at a time: short, so that streams interleave */
  FM_GRAIN = 16,     /* chunks below which a list is not split over threads: waking them takes as long */
  FM_MAX_DIMS = 16,  /* dimensions that remain after merging adjacent ones */
  FM_ALIGNMENT = 64, /* of each tensor in a backup, in bytes */
};

typedef enum fm_dtype { FM_F32, FM_F64, FM_BF16, FM_F16 } fm_dtype;

static inline size_t fm_dtype_size(fm_dtype t) { return t == FM_F64 ? 8 : t == FM_F32 ? 4 : 2; }

/* Where element k of a tensor lies if not at k: sizes and strides (in elements) of the dimensions, outermost first. */
typedef struct fm_layout {
  int dims;
  int64_t size[FM_MAX_DIMS], stride[FM_MAX_DIMS];
} fm_layout;

typedef struct fm_view {
  char *data;              /* NULL: the operator has no such operand */
  const fm_layout *layout; /* NULL: element k is at k */
  fm_dtype dtype;
} fm_view;

/* One tensor's operands, by FM_PARAM and so on. */
typedef struct fm_row {
  fm_view operand[FM_MAX_OPERANDS];
  int64_t numel;
  fm_traits traits;
  bool fp64; /* float64 arithmetic: some operand is float64 */
} fm_row;

/* FM_BIT of each operand that there is. */
static inline unsigned fm_present(const fm_row *row) {
  unsigned present = 0;
  for (int k = 0; k < FM_MAX_OPERANDS; k++) {
    present |= row->operand[k].data != NULL ? FM_BIT(k) : 0;
  }
  return present;
}

/* parallel_for(begin, end, grain, fn, context) calls fn on disjoint ranges that cover [begin, end). */
typedef void (*fm_range_fn)(int64_t begin, int64_t end, void *context);
typedef void (*fm_parallel_for)(int64_t begin, int64_t end, int64_t grain, fm_range_fn fn, void *context);

typedef struct fm_list {
  fm_row *rows;
  int64_t count;
  int64_t *first_chunk; /* count + 1 entries: row r owns chunks [first_chunk[r], first_chunk[r + 1]) */
  fm_sum *partials;     /* one a chunk (dot: fm_dot_planes of them); NULL where nothing is summed */
} fm_list;

/* What one thread runs: a share of a list's chunks. */
typedef struct fm_job {
  const fm_list *list;
  const fm_options *options;
  const fm_scalars *scalars; /* of which a tensor may have its own; NULL: none has */
  bool streaming;            /* store past the caches: the list is larger than they are */
} fm_job;
typedef void fm_kernel(const fm_job *job, int64_t chunk_begin, int64_t chunk_end);

/* The reductions: name and FM_TERM_...; what is tallied beside an update has no loop of its own. */
#define FM_REDUCTIONS(X)          \
  X(FM_TERM_SQUARE, square)       \
  X(FM_TERM_MAGNITUDE, magnitude) \
  X(FM_TERM_POWER, power) X(FM_TERM_LARGEST, largest) X(FM_TERM_TIES, ties) X(FM_TERM_PACGEN, pacgen)
enum { FM_REDUCTION_COUNT = FM_TERM_PACGEN + 1 };

/* One table for each instruction set, all compiled from kernels.c. */
typedef struct fm_kernels {
  int isa; /* 1 baseline, 3 and 4 x86-64-v3 and -v4 */
  fm_kernel *update[FM_UPDATE_COUNT];
  fm_kernel *reduce[FM_REDUCTION_COUNT];
  fm_kernel *dot;
} fm_kernels;

/* The table in use: the best that the processor runs, or what the environment variable FM_ISA (base, v3, v4) names. */
extern const fm_kernels *fm_active_kernels;

/* The number of the best table that this processor runs; it runs those below too. */
int fm_best_isa(void);

static inline int64_t fm_chunks_of(int64_t numel) { return (numel + FM_CHUNK - 1) / FM_CHUNK; }

/* Fills list->first_chunk; the number of chunks is its last entry. */
static inline void fm_list_plan(fm_list *list) {
  int64_t chunks = 0;
  for (int64_t r = 0; r < list->count; r++) {
    list->first_chunk[r] = chunks;
    chunks += fm_chunks_of(list->rows[r].numel);
  }
  list->first_chunk[list->count] = chunks;
}

/* Whether a sum of magnitudes could overflow: only in float64. */
static inline bool fm_any_fp64(const fm_list *list) {
  for (int64_t r = 0; r < list->count; r++) {
    if (list->rows[r].fp64) {
      return true;
    }
  }
  return false;
}

/* The operators. Reductions, and updates that tally, need list->partials. */
double fm_norm(const fm_list *list, const fm_options *options, fm_parallel_for parallel_for);
double fm_ties(const fm_list *list, const fm_options *options, fm_parallel_for parallel_for);

/* The inner products of options->lists lists, which are the operands 0, 1 and so on: fm_dot_sums numbers, the upper
 * triangle of the Gram matrix row by row. A number is not finite if an element of its lists is not. */
void fm_dot(const fm_list *list, const fm_options *options, double *result, fm_parallel_for parallel_for);

/* Two numbers a row: PACGen's sum and how many elements are capped. */
void fm_pacgen(const fm_list *list, const fm_options *options, double *result, fm_parallel_for parallel_for);

/* The 2-norm of each row. */
void fm_row_norms(const fm_list *list, const fm_options *options, double *result, fm_parallel_for parallel_for);

/* Returns what the update tallies. `scalars`: where tensors have numbers of their own; NULL: nowhere. */
fm_sum fm_run_update(fm_update update, const fm_list *list, const fm_options *options, const fm_scalars *scalars,
                     fm_parallel_for parallel_for);

#endif
