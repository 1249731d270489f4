/* Lists of random tensors and every kind of update, for the tests of the C kernels and of the emulated CUDA kernels. */
#ifndef FM_LISTS_H
#define FM_LISTS_H

#include "fm_ops.h"

/* In [-1, 1), a function of its arguments. */
double uniform(uint64_t index, uint32_t stream);

/* Element i of a view, dense or strided. */
void put(const fm_view *v, int64_t i, double x);
double get(const fm_view *v, int64_t i);

/* Rows with the tensors whose bits `operands` has (FM_BIT(FM_PARAM) and so on). Those whose bits `exact` has, and every
 * second tensor of the others, have type `dtype`, the rest float32. Memory ends with the last element. */
fm_list make_list_of(const int64_t *sizes, int64_t count, fm_dtype dtype, unsigned operands, unsigned exact);

/* The same with sizes around what a kernel treats as a unit. */
fm_list make_list(fm_dtype dtype, unsigned operands, unsigned exact);

fm_list copy_list(const fm_list *list);
void free_list(fm_list *list);

/* Lays the row's operands whose bits `strided` has out anew, with gaps of 0xa5 between their elements. */
void stride_row(fm_row *row, const fm_layout *layout, unsigned strided);

/* FNV-1a over every byte of every operand, gaps included; and over any bytes. */
uint64_t hash_list(const fm_list *list);
uint64_t hash_bytes(const void *bytes, size_t count, uint64_t hash);

/* Every option has a value that shows. */
fm_options some_options(void);

/* An update with the operands and options that lead it through one form of its loops. */
typedef struct update_case {
  const char *name;
  fm_update update;
  unsigned operands;
  fm_options options;
} update_case;
enum { MOST_CASES = 48 };

/* The form of a case for a row. */
int form_of(const update_case *c, const fm_row *row);

/* Together they reach every form of every update; test_updates.c makes sure of it. Returns their number. */
int update_cases(update_case cases[MOST_CASES]);

/* Has the parameter's type: the bytes that are copied to and from a backup. */
#define EXACT (FM_BIT(FM_PARAM) | FM_BIT(FM_OLD))

#endif
