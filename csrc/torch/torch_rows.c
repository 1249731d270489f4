/* Lists of tensors to rows of a fm_list: the order of elements, which the first list sets, and the backup. */
#include <assert.h>
#include <inttypes.h>

#include "torch_args.h"

static bool float_dtype(int32_t torch_dtype, fm_dtype *dtype) {
  const int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_bfloat16(),
                           aoti_torch_dtype_float16()};
  for (int k = 0; k < 4; k++) {
    if (codes[k] == torch_dtype) {
      *dtype = (fm_dtype)k;
      return true;
    }
  }
  return false;
}

static bool take_view(fm_args *args, const fm_arg *arg, int64_t i, fm_view *view) {
  char text[FM_LABEL_LENGTH];
  const fm_tensor *t = &arg->tensors[i];
  if (!fm_check_place(args, arg, i)) {
    return false;
  }
  if (!float_dtype(t->dtype, &view->dtype)) {
    return fm_fail(args, "%s is neither float32, float64, bfloat16 nor float16; convert it (complex: view_as_real)",
                   fm_label(arg, i, text));
  }
  view->data = t->data;
  return fm_check_aligned(args, arg, i, fm_dtype_size(view->dtype));
}

/* ---- order of elements ---- */

/* The dimensions that matter, outermost first by the stride of the tensor that sets the order. */
typedef struct fm_order {
  int count;
  int dim[FM_MAX_DIMS];
} fm_order;

/* `t` is the tensor that the error names arg[i], or a part of it. */
static bool order_of(fm_args *args, const fm_arg *arg, const fm_tensor *t, fm_order *order, int64_t i) {
  char text[FM_LABEL_LENGTH];
  order->count = 0;
  for (int64_t d = 0; d < t->dims; d++) {
    if (t->size[d] == 1) {
      continue;
    }
    if (order->count == FM_MAX_DIMS) {
      return fm_fail(args, "%s has more than %d dimensions; reshape it", fm_label(arg, i, text), FM_MAX_DIMS);
    }
    int k = order->count++;
    for (; k > 0 && t->stride[order->dim[k - 1]] < t->stride[d]; k--) {
      order->dim[k] = order->dim[k - 1];
    }
    order->dim[k] = (int)d;
  }
  return true;
}

/* Fails if two indices meet in one address: each stride must step over all that the smaller ones reach. */
static bool check_no_overlap(fm_args *args, const fm_arg *arg, int64_t i) {
  char text[FM_LABEL_LENGTH];
  const fm_tensor *t = &arg->tensors[i];
  fm_order order;
  if (!order_of(args, arg, &arg->tensors[i], &order, i)) {
    return false;
  }
  int64_t reach = 0;
  for (int k = order.count - 1; k >= 0 && t->numel > 0; k--) {
    const int d = order.dim[k];
    if (t->stride[d] <= reach) {
      return fm_fail(args, "%s overlaps itself in memory (expanded?); give it memory of its own (t.clone())",
                     fm_label(arg, i, text));
    }
    reach += (t->size[d] - 1) * t->stride[d];
  }
  return true;
}

/* Sets view->layout: NULL if the elements, in the given order, lie one after another. */
static bool lay_out(fm_args *args, const fm_tensor *t, const fm_order *order, fm_view *view) {
  fm_layout layout;
  layout.dims = 0;
  for (int k = 0; k < order->count && t->numel > 0; k++) { /* strides of no elements can be anything */
    const int64_t size = t->size[order->dim[k]], stride = t->stride[order->dim[k]];
    const int last = layout.dims - 1;
    if (last >= 0 && layout.stride[last] == size * stride) { /* walks on where the outer dimension steps */
      layout.size[last] *= size;
      layout.stride[last] = stride;
    } else {
      layout.size[layout.dims] = size;
      layout.stride[layout.dims++] = stride;
    }
  }
  if (layout.dims == 0 || (layout.dims == 1 && layout.stride[0] == 1)) {
    view->layout = NULL;
    return true;
  }
  fm_layout *kept = fm_args_alloc(args, sizeof *kept);
  if (kept == NULL) {
    return false;
  }
  *kept = layout;
  view->layout = kept;
  return true;
}

/* ---- lists to rows ---- */

static bool alloc_rows(fm_args *args, int64_t count, fm_list *list) {
  assert(count >= 0);
  if (count > PTRDIFF_MAX / (int64_t)sizeof *list->rows) {
    return fm_fail(args, "out of memory: working space for %" PRId64 " rows asked for", count);
  }
  list->count = count;
  list->rows = fm_args_alloc(args, (size_t)count * sizeof *list->rows);
  list->first_chunk = fm_args_alloc(args, ((size_t)count + 1) * sizeof *list->first_chunk);
  if (list->rows == NULL || list->first_chunk == NULL) {
    return false;
  }
  memset(list->rows, 0, (size_t)count * sizeof *list->rows);
  return true;
}

/* The first list: its tensors set sizes, types and order. */
static bool take_lead(fm_args *args, const fm_operand *lead, fm_list *list) {
  const fm_arg *arg = &args->arg[lead->arg];
  if (!alloc_rows(args, arg->count, list)) {
    return false;
  }
  for (int64_t i = 0; i < arg->count; i++) {
    fm_view *view = &list->rows[i].operand[lead->operand];
    fm_order order;
    if (!take_view(args, arg, i, view) || (lead->use == FM_WRITE && !check_no_overlap(args, arg, i)) ||
        !order_of(args, arg, &arg->tensors[i], &order, i) || !lay_out(args, &arg->tensors[i], &order, view)) {
      return false;
    }
    list->rows[i].numel = arg->tensors[i].numel;
    list->rows[i].fp64 = view->dtype == FM_F64;
  }
  fm_list_plan(list);
  return true;
}

static bool same_sizes(const fm_tensor *a, const fm_tensor *b) {
  return a->dims == b->dims && memcmp(a->size, b->size, (size_t)a->dims * sizeof *a->size) == 0;
}

static bool take_operand(fm_args *args, const fm_operand *first, const fm_operand *operand, fm_list *list) {
  const fm_arg *lead = &args->arg[first->arg], *arg = &args->arg[operand->arg];
  char text[FM_LABEL_LENGTH];
  if (arg->count != lead->count) {
    return fm_fail(args, "%s has %" PRId64 " tensors and %s has %" PRId64 "; give one for each", arg->name, arg->count,
                   lead->name, lead->count);
  }
  for (int64_t i = 0; i < arg->count; i++) {
    fm_view *view = &list->rows[i].operand[operand->operand];
    if (!take_view(args, arg, i, view)) {
      return false;
    }
    if (!same_sizes(&lead->tensors[i], &arg->tensors[i])) {
      return fm_fail(args, "%s has other sizes than %s[%" PRId64 "]; give tensors of the same sizes",
                     fm_label(arg, i, text), lead->name, i);
    }
    fm_dtype own = FM_F32;
    float_dtype(lead->tensors[i].dtype, &own);
    if (view->dtype != own && view->dtype != FM_F32 && operand->use != FM_READ_ANY_TYPE) {
      return fm_fail(args, "%s has neither the type of %s[%" PRId64 "] nor float32; convert it", fm_label(arg, i, text),
                     lead->name, i);
    }
    fm_order order;
    if ((operand->use == FM_WRITE && !check_no_overlap(args, arg, i)) ||
        !order_of(args, lead, &lead->tensors[i], &order, i) || !lay_out(args, &arg->tensors[i], &order, view)) {
      return false;
    }
    list->rows[i].fp64 |= view->dtype == FM_F64;
  }
  return true;
}

bool fm_take_rows(fm_args *args, const fm_operand *operands, int count, fm_list *list) {
  if (!take_lead(args, &operands[0], list)) {
    return false;
  }
  for (int k = 1; k < count; k++) {
    if (!take_operand(args, &operands[0], &operands[k], list)) {
      return false;
    }
  }
  return true;
}

bool fm_take_filters(fm_args *args, int a, int operand, bool whole, fm_list *list) {
  const fm_arg *arg = &args->arg[a];
  int64_t count = 0, r = 0;
  for (int64_t i = 0; i < arg->count; i++) {
    const bool one = whole || arg->tensors[i].dims < 2 || arg->tensors[i].layout != aoti_torch_layout_strided();
    if (__builtin_add_overflow(count, one ? 1 : arg->tensors[i].size[0], &count)) {
      count = INT64_MAX; /* which alloc_rows refuses */
    }
  }
  if (!alloc_rows(args, count, list)) {
    return false;
  }
  for (int64_t i = 0; i < arg->count; i++) {
    fm_tensor filter = arg->tensors[i];
    const bool split = !whole && filter.dims >= 2;
    const int64_t filters = split ? filter.size[0] : 1, apart = split ? filter.stride[0] : 0;
    fm_view view = {NULL, NULL, FM_F32};
    fm_order order;
    if (!take_view(args, arg, i, &view)) {
      return false;
    }
    if (split) {
      filter.dims--;
      filter.size++;
      filter.stride++;
      filter.numel = filters > 0 ? filter.numel / filters : 0;
    }
    if (!order_of(args, arg, &filter, &order, i) || !lay_out(args, &filter, &order, &view)) {
      return false;
    }
    for (int64_t f = 0; f < filters; f++, r++) {
      list->rows[r].operand[operand] = view;
      if (filter.numel > 0) {
        list->rows[r].operand[operand].data += f * apart * (int64_t)fm_dtype_size(view.dtype);
      }
      list->rows[r].numel = filter.numel;
      list->rows[r].fp64 = view.dtype == FM_F64;
    }
  }
  fm_list_plan(list);
  return true;
}

bool fm_take_partials(fm_args *args, int64_t (*partials)(int64_t chunks), int planes, fm_list *list) {
  const int64_t doubles = 4 * planes * partials(list->first_chunk[list->count]), stride = 1;
  void *data = NULL;
  if (aoti_torch_empty_strided(1, &doubles, &stride, aoti_torch_dtype_float64(), args->device_type, args->device_index,
                               &args->scratch) ||
      torch_get_mutable_data_ptr(args->scratch, &data)) {
    return fm_fail(args, "out of memory: %lld bytes of working space asked for", (long long)doubles * 8);
  }
  list->partials = data;
  return true;
}

static int64_t bytes_in_backup(const fm_row *row) {
  const int64_t bytes = row->numel * (int64_t)fm_dtype_size(row->operand[FM_PARAM].dtype);
  return (bytes + FM_ALIGNMENT - 1) / FM_ALIGNMENT * FM_ALIGNMENT;
}

bool fm_take_backup(fm_args *args, int a, fm_list *list) {
  const fm_arg *arg = &args->arg[a];
  const fm_tensor *t = &arg->tensors[0];
  if (!fm_check_place(args, arg, 0)) {
    return false;
  }
  int64_t needed = 0;
  size_t widest = 1;
  for (int64_t i = 0; i < list->count; i++) {
    const size_t size = fm_dtype_size(list->rows[i].operand[FM_PARAM].dtype);
    widest = size > widest ? size : widest;
    if (__builtin_add_overflow(needed, bytes_in_backup(&list->rows[i]), &needed)) {
      needed = INT64_MAX; /* which no tensor has */
    }
  }
  if (t->dtype != aoti_torch_dtype_uint8() || t->dims != 1 || t->numel != needed || (needed > 1 && t->stride[0] != 1)) {
    return fm_fail(args,
                   "%s must be a contiguous uint8 tensor of %" PRId64 " elements for these %" PRId64
                   " parameters; allocate it with flatmin.ops.backup_like(params)",
                   arg->name, needed, list->count);
  }
  if (!fm_check_aligned(args, arg, 0, widest)) {
    return false;
  }
  char *data = t->data;
  for (int64_t i = 0; i < list->count; i++) {
    fm_row *row = &list->rows[i];
    row->operand[FM_OLD] = (fm_view){data, NULL, row->operand[FM_PARAM].dtype};
    if (row->numel > 0) { /* without any there is no backup to point into */
      data += bytes_in_backup(row);
    }
  }
  return true;
}
