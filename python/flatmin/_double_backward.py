"""What to do where a model cannot be differentiated twice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["explained_double_backward"]

#: What torch says where an operator cannot be differentiated twice: attention kernels, cuDNN's RNNs, functions marked
#: once_differentiable, compiled graphs.
_NO_DOUBLE_BACKWARD = re.compile(r"derivative for .* is not implemented|differentiate twice|double.?backward", re.I)


@contextmanager
def explained_double_backward(advice: str) -> Iterator[None]:
    """``RuntimeError`` that says what happened, the ``advice`` and what torch says, in place of torch's own."""
    try:
        yield
    except RuntimeError as error:
        if not _NO_DOUBLE_BACKWARD.search(str(error)):
            raise
        raise RuntimeError(
            f"an operator of the model cannot be differentiated twice. {advice}, or for attention compute within "
            f"torch.nn.attention.sdpa_kernel(SDPBackend.MATH). torch says: {error}"
        ) from error
