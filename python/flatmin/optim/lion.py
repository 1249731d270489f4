"""Lion (Chen et al. 2023, arXiv 2302.06675), which torch does not have: a base for the wrappers of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._checks import check_size

__all__ = ["Lion"]


class Lion(Optimizer):
    """Sign of an interpolation between the gradient and its average (algorithm 2 of arXiv 2302.06675).

    With ``g`` the gradient and ``m`` its average, 0 at first::

        c = beta1 m + (1 - beta1) g
        w = w - lr (sign(c) + weight_decay w)
        m = beta2 m + (1 - beta2) g

    Every element of ``w`` moves by ``lr``, or not at all where ``c`` is 0: a learning rate 3 to 10 times smaller, and a
    weight decay as much larger, than AdamW's. :class:`flatmin.SAM` and :class:`flatmin.PerturbedOPT` run it in one pass
    with their restore.

    Args:
        params: parameters, or groups of them.
        lr: learning rate >= 0.
        betas: of the interpolation and of the average, each in [0, 1).
        weight_decay: decoupled, >= 0.
        maximize: ascend instead.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        check_size("lr", lr)
        check_size("weight_decay", weight_decay)
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas: {betas} given; give two floats >= 0 and < 1")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; ``closure`` computes loss and gradients, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            options = {key: group[key] for key in ("lr", "betas", "weight_decay", "maximize")}
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, **options)
        return loss

    def _update(
        self, p: Tensor, grad: Tensor, *, lr: float, betas: tuple[float, float], weight_decay: float, maximize: bool
    ) -> None:
        if grad.is_sparse:
            raise RuntimeError("Lion: a sparse gradient given; it moves every element, so give a dense one")
        state = self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        w, g, m = (torch.view_as_real(t) if t.is_complex() else t for t in (p, grad, state["exp_avg"]))
        g = -g if maximize else g
        mixed = m.mul(betas[0]).add_(g, alpha=1.0 - betas[0])
        update = torch.where(mixed.isnan(), mixed, mixed.sign())  # torch's sign of NaN is 0: a step without a word
        w.mul_(1.0 - lr * weight_decay).add_(update, alpha=-lr)
        m.mul_(betas[1]).add_(g, alpha=1.0 - betas[1])
