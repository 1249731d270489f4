"""Every operator in plain torch.

Two uses: the oracle that the tests hold the C and CUDA kernels against, and the fallback at run time for what has no
kernel (complex parameters, MPS, XPU, CUDA without the CUDA library). Names and arguments are those of
``torch.ops.flatmin.*``; the public, documented operators with defaults are in :mod:`flatmin.ops`.

Notation: ``w`` weights, ``g`` gradients, ``T(w)`` the adaptive scaling, ``q`` the dual exponent of the radius' p-norm
(1/p + 1/q = 1). Sums are kept in float64 where the device has it.
"""

from ._curvature import PLAIN, PROBED, SQUARE, curvature_, pacgen
from ._labels import corrupt_labels, draw_samples
from ._linear import axpy_, blend_, dot
from ._memory import ALIGNMENT, backup_nbytes, backup_views
from ._noise import (
    CURVATURE,
    GIVEN,
    NEIGHBOURHOOD,
    NORMAL,
    RADEMACHER,
    TRUNCATED,
    UNIFORM,
    draws,
    noise_size,
    probe_,
    random_words,
    scaled_noise_,
)
from ._perturb import restore_, sam_ascend_, sam_norm_ascend_, save_
from ._reductions import ASAM, BIG_VISION, DAVDA54, NONE, filter_norm, norm, ties
from ._steps import restore_adam_, restore_adam_curvature_, restore_lion_, restore_sgd_, restore_sgd_curvature_

__all__ = [
    "ALIGNMENT",
    "ASAM",
    "BIG_VISION",
    "CURVATURE",
    "DAVDA54",
    "GIVEN",
    "NEIGHBOURHOOD",
    "NONE",
    "NORMAL",
    "PLAIN",
    "PROBED",
    "RADEMACHER",
    "SQUARE",
    "TRUNCATED",
    "UNIFORM",
    "axpy_",
    "backup_nbytes",
    "backup_views",
    "blend_",
    "corrupt_labels",
    "curvature_",
    "dot",
    "draw_samples",
    "draws",
    "filter_norm",
    "noise_size",
    "norm",
    "pacgen",
    "probe_",
    "random_words",
    "restore_",
    "restore_adam_",
    "restore_adam_curvature_",
    "restore_lion_",
    "restore_sgd_",
    "restore_sgd_curvature_",
    "sam_ascend_",
    "sam_norm_ascend_",
    "save_",
    "scaled_noise_",
    "ties",
]
