"""A problem of four weights on which every method of the SAM family has a known trajectory.

``l_k(w) = (x_k . w - y_k)^2 / 2 + sum(w_i^4) / 4``, ``f = mean_k l_k``, in float64, with the weights in two tensors of
shape (1, 2). The trajectories are three steps of SGD with rate 0.1 and momentum 0.9 on the full batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

X = torch.tensor([[1, 0, 0.5, -1], [0.5, 1, 0, 0.25], [-1, 0.5, 1, 0], [0, -0.25, 0.5, 1]], dtype=torch.float64)
Y = torch.tensor([0.5, -1, 0.25, 1], dtype=torch.float64)

#: Weights after three steps: of the bare base, and of SAM with rho 0.1.
SGD = (0.3196455869, -0.5093105256, 0.4076054619, 0.2244493835)
SAM = (0.1839252691, -0.5091865969, 0.4202454179, 0.2364626955)


def weights() -> list[nn.Parameter]:
    """``w0`` in two tensors."""
    return [nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in ([1.0, -0.5], [0.25, 0.125])]


def losses(params: Iterable[Tensor]) -> Tensor:
    """``l_k``, of shape (4,)."""
    w = torch.cat([p.flatten() for p in params])
    return (X @ w - Y) ** 2 / 2 + (w**4).sum() / 4


def sgd(params: Iterable[Any]) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def trajectory(wrap: Callable[[list[nn.Parameter]], Any], steps: int = 3) -> Tensor:
    """The four weights after ``steps`` of ``opt.step(closure)`` on the full batch, with ``opt = wrap(params)``."""
    params = weights()
    opt = wrap(params)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = losses(params).mean()
        loss.backward()
        return loss

    for _ in range(steps):
        opt.step(closure)
    return torch.cat([p.detach().flatten() for p in params])


def golden(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
