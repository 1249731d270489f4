// Compiles only if csrc/torch/torch_abi.h declares every function exactly as torch's own header does: two extern "C"
// declarations of one name that differ are an error.
#include <torch/csrc/stable/c/shim.h>

extern "C" {
#include "torch_abi.h"
}

static_assert(FM_TORCH_ABI_VERSION == TORCH_VERSION_2_10_0, "the encoding that our kernels are registered for");
