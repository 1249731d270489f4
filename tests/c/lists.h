/* Lists of random tensors, for the tests of the C kernels and of the emulated CUDA kernels. */
#ifndef FM_LISTS_H
#define FM_LISTS_H

#include "fm_ops.h"

/* In [-1, 1), a function of its arguments. */
double uniform(uint64_t index, uint32_t stream);

/* Element i of a dense view. */
void put(const fm_view *v, int64_t i, double x);
double get(const fm_view *v, int64_t i);

/* Rows of `operands` tensors; the operands whose bits `exact` has, and every second tensor of the others, have type
 * `dtype`, the rest float32. Memory ends with the last element. */
fm_list make_list_of(const int64_t *sizes, int64_t count, fm_dtype dtype, int operands, unsigned exact);

/* The same with sizes around what a kernel treats as a unit. */
fm_list make_list(fm_dtype dtype, int operands, unsigned exact);

void free_list(fm_list *list);

/* FNV-1a over every byte of every operand. */
uint64_t hash_list(const fm_list *list);

/* Every option has a value that shows. */
fm_options some_options(void);

#endif
