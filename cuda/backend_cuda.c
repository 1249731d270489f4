/* The CUDA backend: the operators on the current stream of the tensors' device. Nothing here waits for the device. */
#include "backend.h"
#include "fm_cuda.h"

static const char *launch(fm_operator op, fm_update update, const fm_list *list, const fm_options *options,
                          const fm_scalars *scalars, double *result, void *stream) {
  switch (op) {
    case FM_OP_NORM: return fm_cuda_norm(list, options, result, stream);
    case FM_OP_TIES: return fm_cuda_ties(list, options, scalars, result, stream);
    case FM_OP_DOT: return fm_cuda_dot(list, options, result, stream);
    case FM_OP_PACGEN: return fm_cuda_pacgen(list, options, scalars, result, stream);
    case FM_OP_ROW_NORMS: return fm_cuda_row_norms(list, options, result, stream);
    default: return fm_cuda_update(update, list, options, scalars, result, stream);
  }
}

/* The same for label noise, on the device of the arguments. */
typedef const char *fm_sample_launch(const void *job, void *stream);

static const char *launch_labels(const void *job, void *stream) { return fm_cuda_corrupt_labels(job, stream); }

static const char *launch_draws(const void *job, void *stream) { return fm_cuda_draw_samples(job, stream); }

#ifdef FM_EMULATE

/* Under the emulator tensors lie on the CPU and there is no stream. The operators get a namespace of their own beside
 * the C kernels', so that one process can hold both results against each other. */
static bool run(fm_args *args, fm_operator op, fm_update update, const fm_list *list, const fm_options *options,
                const fm_scalars *scalars, double *result) {
  const char *error = launch(op, update, list, options, scalars, result, NULL);
  return error == NULL || fm_fail(args, "CUDA emulator: %s", error);
}

static bool run_samples(fm_args *args, fm_sample_launch *launch_fn, const void *job) {
  const char *error = launch_fn(job, NULL);
  return error == NULL || fm_fail(args, "CUDA emulator: %s", error);
}

#define FM_DEVICE_KEYS {"CPU", "SparseCPU", "SparseCsrCPU"}
#define FM_DEVICE_TYPE aoti_torch_device_type_cpu

#else

/* The current stream of the arguments' device, which is selected until the guard is deleted. */
static bool select_device(fm_args *args, CUDAGuardHandle *guard, void **stream) {
  if (aoti_torch_create_cuda_guard(args->device_index, guard)) {
    return fm_fail(args, "flatmin: CUDA device %d could not be selected", (int)args->device_index);
  }
  if (aoti_torch_get_current_cuda_stream(args->device_index, stream)) {
    aoti_torch_delete_cuda_guard(*guard);
    return fm_fail(args, "flatmin: torch gave no current stream");
  }
  return true;
}

static bool leave_device(fm_args *args, CUDAGuardHandle guard, const char *error) {
  aoti_torch_delete_cuda_guard(guard);
  return error == NULL || fm_fail(args, "flatmin: CUDA launch failed: %s", error);
}

static bool run(fm_args *args, fm_operator op, fm_update update, const fm_list *list, const fm_options *options,
                const fm_scalars *scalars, double *result) {
  CUDAGuardHandle guard = NULL;
  void *stream = NULL;
  return select_device(args, &guard, &stream) &&
         leave_device(args, guard, launch(op, update, list, options, scalars, result, stream));
}

static bool run_samples(fm_args *args, fm_sample_launch *launch_fn, const void *job) {
  CUDAGuardHandle guard = NULL;
  void *stream = NULL;
  return select_device(args, &guard, &stream) && leave_device(args, guard, launch_fn(job, stream));
}

#define FM_DEVICE_KEYS {"CUDA", "SparseCUDA", "SparseCsrCUDA"}
#define FM_DEVICE_TYPE aoti_torch_device_type_cuda

static void boxed_cuda_ready(StableIValue *stack, uint64_t n_args, uint64_t n_outputs) {
  (void)n_args;
  (void)n_outputs;
  stack[0] = fm_cuda_ready();
}

/* The one operator that only this library has: whether the driver is as new as the CUDA runtime in it. */
__attribute__((constructor)) static void register_cuda_ready(void) {
  TorchLibraryHandle fragment = NULL, impl = NULL;
  if (!aoti_torch_library_init_fragment("flatmin", __FILE__, __LINE__, &fragment) &&
      !aoti_torch_library_def(fragment, "cuda_ready() -> bool") &&
      !aoti_torch_library_init_impl("flatmin", "CompositeExplicitAutograd", __FILE__, __LINE__, &impl)) {
    torch_library_impl(impl, "cuda_ready", boxed_cuda_ready, FM_TORCH_ABI_VERSION);
  }
}

#endif

static bool corrupt_labels(fm_args *args, const fm_label_job *job) { return run_samples(args, launch_labels, job); }

static bool draw_samples(fm_args *args, const fm_draw_job *job) { return run_samples(args, launch_draws, job); }

static int isa(void) { return 0; }

const fm_backend fm_this_backend = {
#ifdef FM_EMULATE
    .defines_operators = true,
#endif
    .dispatch_keys = FM_DEVICE_KEYS,
    .device_type = FM_DEVICE_TYPE,
    .partials = fm_cuda_partials,
    .isa = isa,
    .best_isa = isa,
    .run = run,
    .corrupt_labels = corrupt_labels,
    .draw_samples = draw_samples,
};
