/* The updates but the base steps, which base_steps.cu compiles beside this file. */
#include "updates.cuh"

#define FM_ELSEWHERE(update, ...) extern template void fm_launch_update<update>(const fm_cuda_launch &l, void *stream);
FM_BASE_STEPS(FM_ELSEWHERE)
#undef FM_ELSEWHERE

extern "C" const char *fm_cuda_update(fm_update update, const fm_list *list, const fm_options *options,
                                      const fm_scalars *scalars, double *result, void *stream) {
  switch (update) {
#define FM_LAUNCH_CASE(update, name, ...) \
  case update: launch_all(list, options, scalars, fm_launch_update<update>, stream); break;
    FM_UPDATES(FM_LAUNCH_CASE)
#undef FM_LAUNCH_CASE
    default: break;
  }
  const int tally = fm_shape_of(update).tally;
  if (tally >= 0 && result != NULL) {
    fm_fold_sums(list, tally, tally == FM_TERM_NOISE ? 3 : 1, result, stream);
  }
  return fm_launch_error();
}
