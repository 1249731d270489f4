"""SAM in plain torch: what the recipes of trainers are compared with. It shares no line with flatmin."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Build = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Loss = Callable[[nn.Module], Tensor]


def sgd_momentum(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The base of most recipes."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def plain_sam(
    net: nn.Module,
    steps: Iterable[list[Loss]],
    base: Build = sgd_momentum,
    *,
    rho: float = 0.05,
    clip: float | None = None,
    per_loss: bool = False,
    dtype: torch.dtype | None = torch.float64,
) -> nn.Module:
    """A copy of ``net`` after SAM steps in ``dtype`` (None: in that of the net).

    Args:
        net: where to begin; it stays as it is.
        steps: the losses of each step, whose mean is minimised.
        base: builds the base optimizer around the parameters that require gradients.
        rho: radius in the 2-norm.
        clip: largest 2-norm of the gradient that the base sees.
        per_loss: one perturbation for each loss, not one for their mean.
        dtype: of the copy.
    """
    net = copy.deepcopy(net) if dtype is None else copy.deepcopy(net).to(dtype)
    params = [p for p in net.parameters() if p.requires_grad]
    opt = base(params)
    for losses in steps:
        parts = [[loss] for loss in losses] if per_loss else [losses]
        found = [_gradient_at_the_worst_point(net, params, part, rho) for part in parts]
        for p, *grads in zip(params, *found, strict=True):
            p.grad = torch.stack(grads).mean(0)
        if clip is not None:
            norm = _norm([p.grad for p in params])
            for p in params:
                p.grad *= min(1.0, clip / float(norm + 1e-6))
        opt.step()
    return net


def _gradient_at_the_worst_point(net: nn.Module, params: list[Tensor], losses: list[Loss], rho: float) -> list[Tensor]:
    kept = [p.detach().clone() for p in params]
    first = torch.autograd.grad(_mean(net, losses), params)
    norm = _norm(first)
    with torch.no_grad():
        for p, grad in zip(params, first, strict=True):
            p += rho * grad / norm
    second = torch.autograd.grad(_mean(net, losses), params)
    with torch.no_grad():
        for p, before in zip(params, kept, strict=True):
            p.copy_(before)
    return list(second)


def _mean(net: nn.Module, losses: list[Loss]) -> Tensor:
    return torch.stack([loss(net) for loss in losses]).mean()


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.sqrt(sum((t**2).sum() for t in tensors))


def losses_of(
    batches: Iterable[tuple[Tensor, Tensor]], per_step: int = 1, autocast: torch.dtype | None = None
) -> list[list[Loss]]:
    """For :func:`plain_sam`: cross entropies of batches, ``per_step`` of them in each step."""

    def of(x: Tensor, y: Tensor) -> Loss:
        def loss(net: nn.Module) -> Tensor:
            if autocast is None:
                return F.cross_entropy(net(x.to(next(net.parameters()).dtype)), y)
            with torch.autocast("cpu", autocast, cache_enabled=False):
                return F.cross_entropy(net(x), y)

        return loss

    losses = [of(x, y) for x, y in batches]
    return [losses[i : i + per_step] for i in range(0, len(losses), per_step)]


@torch.no_grad()
def value(loss: Loss, net: nn.Module) -> float:
    return float(loss(net))


def difference(net: nn.Module, expected: nn.Module) -> float:
    """Largest difference of two models' parameters."""
    pairs = zip(net.parameters(), expected.parameters(), strict=True)
    return max(float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs)


def moved(net: nn.Module, start: nn.Module) -> float:
    """How far training went, against which :func:`difference` is small or not."""
    return difference(net, start)
