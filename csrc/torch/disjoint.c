/* Whether tensors that an operator writes share memory. */
#include "torch_args.h"

#include <stdlib.h>

/* Where a tensor lies. */
typedef struct fm_extent {
  const char *begin, *end; /* first byte, one past the last */
  fm_view view;
  int arg;
  int64_t item, numel;
} fm_extent;

static fm_extent extent_of(const fm_view *v, int64_t numel, int arg, int64_t item) {
  int64_t last = numel - 1;
  if (v->layout != NULL) {
    last = 0;
    for (int d = 0; d < v->layout->dims; d++) {
      last += (v->layout->size[d] - 1) * v->layout->stride[d];
    }
  }
  const char *end = v->data + (last + 1) * (int64_t)fm_dtype_size(v->dtype);
  return (fm_extent){v->data, end, *v, arg, item, numel};
}

/* Shell's sort with Ciura's gaps. The lists of a step arrive in long ascending runs, on which it does little: for 426
 * tensors it takes 6 us where qsort takes 25. */
static void sort_extents(fm_extent *extents, int64_t n) {
  static const int64_t gaps[] = {1750, 701, 301, 132, 57, 23, 10, 4, 1};
  for (size_t g = 0; g < sizeof gaps / sizeof *gaps; g++) {
    for (int64_t i = gaps[g]; i < n; i++) {
      const fm_extent moving = extents[i];
      int64_t k = i;
      for (; k >= gaps[g] && extents[k - gaps[g]].begin > moving.begin; k -= gaps[g]) {
        extents[k] = extents[k - gaps[g]];
      }
      extents[k] = moving;
    }
  }
}

/* Marks every byte of a tensor in `map`, which starts at byte `base`; false if one is marked already. */
static bool mark_bytes(const fm_extent *extent, const char *base, unsigned char *map) {
  const fm_view *v = &extent->view;
  const int64_t size = (int64_t)fm_dtype_size(v->dtype);
  for (int64_t i = 0; i < extent->numel; i++) {
    int64_t offset = i, rest = i;
    if (v->layout != NULL) {
      offset = 0;
      for (int d = v->layout->dims - 1; d >= 0; d--) {
        offset += rest % v->layout->size[d] * v->layout->stride[d];
        rest /= v->layout->size[d];
      }
    }
    unsigned char *at = map + (v->data - base) + offset * size;
    if (memchr(at, 1, (size_t)size) != NULL) { /* also in the middle: a 16-bit element within one of 64 bits */
      return false;
    }
    memset(at, 1, (size_t)size);
  }
  return true;
}

static bool fail_shared(fm_args *args, const fm_extent *a, const fm_extent *b) {
  char first[FM_LABEL_LENGTH], second[FM_LABEL_LENGTH];
  return fm_fail(args, "%s and %s share memory; give each tensor once, with memory of its own",
                 fm_label(&args->arg[a->arg], a->item, first), fm_label(&args->arg[b->arg], b->item, second));
}

/* Extents that intersect: shared memory for sure if one begins within a dense one, or where another begins. Otherwise
 * views may interleave (x[::2] and x[1::2]) without a common element. Those are marked byte by byte: slow, but few have
 * such parameters. */
static bool check_group(fm_args *args, const fm_extent *extents, int64_t count) {
  const char *end = extents[0].end;
  for (int64_t i = 1; i < count; i++) {
    end = extents[i].end > end ? extents[i].end : end;
    const bool in_dense = extents[i - 1].view.layout == NULL && extents[i].begin < extents[i - 1].end;
    if (extents[i - 1].begin == extents[i].begin || in_dense) {
      return fail_shared(args, &extents[i - 1], &extents[i]);
    }
  }
  const size_t bytes = (size_t)(end - extents[0].begin);
  unsigned char *map = calloc(bytes, 1);
  if (map == NULL) {
    return fm_fail(args, "out of memory: %zu bytes to see whether strided views overlap", bytes);
  }
  int64_t second = 0, first = 0;
  while (second < count && mark_bytes(&extents[second], extents[0].begin, map)) {
    second++;
  }
  for (; second < count && first < second - 1; first++) { /* which of those before it */
    memset(map, 0, bytes);
    mark_bytes(&extents[first], extents[0].begin, map);
    if (!mark_bytes(&extents[second], extents[0].begin, map)) {
      break;
    }
  }
  free(map);
  return second == count || fail_shared(args, &extents[first], &extents[second]);
}

bool fm_check_disjoint(fm_args *args, const fm_operand *operands, int count, int backup, const fm_list *list) {
  fm_extent *extents = fm_args_alloc(args, (size_t)(list->count * count + 1) * sizeof *extents);
  if (extents == NULL) {
    return false;
  }
  int64_t n = 0;
  for (int k = 0; k < count; k++) {
    for (int64_t i = 0; operands[k].use == FM_WRITE && i < list->count; i++) {
      const fm_view *v = &list->rows[i].operand[operands[k].operand];
      if (list->rows[i].numel > 0 && v->data != NULL) {
        extents[n++] = extent_of(v, list->rows[i].numel, operands[k].arg, i);
      }
    }
  }
  if (backup >= 0 && args->arg[backup].tensors[0].numel > 0) { /* bytes, always an even number of them */
    const fm_tensor *t = &args->arg[backup].tensors[0];
    const fm_view whole = {t->data, NULL, FM_BF16};
    extents[n++] = extent_of(&whole, t->numel / 2, backup, 0);
  }
  sort_extents(extents, n);
  for (int64_t i = 0; i < n;) { /* groups whose extents touch one another */
    const char *end = extents[i].end;
    int64_t next = i + 1;
    for (; next < n && extents[next].begin < end; next++) {
      end = extents[next].end > end ? extents[next].end : end;
    }
    if (next - i > 1 && !check_group(args, extents + i, next - i)) {
      return false;
    }
    i = next;
  }
  return true;
}
