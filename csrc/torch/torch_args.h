/* Unboxing: what torch puts on the stack becomes plain views, or an error message that names the argument.
 *
 * The schema string is the only description of an operator's arguments: names and kinds are read from it. A boxed
 * kernel owns every handle that it is given, so all of them, and all memory taken on the way, belong to one fm_args and
 * are freed by fm_args_close, on success and on error alike. Nothing else in the library frees. */
#ifndef FM_TORCH_ARGS_H
#define FM_TORCH_ARGS_H

#include "fm_ops.h"
#include "torch_abi.h"

enum { FM_MAX_ARGS = 24, FM_NAME_LENGTH = 32, FM_LABEL_LENGTH = FM_NAME_LENGTH + 24, FM_ERROR_LENGTH = 384 };

/* A value on torch's stack, by what the schema says is in it. */
typedef union fm_stack_value {
  StableIValue value;
  AtenTensorHandle tensor;
  StableListHandle list;
  double number;
  int64_t integer;
} fm_stack_value;

/* A tensor as torch describes it; data, sizes and strides are borrowed from what its argument holds. */
typedef struct fm_tensor {
  char *data;
  const int64_t *size, *stride;
  int64_t dims, numel;
  int32_t dtype, device_type, device_index, layout;
} fm_tensor;

/* One argument. A single tensor is a list of one. */
typedef struct fm_arg {
  char name[FM_NAME_LENGTH];
  bool is_list;
  StableListHandle list;
  AtenTensorHandle tensor;
  AtenTensorHandle *handles; /* of a list: perhaps all that keeps a tensor alive, as torch.jit hands over temporaries */
  fm_tensor *tensors;
  int64_t count;
  double number;   /* float */
  int64_t integer; /* int, bool */
} fm_arg;

typedef struct fm_args {
  int32_t device_type;  /* where every tensor must be */
  int32_t device_index; /* of the first */
  int count;
  fm_arg arg[FM_MAX_ARGS];
  AtenTensorHandle scratch; /* working memory on the device, or NULL */
  struct fm_memory *memory;
  char error[FM_ERROR_LENGTH]; /* empty: none so far */
} fm_args;

void fm_args_open(fm_args *args, int32_t device_type, const char *schema, const StableIValue *stack);
void fm_args_close(fm_args *args);

/* Memory that lives until fm_args_close; NULL (and an error) if there is none. */
void *fm_args_alloc(fm_args *args, size_t bytes);

/* Keeps the first message. Returns false, so that a check can `return fm_fail(...)`. */
bool fm_fail(fm_args *args, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* An argument in a message: its name, with the index if it is a list. `text` may hold the answer. */
const char *fm_label(const fm_arg *arg, int64_t i, char text[FM_LABEL_LENGTH]);

/* Whether a tensor is dense, on the operator's device, and has the memory of its elements. */
bool fm_check_place(fm_args *args, const fm_arg *arg, int64_t i);

/* Whether its memory begins where elements of so many bytes may: a compiler counts on it. */
bool fm_check_aligned(fm_args *args, const fm_arg *arg, int64_t i, size_t bytes);

/* Whether its elements lie one after another. */
bool fm_is_contiguous(const fm_tensor *t);

/* How the operator uses a list. A norm multiplies in double and reads any floating type beside any other. */
typedef enum fm_use { FM_READ, FM_READ_ANY_TYPE, FM_WRITE } fm_use;

/* A list that is an operand of the rows. What is written must not share memory. */
typedef struct fm_operand {
  int arg, operand;
  fm_use use;
} fm_operand;

/* Makes the rows of `list` from the tensors of the first of `count` lists, which sets the order of elements: ascending
 * in memory. The others are as many, of the same sizes, of the same type or float32. */
bool fm_take_rows(fm_args *args, const fm_operand *operands, int count, fm_list *list);

/* Makes one row of each index of the first dimension, or of each tensor if `whole` or of fewer dimensions than two. */
bool fm_take_filters(fm_args *args, int arg, int operand, bool whole, fm_list *list);

/* Room on the device for the partial results of a reduction: `planes` times `partials` of the number of chunks. */
bool fm_take_partials(fm_args *args, int64_t (*partials)(int64_t chunks), int planes, fm_list *list);

/* Adds the slices of a backup (one uint8 tensor) to the rows. */
bool fm_take_backup(fm_args *args, int arg, fm_list *list);

/* Fails if two of the written tensors share memory, the backup among them unless `backup` is negative. */
bool fm_check_disjoint(fm_args *args, const fm_operand *operands, int count, int backup, const fm_list *list);

/* The address of a float64 tensor of `count` elements. On a GPU only kernels may read there. */
bool fm_take_scalars(fm_args *args, int arg, int64_t count, const double **value);

/* The two words of a uint64 key; NULL for an empty one, which the second form refuses. */
bool fm_take_key(fm_args *args, int arg, const uint64_t **key);
bool fm_take_full_key(fm_args *args, int arg, const uint64_t **key);

/* A key for all tensors or, for each of `count`, its key and the number of the tensor in it. */
bool fm_take_keys(fm_args *args, int arg, int64_t count, const uint64_t **key, bool *each);

#endif
