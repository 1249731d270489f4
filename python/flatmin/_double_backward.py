"""What to do where a model cannot be differentiated twice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["explained_double_backward", "refuse_once_differentiable"]

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
        raise _not_twice(advice, f"torch says: {error}") from error


def refuse_once_differentiable(result: Tensor, advice: str) -> None:
    """``RuntimeError`` if ``result`` comes from a function marked ``once_differentiable``. torch says so only where
    what flows back depends on the weights, and takes its derivative for a constant elsewhere: in a loss, always."""
    seen: set[Any] = set()
    pending = [result.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)
        if function is not None and getattr(function.backward, "__code__", None) is _ONCE:
            raise _not_twice(advice, f"{function.__name__} is marked once_differentiable.")
        pending.extend(following for following, _ in node.next_functions)


_ONCE = torch.autograd.function.once_differentiable(lambda ctx: None).__code__


def _not_twice(advice: str, why: str) -> RuntimeError:
    return RuntimeError(
        f"an operator of the model, or the loss, cannot be differentiated twice. {advice}, or for attention compute "
        f"within torch.nn.attention.sdpa_kernel(SDPBackend.MATH). {why}"
    )
