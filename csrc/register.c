/* The CPU backend: the core's operators on torch's threads. */
#include "backend.h"

/* The core's parallel_for is torch's own, so thread counts and pools are those that the user set. */
static void torch_threads(int64_t begin, int64_t end, int64_t grain, fm_range_fn fn, void *context) {
  if (end > begin) {
    torch_parallel_for(begin, end, grain, fn, context);
  }
}

static bool run(fm_args *args, fm_operator op, const fm_list *list, const fm_options *options,
                const fm_scalars *scalars, double *result) {
  fm_options o = *options;
  fm_read_scalars(&o, scalars);
  if (op == FM_OP_ASCEND && o.rho < 0.0) {
    return fm_fail(args, "rho: %g given, but a radius must not be negative", o.rho);
  }
  switch (op) {
    case FM_OP_NORM: *result = fm_norm(list, &o, torch_threads); break;
    case FM_OP_TIES: *result = fm_ties(list, &o, torch_threads); break;
    case FM_OP_ASCEND: fm_sam_ascend(list, &o, torch_threads); break;
    case FM_OP_RESTORE: fm_restore(list, &o, torch_threads); break;
    case FM_OP_RESTORE_SGD: fm_restore_sgd(list, &o, torch_threads); break;
    case FM_OP_RESTORE_ADAM: fm_restore_adam(list, &o, torch_threads); break;
  }
  return true;
}

static int64_t partials(int64_t chunks) { return chunks; }

static int isa(void) { return fm_active_kernels->isa; }

const fm_backend fm_this_backend = {
    .dispatch_keys = {"CPU", "SparseCPU", "SparseCsrCPU"},
    .defines_operators = true,
    .device_type = aoti_torch_device_type_cpu,
    .partials = partials,
    .isa = isa,
    .run = run,
};
