/* The operators of label noise: int64 labels instead of lists of floating tensors. */
#include "label_operators.h"

#include <inttypes.h>

/* ---- checks ---- */

static const fm_tensor *refuse(fm_args *args, const fm_arg *arg, const char *why) {
  fm_fail(args, "%s %s", arg->name, why);
  return NULL;
}

/* The one tensor of an argument: dense, on the operator's device, int64, its elements one after another. NULL if it is
 * not. */
static const fm_tensor *take_tensor(fm_args *args, int a) {
  const fm_arg *arg = &args->arg[a];
  const fm_tensor *t = &arg->tensors[0];
  if (!fm_check_place(args, arg, 0)) {
    return NULL;
  }
  if (t->dtype != aoti_torch_dtype_int64()) {
    return refuse(args, arg, "is not of type int64; convert it");
  }
  if (!fm_is_contiguous(t)) {
    return refuse(args, arg, "is not contiguous; give t.contiguous()");
  }
  return fm_check_aligned(args, arg, 0, sizeof(int64_t)) ? t : NULL;
}

static bool take_integer(fm_args *args, int a, int64_t least, int64_t most, int64_t *value) {
  *value = args->arg[a].integer;
  return (*value >= least && *value <= most) ||
         fm_fail(args, "%s: %" PRId64 " given, but it is from %" PRId64 " to %" PRId64, args->arg[a].name, *value,
                 least, most);
}

/* `count` elements, by an index that may be empty: positions count instead then. */
static bool take_samples(fm_args *args, int index, int key, int64_t numel, fm_samples *samples) {
  const fm_tensor *t = take_tensor(args, index);
  if (t == NULL || !fm_take_full_key(args, key, &samples->key)) {
    return false;
  }
  samples->numel = numel;
  samples->inner = 1;
  samples->index = NULL;
  if (t->numel > 0) {
    if (numel % t->numel != 0) {
      return fm_fail(args,
                     "index has %" PRId64 " elements, which %" PRId64
                     " elements cannot be shared among; give one for each sample",
                     t->numel, numel);
    }
    samples->inner = numel / t->numel;
    samples->index = (const int64_t *)(const void *)t->data;
  }
  if (samples->inner < 1) {
    samples->inner = 1; /* nothing to draw */
  }
  return true;
}

/* ---- operators ---- */

/* The table of a noise, or none where `bounds` is empty. */
static bool take_table(fm_args *args, int bounds, int targets, fm_label_noise *noise) {
  const fm_tensor *b = take_tensor(args, bounds), *t = take_tensor(args, targets);
  if (b == NULL || t == NULL) {
    return false;
  }
  if (b->numel != t->numel || b->numel % noise->classes != 0) {
    return fm_fail(args,
                   "bounds has %" PRId64 " elements and targets %" PRId64 "; give as many for each of the %" PRId64
                   " classes",
                   b->numel, t->numel, noise->classes);
  }
  noise->entries = b->numel / noise->classes;
  noise->bounds = (const int64_t *)(const void *)b->data;
  noise->targets = (const int64_t *)(const void *)t->data;
  return true;
}

/* `out` may be neither the labels nor the index: other threads read them while it is written. */
static bool take_out(fm_args *args, int out, const fm_tensor *labels, const fm_samples *samples, int64_t **to) {
  const fm_tensor *t = take_tensor(args, out);
  if (t == NULL) {
    return false;
  }
  if (t->dims != labels->dims || memcmp(t->size, labels->size, (size_t)t->dims * sizeof *t->size) != 0) {
    return fm_fail(args, "out has other sizes than labels; give torch.empty_like(labels)");
  }
  const size_t bytes = (size_t)t->numel * sizeof(int64_t);
  const uintptr_t begin = (uintptr_t)t->data, from = (uintptr_t)labels->data, index = (uintptr_t)samples->index;
  const size_t of_index = samples->index != NULL ? bytes / (size_t)samples->inner : 0;
  if ((begin < from + bytes && from < begin + bytes) || (begin < index + of_index && index < begin + bytes)) {
    return fm_fail(args, "out shares memory with labels or index; give it memory of its own");
  }
  *to = (int64_t *)(void *)t->data;
  return true;
}

bool op_corrupt_labels(fm_args *args, StableIValue *stack) {
  enum { LABELS, INDEX, BOUNDS, TARGETS, KEY, OUT, CLASSES, THRESHOLD, SPAN, OFFSET, IGNORE };
  (void)stack;
  fm_label_job job = {.noise.ignored = args->arg[IGNORE].integer};
  const fm_tensor *labels = take_tensor(args, LABELS);
  int64_t threshold = 0, span = 0, offset = 0;
  if (labels == NULL || !take_integer(args, CLASSES, 1, INT32_MAX, &job.noise.classes) ||
      !take_integer(args, THRESHOLD, 0, INT64_C(1) << 32, &threshold) ||
      !take_integer(args, SPAN, 1, job.noise.classes, &span) ||
      !take_integer(args, OFFSET, 0, job.noise.classes + 1 - span, &offset) ||
      !take_samples(args, INDEX, KEY, labels->numel, &job.samples) || !take_table(args, BOUNDS, TARGETS, &job.noise) ||
      !take_out(args, OUT, labels, &job.samples, &job.out)) {
    return false;
  }
  job.labels = (const int64_t *)(const void *)labels->data;
  job.noise.threshold = (uint64_t)threshold;
  job.noise.span = (uint32_t)span;
  job.noise.offset = (uint32_t)offset;
  fm_label_noise_plan(&job.noise);
  return fm_this_backend.corrupt_labels(args, &job);
}

bool op_draw_samples(fm_args *args, StableIValue *stack) {
  enum { INDEX, KEY, COUNT, INNER, LAW };
  fm_draw_job job = {.law = (int)args->arg[LAW].integer};
  int64_t sizes[2] = {0, 0};
  fm_stack_value result = {.tensor = NULL};
  void *data = NULL;
  if (job.law != FM_LAW_UNIFORM && job.law != FM_LAW_NORMAL && job.law != FM_LAW_RADEMACHER) {
    return fm_fail(args, "law: %" PRId64 " given, but it is 0 (uniform), 1 (normal) or 3 (rademacher)",
                   args->arg[LAW].integer);
  }
  if (!take_integer(args, COUNT, 0, INT64_C(1) << FM_SAMPLE_BITS, &sizes[0]) ||
      !take_integer(args, INNER, 0, INT32_MAX, &sizes[1])) {
    return false;
  }
  if (sizes[1] > 0 && sizes[0] > (INT64_C(1) << FM_SAMPLE_BITS) / sizes[1]) {
    return fm_fail(args, "count: %" PRId64 " samples of %" PRId64 " elements are more than there are numbers for",
                   sizes[0], sizes[1]);
  }
  if (!take_samples(args, INDEX, KEY, sizes[0] * sizes[1], &job.samples)) {
    return false;
  }
  const int64_t strides[2] = {sizes[1] > 1 ? sizes[1] : 1, 1};
  if (aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_float32(), args->device_type, args->device_index,
                               &result.tensor) ||
      torch_get_mutable_data_ptr(result.tensor, &data)) {
    return fm_fail(args, "flatmin: torch could not allocate a result");
  }
  job.out = data;
  if (!fm_this_backend.draw_samples(args, &job)) {
    aoti_torch_delete_tensor_object(result.tensor);
    return false;
  }
  stack[0] = result.value;
  return true;
}
