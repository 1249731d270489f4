/* The launcher's interface, in C. */
#ifndef FM_CUDA_H
#define FM_CUDA_H

#include "fm_label_ops.h"
#include "fm_ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Dense tensors that one launch carries: the launches of every pass over a list follow from it. The tests and what the
 * documents promise read it here. */
enum { FM_CUDA_ROWS = 250 };

/* Elements of list->partials that the reductions need for this many chunks: the folds write their results behind. dot
 * needs as many for each plane (fm_dot_planes). */
int64_t fm_cuda_partials(int64_t chunks);

/* Launch an operator on `stream` of the current device; NULL, or what CUDA says went wrong. `scalars` and `result` are
 * on the device; see csrc/core/fm_ops.h for what is in `result`, and csrc/torch/backend.h for an update's. */
const char *fm_cuda_norm(const fm_list *list, const fm_options *options, double *result, void *stream);
const char *fm_cuda_ties(const fm_list *list, const fm_options *options, const fm_scalars *scalars, double *result,
                         void *stream);
const char *fm_cuda_dot(const fm_list *list, const fm_options *options, double *result, void *stream);
const char *fm_cuda_pacgen(const fm_list *list, const fm_options *options, const fm_scalars *scalars, double *result,
                           void *stream);
const char *fm_cuda_row_norms(const fm_list *list, const fm_options *options, double *result, void *stream);
const char *fm_cuda_update(fm_update update, const fm_list *list, const fm_options *options, const fm_scalars *scalars,
                           double *result, void *stream);

const char *fm_cuda_corrupt_labels(const fm_label_job *job, void *stream);
const char *fm_cuda_draw_samples(const fm_draw_job *job, void *stream);

/* Whether the driver is as new as the CUDA runtime in this library. */
bool fm_cuda_ready(void);

#ifdef __cplusplus
}
#endif

#endif
