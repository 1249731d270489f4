"""The operators, typed and documented: what :class:`flatmin.SAM` is made of, and what a loop of your own can call.

Each function takes whole lists (one call per step, not one per tensor) on one device, runs without host
synchronisation and without a temporary of a parameter's size, and is traced by ``torch.compile(fullgraph=True)``.
CPU tensors go to the C kernels, CUDA tensors to the CUDA kernels where they are built in; complex tensors and other
devices run in plain torch (:mod:`flatmin.reference`), slower and with one warning.

Types: parameters float32, float64, bfloat16 or float16, mixed freely; gradients of the parameter's type or float32,
optimizer state of the parameter's type or float32. Arithmetic is float32 (float64 for float64), sums are float64.
Any strides, though what is written must not overlap; a gradient whose strides differ from its parameter's takes a
slower path to the same result. Bad input raises ``RuntimeError`` (``ValueError`` for options) that names the argument,
before anything is written. Version counters of what an operator writes go up as it runs.

A minimal step::

    backup = ops.backup_like(params)
    norm = ops.sam_norm_ascend_(params, grads, backup, rho=0.05)
    ...                                   # second forward and backward at w + e
    ops.restore_(params, backup)          # or restore_sgd_, restore_adam_: restore and step in one pass
"""

from ._codes import dual_exponent, scaling_code
from ._curvature import curvature_, pacgen
from ._labels import corrupt_labels, draw_samples
from ._linear import axpy_, blend_, dot, gram
from ._noise import probe_, random_key, scaled_noise_
from ._perturb import backup_like, restore_, sam_ascend_, sam_norm_ascend_, save_
from ._reduce import filter_norm, norm, ties
from ._steps import (
    Averages,
    restore_adam_,
    restore_adam_curvature_,
    restore_lion_,
    restore_sgd_,
    restore_sgd_curvature_,
)

__all__ = [
    "Averages",
    "axpy_",
    "backup_like",
    "blend_",
    "corrupt_labels",
    "curvature_",
    "dot",
    "draw_samples",
    "dual_exponent",
    "filter_norm",
    "gram",
    "norm",
    "pacgen",
    "probe_",
    "random_key",
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
    "scaling_code",
    "ties",
]
