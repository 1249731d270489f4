"""Labels drawn from a model's own softmax, for Gauss-Newton-Bartlett estimates."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops._softmax_labels import draw_labels
from ._measurement import LABELS

__all__ = ["LabelSampler", "sampled_cross_entropy"]

_IGNORED = -100  # torch's ignore_index


class LabelSampler:
    """Draws labels for one batch after the other.

    Args:
        seed: the labels are functions of it and of the number of the batch.
        loss_fn: torch's own criteria say where the classes are, and which label is ignored.
        class_dim: dimension of the logits that holds the classes; None to find out.
    """

    def __init__(self, seed: int, loss_fn: Any, class_dim: int | None) -> None:
        self.seed, self.class_dim, self.loss_fn = int(seed), class_dim, loss_fn
        self._draws = 0

    def cross_entropy(self, logits: Any, targets: Any) -> tuple[Tensor, int]:
        """Mean cross-entropy of ``logits`` for labels drawn from their softmax, and the number of labels. ``targets``
        say which positions are ignored, and help to say which dimension holds the classes."""
        if not isinstance(logits, Tensor) or logits.dim() < 2 or not logits.is_floating_point():
            raise TypeError(
                "model: returned no tensor of logits, (N, C) or more dimensions; gnb_diag is for classifiers (where "
                "logits are part of something else, curvature.Batches(data, forward=...) takes them out)"
            )
        key = ops.random_key(self.seed, self._draws, LABELS << 8, logits.device)
        self._draws += 1
        return sampled_cross_entropy(logits, targets, key, self.loss_fn, self.class_dim, _WITHIN)


#: How to say it to a measurement that calls gnb_diag.
_WITHIN = " (where gnb_diag is part of another measurement: curvature=functools.partial(gnb_diag, class_dim=...))"


def sampled_cross_entropy(
    logits: Tensor, targets: Any, key: Tensor, loss_fn: Any, class_dim: int | None, advice: str = ""
) -> tuple[Tensor, int]:
    """Mean cross-entropy for labels that ``key`` draws, and the number of labels: see :class:`LabelSampler`.

    Args:
        advice: what else to say where ``class_dim`` is needed.
    """
    dim = _find_class_dim(logits, targets, loss_fn, class_dim, advice)
    rows = logits.movedim(dim, -1).flatten(0, -2)
    ignored = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    if not targets.is_floating_point():  # probabilities have no position to ignore
        ignored = targets.flatten() == _ignored_label(loss_fn)
    labels = torch.where(ignored, _IGNORED, draw_labels(rows.detach(), key))
    count = int((~ignored).sum())
    if not count:
        return rows.sum() * 0.0, 0
    return F.cross_entropy(rows, labels, ignore_index=_IGNORED), count


def _find_class_dim(logits: Tensor, targets: Any, loss_fn: Any, given: int | None, advice: str) -> int:
    if given is not None and not (-logits.dim() <= given < logits.dim() and given % logits.dim()):
        raise ValueError(f"class_dim: {given} given for logits of shape {tuple(logits.shape)}; the first one counts")
    dims = [1, logits.dim() - 1] if given is None else [given % logits.dim()]
    fitting = [dim for dim in dict.fromkeys(dims) if _fits(logits, targets, dim)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and isinstance(targets, Tensor) and targets.is_floating_point():
        raise ValueError(
            "data: the targets are numbers, but no probabilities like the logits; a Gauss-Newton-Bartlett estimate is "
            "for classifiers"
        )
    shapes = f"targets of shape {tuple(getattr(targets, 'shape', ()))}", f"logits of shape {tuple(logits.shape)}"
    if not fitting:
        where = f"dimension {dims[0]}" if given is not None else "dimension 1 or the last one (class_dim= says another)"
        raise ValueError(f"data: {shapes[0]} do not fit {shapes[1]} with the classes in {where}")
    if _is_cross_entropy(loss_fn):  # torch's criteria have the classes in dimension 1
        return 1
    raise ValueError(
        f"class_dim: needed, for {shapes[0]} fit {shapes[1]} with the classes in dimension 1 and in the last one; give "
        f"the dimension over which the loss takes its softmax{advice}"
    )


def _fits(logits: Tensor, targets: Any, dim: int) -> bool:
    """Whether ``targets`` can be labels, or probabilities, of logits with the classes in ``dim``."""
    if not isinstance(targets, Tensor):
        return False
    if targets.is_floating_point():
        return targets.shape == logits.shape and _are_probabilities(targets, dim)
    return targets.shape == logits.shape[:dim] + logits.shape[dim + 1 :]


def _are_probabilities(targets: Tensor, dim: int) -> bool:
    sums = targets.float().sum(dim)
    return bool((targets >= 0).all()) and bool(((sums - 1.0).abs() < 1e-2).all())


def _is_cross_entropy(loss_fn: Any) -> bool:
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
    return loss_fn in (F.cross_entropy, F.nll_loss) or type(loss_fn) in (nn.CrossEntropyLoss, nn.NLLLoss)


def _ignored_label(loss_fn: Any) -> int:
    """``ignore_index`` of a criterion, or of a partial function."""
    keywords = loss_fn.keywords if isinstance(loss_fn, functools.partial) else {}
    found = keywords.get("ignore_index", getattr(loss_fn, "ignore_index", _IGNORED))
    return found if isinstance(found, int) else _IGNORED
