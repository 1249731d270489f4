"""What an estimate of the curvature is made from: a closure, or a batch that the model is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...curvature._batches import Batches, Source
from ...curvature._fisher import losses_of

__all__ = ["Forward", "LossFn", "closure_from"]

Forward = Callable[[Any, Any], tuple[Any, Any]]
LossFn = Callable[[Any, Any], Tensor]


def closure_from(
    source: Any,
    kind: str,
    model: nn.Module | None,
    forward: Forward | None,
    loss_fn: LossFn | None,
    device: torch.device,
) -> Callable[[], Any]:
    """A closure as the estimator ``kind`` takes it.

    Raises:
        TypeError: ``source`` is a batch and something is missing, or a closure that has no use for ``forward``.
    """
    if callable(source) and not isinstance(source, Mapping):
        if forward is not None:
            raise TypeError("forward: given with a closure, which calls the model itself; give the batch in its place")
        return source  # type: ignore[no-any-return]
    if forward is None and model is None:
        raise TypeError(
            "update_curvature(batch) calls the model, and knows none: give PerturbedOPT its model=, or forward=lambda "
            "_, batch: (outputs, targets)"
        )
    if loss_fn is None and kind != "gnb":
        raise TypeError(
            f"loss_fn: missing; curvature={kind!r} is of the loss, so give the function of (outputs, targets)"
        )
    batches = Source(Batches([source], forward=forward, size=lambda batch: 1))
    return partial(_from_batch, batches, kind, model, loss_fn, device)


def _from_batch(batches: Source, kind: str, model: Any, loss_fn: LossFn | None, device: torch.device) -> Any:
    ((inputs, targets, _),) = batches.read(device)
    outputs, targets = batches.outputs(model, inputs, targets)
    if loss_fn is None or kind == "gnb":
        return outputs, targets
    if kind == "fisher":
        return losses_of(partial(_loss_of, loss_fn), outputs, targets, what="curvature='fisher'")
    return loss_fn(outputs, targets)


def _loss_of(loss_fn: LossFn, outputs: Any, targets: Any) -> Tensor:
    return loss_fn(outputs, targets).reshape(())
