"""Labels drawn from a softmax, for Gauss-Newton-Bartlett estimates."""

from __future__ import annotations

import torch
from torch import Tensor

from ._noise import probe_

__all__ = ["draw_labels"]


@torch.no_grad()
def draw_labels(logits: Tensor, key: Tensor) -> Tensor:
    """One class for each row of ``logits`` [rows, classes], drawn from its softmax: int64 [rows].

    The largest logit with Gumbel noise (Gumbel 1954), made from ``key`` (:func:`random_key`) as all random numbers
    are: the same on every machine. Unlike ``torch.multinomial`` it takes NaN without a device-side assertion.
    """
    uniform = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    probe_([uniform], key, distribution="uniform")
    gumbel = uniform.add_(1.0).mul_(0.5).log_().neg_().log_().neg_()
    return (logits.float() + gumbel).argmax(dim=1)
