"""Labels drawn from a model's own softmax, for the Gauss-Newton-Bartlett estimate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LabelSampler"]

_IGNORED = -100  # torch's ignore_index


class LabelSampler:
    """Draws labels with generators of its own, one for each device."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def cross_entropy(self, logits: Any, targets: Any) -> tuple[Tensor, int]:
        """Mean cross-entropy of ``logits`` for labels drawn from their softmax, and the number of labels. ``targets``
        say which dimension holds the classes and which positions are ignored."""
        rows, ignored = _rows(logits, targets)
        labels = torch.where(ignored, _IGNORED, self._draw(rows.detach()))
        count = int((~ignored).sum())
        if not count:
            return rows.sum() * 0.0, 0
        return F.cross_entropy(rows, labels, ignore_index=_IGNORED), count

    def _draw(self, rows: Tensor) -> Tensor:
        """One class of each row: the largest of the logits with Gumbel noise. Unlike torch.multinomial it takes NaN
        without a device-side assertion: the gradient shows it."""
        if rows.device not in self._generators:
            self._generators[rows.device] = torch.Generator(rows.device).manual_seed(self.seed)
        exponential = torch.empty_like(rows, dtype=torch.float32)
        exponential.exponential_(generator=self._generators[rows.device])
        return (rows.float() - exponential.clamp_(min=torch.finfo(torch.float32).tiny).log_()).argmax(dim=1)


def _rows(logits: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Logits of shape (labels, classes), and which labels are to be ignored."""
    if not isinstance(logits, Tensor) or logits.dim() < 2 or not logits.is_floating_point():
        raise TypeError("model: returned no tensor of logits, (N, C) or more dimensions; gnb_diag is for classifiers")
    if isinstance(targets, Tensor) and targets.is_floating_point():
        if targets.shape != logits.shape or not _are_probabilities(targets):
            raise ValueError(
                "data: the targets are numbers, but no probabilities like the logits; gnb_diag is for classifiers"
            )
        rows = logits.movedim(1, -1).flatten(0, -2)
        return rows, torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    shape = tuple(getattr(targets, "shape", ()))
    if shape == (logits.shape[0], *logits.shape[2:]):
        rows = logits.movedim(1, -1)
    elif shape == logits.shape[:-1]:
        rows = logits
    else:
        raise ValueError(f"data: targets of shape {shape} do not fit logits of shape {tuple(logits.shape)}")
    return rows.flatten(0, -2), targets.flatten() == _IGNORED


def _are_probabilities(targets: Tensor) -> bool:
    sums = targets.float().sum(1)
    return bool((targets >= 0).all()) and bool(((sums - 1.0).abs() < 1e-2).all())
