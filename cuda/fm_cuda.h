/* The launcher's interface, in C. */
#ifndef FM_CUDA_H
#define FM_CUDA_H

#include "fm_ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Elements of list->partials that the reductions need for this many chunks: the folds write their results behind. */
int64_t fm_cuda_partials(int64_t chunks);

/* Launch an operator on `stream` of the current device; NULL, or what CUDA says went wrong. `result` is on the device.
 */
const char *fm_cuda_norm(const fm_list *list, const fm_options *options, double *result, void *stream);
const char *fm_cuda_ties(const fm_list *list, const fm_options *options, const fm_scalars *scalars, double *result,
                         void *stream);
const char *fm_cuda_sam_ascend(const fm_list *list, const fm_options *options, const fm_scalars *scalars, void *stream);
const char *fm_cuda_restore(const fm_list *list, const fm_options *options, const fm_scalars *scalars, void *stream);
const char *fm_cuda_restore_sgd(const fm_list *list, const fm_options *options, const fm_scalars *scalars,
                                void *stream);
const char *fm_cuda_restore_adam(const fm_list *list, const fm_options *options, const fm_scalars *scalars,
                                 void *stream);

/* Whether the driver is as new as the CUDA runtime in this library. */
bool fm_cuda_ready(void);

#ifdef __cplusplus
}
#endif

#endif
