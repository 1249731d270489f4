/* The operators of label_operators.c, for the table in operators.c. */
#ifndef FM_LABEL_OPERATORS_H
#define FM_LABEL_OPERATORS_H

#include "backend.h"

bool op_corrupt_labels(fm_args *args, StableIValue *stack);
bool op_draw_samples(fm_args *args, StableIValue *stack);

#endif
