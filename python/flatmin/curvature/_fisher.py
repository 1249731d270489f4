"""The empirical Fisher matrix: the mean over the samples of ``g g'``, g the gradient of one sample's loss.

A sample is one item of ``targets`` along its first dimension, with the item of the model's outputs at the same place:
an image, or a sequence with all of its positions. Its loss is ``loss_fn`` of the two as a batch of one, within its
batch: the model sees the whole batch, as BatchNorm in training mode demands. The labels are those of the data; the
matrix is the Fisher matrix proper only where they follow the model's distribution (Kunstner et al. 2019, arXiv
1905.12558).

``F v = mean of g_n <g_n, v> = J' (J v) / n`` with J the derivative of the samples' losses: it needs neither per-sample
gradients nor their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._arguments import describe
from ._matrix import Matrix, directional_differences, jacobian_product, transposed_product
from ._measurement import Measurement

__all__ = ["FISHER", "losses_of", "sample_losses"]


def sample_losses(m: Measurement, inputs: Any, targets: Any) -> Tensor:
    """The loss of each sample of a batch, in one dimension."""
    return losses_of(m.loss_of, *m.outputs(inputs, targets), what="matrix='fisher'")


def losses_of(loss_of: Callable[[Any, Any], Tensor], outputs: Any, targets: Any, what: str) -> Tensor:
    """The same, of what the model has returned. ``what`` wants it, as an error says."""
    size = _count(targets, what)
    for t in _tensors(outputs):
        if t.dim() == 0 or len(t) != size:
            raise ValueError(
                f"model: returned a tensor of shape {tuple(t.shape)} for {size} targets; {what} takes the "
                "loss of each sample, so the first dimension of all outputs must be that of the targets"
            )

    def one(output: Any, target: Any) -> Tensor:
        return loss_of(_each(output, lambda t: t.unsqueeze(0)), _each(target, lambda t: t.unsqueeze(0)))

    with suppress(Exception):  # vmap knows not every operator and no branch on a value: the loop says what is wrong
        return torch.func.vmap(one)(outputs, targets).reshape(size)
    pieces = [loss_of(*(_each(part, lambda t, i=i: t[i : i + 1]) for part in (outputs, targets))) for i in range(size)]
    return torch.stack(pieces)


def _count(targets: Any, what: str) -> int:
    """Number of samples: a container of tensors has that of its tensors."""
    sizes = {len(t) for t in _tensors(targets) if t.dim()}
    if len(sizes) == 1:
        return sizes.pop()
    raise ValueError(
        f"data: the targets are a {describe(targets)}; {what} takes the loss of each sample, so loss_fn needs targets "
        "that are tensors, with the samples in their first dimension (a model that computes its own loss must give its "
        "outputs and targets instead: curvature.Batches(data, forward=...))"
    )


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [t for item in tree for t in _tensors(item)]


def _each(tree: Any, f: Any) -> Any:
    """``tree`` with ``f`` of each of its tensors."""
    if isinstance(tree, Tensor):
        return f(tree)
    if isinstance(tree, Mapping):
        return {key: _each(value, f) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_each(item, f) for item in tree)
    return tree


def _batch(m: Measurement, inputs: Any, targets: Any, vectors: Sequence[Tensor]) -> list[Tensor | None]:
    losses = sample_losses(m, inputs, targets)
    slopes = jacobian_product(losses, m.params, vectors)
    return transposed_product(losses, m.params, slopes / len(losses))


def _difference(m: Measurement, vectors: Sequence[Tensor], h: float) -> list[Tensor]:
    slopes = iter(directional_differences(m, vectors, h, partial(sample_losses, m)))

    def term(inputs: Any, targets: Any) -> list[Tensor | None]:
        losses = sample_losses(m, inputs, targets)
        return transposed_product(losses, m.params, next(slopes) / len(losses))

    return m.mean(term)


FISHER = Matrix("empirical Fisher matrix", _batch, _difference, 3)
