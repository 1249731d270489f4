#include "torch_args.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- memory and errors ---- */

typedef struct fm_memory {
  struct fm_memory *next;
  max_align_t data[];
} fm_memory;

void *fm_args_alloc(fm_args *args, size_t bytes) {
  fm_memory *block = malloc(sizeof *block + bytes);
  if (block == NULL) {
    fm_fail(args, "out of memory: %zu bytes of working space asked for", bytes);
    return NULL;
  }
  block->next = args->memory;
  args->memory = block;
  return block->data;
}

bool fm_fail(fm_args *args, const char *format, ...) {
  if (args->error[0] == '\0') {
    va_list values;
    va_start(values, format);
    vsnprintf(args->error, sizeof args->error, format, values);
    va_end(values);
  }
  return false;
}

/* ---- from the stack ---- */

/* The product of the sizes, of which one may be 0 and the others anything. */
static int64_t count_elements(const int64_t *size, int64_t dims) {
  int64_t numel = 1;
  for (int64_t d = 0; d < dims; d++) {
    if (size[d] == 0) {
      return 0;
    }
  }
  for (int64_t d = 0; d < dims; d++) {
    numel *= size[d];
  }
  return numel;
}

/* A shim call on a live tensor does not fail; if one does, torch and this library disagree. */
static bool describe(fm_args *args, AtenTensorHandle handle, fm_tensor *t) {
  void *data = NULL;
  int64_t *size = NULL, *stride = NULL;
  AOTITorchError failed = aoti_torch_get_layout(handle, &t->layout);
  failed |= aoti_torch_get_dtype(handle, &t->dtype);
  failed |= aoti_torch_get_device_type(handle, &t->device_type);
  failed |= aoti_torch_get_device_index(handle, &t->device_index);
  t->device_index = t->device_index < 0 ? 0 : t->device_index; /* -1 for the CPU */
  if (!failed && t->layout == aoti_torch_layout_strided()) {   /* a sparse tensor has no strides and no data */
    failed |= aoti_torch_get_dim(handle, &t->dims);
    failed |= aoti_torch_get_sizes(handle, &size);
    failed |= aoti_torch_get_strides(handle, &stride);
    failed |= torch_get_mutable_data_ptr(handle, &data);
  }
  t->data = data;
  t->size = size;
  t->stride = stride;
  t->numel = size != NULL ? count_elements(size, t->dims) : 0;
  return !failed || fm_fail(args, "flatmin: torch's C interface refused a tensor; this torch is not supported");
}

static void open_list(fm_args *args, fm_arg *arg, StableIValue value) {
  size_t size = 0;
  arg->is_list = true;
  arg->list = (fm_stack_value){.value = value}.list;
  if (torch_list_size(arg->list, &size)) {
    fm_fail(args, "%s: torch's C interface refused the list", arg->name);
    return;
  }
  fm_tensor *tensors = fm_args_alloc(args, (size + 1) * sizeof *tensors);
  AtenTensorHandle *handles = (AtenTensorHandle *)fm_args_alloc(args, (size + 1) * sizeof(AtenTensorHandle));
  if (tensors == NULL || handles == NULL) {
    return;
  }
  arg->tensors = tensors;
  arg->handles = handles;
  for (size_t i = 0; i < size; i++) {
    StableIValue element = 0;
    if (torch_list_get_item(arg->list, i, &element)) {
      fm_fail(args, "%s[%zu]: torch's C interface refused the element", arg->name, i);
      return;
    }
    handles[i] = (fm_stack_value){.value = element}.tensor;
    arg->count++;
    memset(&tensors[i], 0, sizeof tensors[i]);
    describe(args, handles[i], &tensors[i]);
  }
}

static void open_tensor(fm_args *args, fm_arg *arg, StableIValue value) {
  arg->tensor = (fm_stack_value){.value = value}.tensor;
  arg->tensors = fm_args_alloc(args, sizeof *arg->tensors);
  if (arg->tensors != NULL) {
    memset(arg->tensors, 0, sizeof *arg->tensors);
    arg->count = 1;
    describe(args, arg->tensor, arg->tensors);
  }
}

/* Reads "name(type name, type name, ...)". */
void fm_args_open(fm_args *args, int32_t device_type, const char *schema, const StableIValue *stack) {
  memset(args, 0, sizeof *args);
  args->device_type = device_type;
  args->device_index = -1;
  const char *at = strchr(schema, '(') + 1;
  while (*at != ')') {
    fm_arg *arg = &args->arg[args->count];
    const char *name = at + strcspn(at, " ") + 1;
    const size_t length = strcspn(name, ",)");
    memcpy(arg->name, name, length);
    const StableIValue value = stack[args->count++];
    if (memchr(at, '[', (size_t)(name - at)) != NULL) {
      open_list(args, arg, value);
    } else if (*at == 'T') {
      open_tensor(args, arg, value);
    } else if (*at == 'f') {
      arg->number = (fm_stack_value){.value = value}.number;
    } else if (*at == 'b') {
      arg->integer = (value & 0xff) != 0; /* a bool fills one byte of its value */
    } else {
      arg->integer = (fm_stack_value){.value = value}.integer;
    }
    at = name + length;
    at += strspn(at, ", ");
  }
}

/* By now the kernel's streams have driven the handles out of the cache, and a count's atomic decrease waits for every
 * load before it: found one by one, 1,000 of them took 0.4 ms. Hence they are asked for in advance. */
static void close_list(const fm_arg *arg) {
  enum { HANDLES_AHEAD = 16 };
  for (int64_t i = 0; i < arg->count; i++) {
    const int64_t ahead = i + HANDLES_AHEAD < arg->count ? i + HANDLES_AHEAD : i;
    __builtin_prefetch((const void *)arg->handles[ahead]);
    aoti_torch_delete_tensor_object(arg->handles[i]);
  }
}

void fm_args_close(fm_args *args) {
  for (int a = 0; a < args->count; a++) {
    if (args->arg[a].list != NULL) {
      close_list(&args->arg[a]);
      torch_delete_list(args->arg[a].list);
    }
    if (args->arg[a].tensor != NULL) {
      aoti_torch_delete_tensor_object(args->arg[a].tensor);
    }
  }
  if (args->scratch != NULL) {
    aoti_torch_delete_tensor_object(args->scratch);
  }
  while (args->memory != NULL) {
    fm_memory *block = args->memory;
    args->memory = block->next;
    free(block);
  }
}

/* ---- checks of one tensor ---- */

/* "grads[3]" for an element of a list, "norm" for a tensor. */
const char *fm_label(const fm_arg *arg, int64_t i, char text[FM_LABEL_LENGTH]) {
  if (arg->is_list) {
    snprintf(text, FM_LABEL_LENGTH, "%s[%" PRId64 "]", arg->name, i);
  } else {
    snprintf(text, FM_LABEL_LENGTH, "%s", arg->name);
  }
  return text;
}

/* Twice what the 47 bits of an address space could hold, and few enough for sums and products with what comes here. */
enum { FM_MOST_ELEMENT_BITS = 48 };

bool fm_check_place(fm_args *args, const fm_arg *arg, int64_t i) {
  char text[FM_LABEL_LENGTH];
  const fm_tensor *t = &arg->tensors[i];
  if (t->layout != aoti_torch_layout_strided()) {
    return fm_fail(args, "%s is sparse; give a dense tensor (t.to_dense())", fm_label(arg, i, text));
  }
  if (args->device_index < 0) {
    args->device_index = t->device_index;
  }
  if (t->device_type != args->device_type || t->device_index != args->device_index) {
    return fm_fail(args, "%s is on another device than the others; call once for each device", fm_label(arg, i, text));
  }
  if (t->numel > 0 && t->data == NULL) {
    return fm_fail(args, "%s has no memory (a shard that was given back?); call while it has its elements",
                   fm_label(arg, i, text));
  }
  if (t->numel > INT64_C(1) << FM_MOST_ELEMENT_BITS) {
    return fm_fail(args, "%s has %" PRId64 " elements, more than there is memory (expanded?); give memory of its own",
                   fm_label(arg, i, text), t->numel);
  }
  return true;
}

bool fm_check_aligned(fm_args *args, const fm_arg *arg, int64_t i, size_t bytes) {
  char text[FM_LABEL_LENGTH];
  return (uintptr_t)arg->tensors[i].data % bytes == 0 ||
         fm_fail(args, "%s does not begin at a multiple of %zu bytes in memory; give a copy (t.clone())",
                 fm_label(arg, i, text), bytes);
}

bool fm_is_contiguous(const fm_tensor *t) {
  int64_t reach = 1;
  for (int64_t d = t->dims - 1; d >= 0 && t->numel > 0; d--) {
    if (t->size[d] != 1 && t->stride[d] != reach) {
      return false;
    }
    reach *= t->size[d];
  }
  return true;
}

/* ---- single tensors ---- */

bool fm_take_scalars(fm_args *args, int a, int64_t count, const double **value) {
  const fm_arg *arg = &args->arg[a];
  const fm_tensor *t = &arg->tensors[0];
  if (!fm_check_place(args, arg, 0)) {
    return false;
  }
  if (t->dtype != aoti_torch_dtype_float64() || t->numel != count || !fm_is_contiguous(t)) {
    return count == 1
               ? fm_fail(args, "%s must be a float64 tensor of one element", arg->name)
               : fm_fail(args, "%s must be a contiguous float64 tensor of %" PRId64 " elements", arg->name, count);
  }
  *value = (const double *)(const void *)t->data;
  return fm_check_aligned(args, arg, 0, sizeof **value);
}

bool fm_take_key(fm_args *args, int a, const uint64_t **key) {
  const fm_arg *arg = &args->arg[a];
  const fm_tensor *t = &arg->tensors[0];
  if (!fm_check_place(args, arg, 0)) {
    return false;
  }
  if (t->dtype != aoti_torch_dtype_uint64() || (t->numel != 0 && t->numel != 2) || t->dims != 1 ||
      (t->numel == 2 && t->stride[0] != 1)) {
    return fm_fail(args, "%s must be a contiguous uint64 tensor (seed, step), or empty to round to nearest", arg->name);
  }
  *key = t->numel == 2 ? (const uint64_t *)(const void *)t->data : NULL;
  return *key == NULL || fm_check_aligned(args, arg, 0, sizeof **key);
}

bool fm_take_full_key(fm_args *args, int a, const uint64_t **key) {
  return fm_take_key(args, a, key) &&
         (*key != NULL ||
          fm_fail(args, "%s is empty; give (seed, step), from flatmin.ops.random_key", args->arg[a].name));
}

bool fm_take_keys(fm_args *args, int a, int64_t count, const uint64_t **key, bool *each) {
  const fm_arg *arg = &args->arg[a];
  const fm_tensor *t = &arg->tensors[0];
  *each = t->dims == 2;
  if (!*each) {
    return fm_take_full_key(args, a, key);
  }
  if (!fm_check_place(args, arg, 0)) {
    return false;
  }
  if (t->dtype != aoti_torch_dtype_uint64() || t->size[0] != count || t->size[1] != 3 || !fm_is_contiguous(t)) {
    return fm_fail(args,
                   "%s must be a contiguous uint64 tensor (seed, step), or [%" PRId64
                   ", 3] with seed, step and the number of the tensor for each",
                   arg->name, count);
  }
  *key = (const uint64_t *)(const void *)t->data;
  return fm_check_aligned(args, arg, 0, sizeof **key);
}
