"""What the tests of PerturbedOPT share: the two ways to take its step, and POPT-1 written by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flatmin import PerturbedOPT, ops
from models import Batch, backward, closure_of, loss_of, small_net

#: Sizes with which part of the weights of :func:`helpers.small_net` is capped, and part is sized by the curvature.
#: Quotients of steps above 1e-4 have a relative rounding error of 1e-16 / 1e-4, which does not grow out of hand.
MIXED: dict[str, Any] = {"gamma": 0.3, "eps": 0.01, "scale": 0.02, "beta1": 0.9, "beta2": 0.3, "min_step": 1e-4}


def in_context(net: nn.Module, opt: PerturbedOPT, batch: Batch) -> None:
    opt.zero_grad()
    with opt.perturb():
        backward(net, batch)
    opt.step()


def in_closure(net: nn.Module, opt: PerturbedOPT, batch: Batch) -> None:
    opt.step(closure_of(net, opt, batch))


WAYS = [in_context, in_closure]


def run(net: nn.Module, opt: PerturbedOPT, data: Iterable[Batch], way: Callable[..., None] = in_context) -> None:
    for batch in data:
        way(net, opt, batch)


def momentum_sgd(net: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, **options)


def noisy_net(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, PerturbedOPT]:
    """:func:`helpers.small_net` under SGD with momentum and noise of mixed sizes, seeded by 7."""
    net = small_net(dtype)
    options = {"generator": torch.Generator().manual_seed(7)} | MIXED | options
    return net, PerturbedOPT(momentum_sgd(net), **options)


def curvatures(opt: PerturbedOPT) -> list[Tensor]:
    """The averages, in the order of the parameters that have one."""
    return [entry["curvature"].clone() for entry in opt.state_dict()["noise"]["state"].values()]


def draws_of(t: Tensor, seed: int, draw: int, position: int, law: str = "uniform", stream: int = 0) -> Tensor:
    """The numbers that a tensor of the list gets."""
    xi = torch.empty_like(t, requires_grad=False)
    ops.probe_([t.new_empty(0)] * position + [xi], ops.random_key(seed, draw, stream), distribution=law)
    return xi


def truncated_draws(a: Tensor, seed: int, draw: int, position: int) -> Tensor:
    """Normal draws, each cut at its own ``a >= 1``: of the operator, for weights ``a`` whose noise has size 1."""
    tensors = [a.new_empty(0)] * position + [a.clone()]
    options: dict[str, Any] = {"gamma": 1.0, "curvatures": [torch.ones_like(t) for t in tensors]}
    key = ops.random_key(seed, draw)
    ops.scaled_noise_(tensors, ops.backup_like(tensors), key, distribution="truncated_normal", **options)
    return tensors[-1] - a


# ---- POPT-1, as algorithms.md 3.6 has it ----


class Popt1:
    """POPT-1 around an SGD with momentum and weight decay, or around Adam, in plain torch and float64."""

    def __init__(
        self, net: nn.Module, seed: int, base: str, distribution: str, lipschitz: str | float, log: bool
    ) -> None:
        self.net, self.seed, self.base, self.distribution, self.lipschitz, self.log = (
            net,
            seed,
            base,
            distribution,
            lipschitz,
            log,
        )
        self.params = list(net.parameters())
        self.h = [torch.zeros_like(p) for p in self.params]
        self.rho = [torch.full_like(p, 0.0 if isinstance(lipschitz, str) else lipschitz) for p in self.params]
        self.moments: list[Any] = [[torch.zeros_like(p), torch.zeros_like(p)] for p in self.params]
        self.t = self.epoch = 0
        self.capped: list[float] = []

    def noise(self, i: int, w: Tensor) -> Tensor:
        decay = 1.0 / math.log(math.e - 1.0 + self.epoch) if self.log else 1.0
        n = (MIXED["gamma"] * w.abs() + MIXED["eps"]) * decay
        c = (self.h[i] / (1.0 - MIXED["beta1"] ** self.t) + self.rho[i] * n).clamp(min=0.0)
        sigma = torch.minimum(MIXED["scale"] / c.sqrt(), n)
        self.capped.append(float((sigma == n).double().mean()))
        if self.distribution == "truncated_normal":
            return sigma * truncated_draws(n / sigma, self.seed, self.t - 1, i)
        return sigma * draws_of(w, self.seed, self.t - 1, i, self.distribution)

    @torch.no_grad()
    def step(self, batch: Batch) -> None:
        old = [p.clone() for p in self.params]
        if self.t > 0:
            for i, p in enumerate(self.params):
                p += self.noise(i, p.clone())
        with torch.enable_grad():
            grads = torch.autograd.grad(loss_of(self.net, batch), self.params)
        before = [h / (1.0 - MIXED["beta1"] ** self.t) if self.t else None for h in self.h]
        self.t += 1
        quotients = []
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            self.h[i] = MIXED["beta1"] * self.h[i] + (1.0 - MIXED["beta1"]) * g * g
            p.copy_(self.moved(i, old[i], g))
            if before[i] is not None:
                after = self.h[i] / (1.0 - MIXED["beta1"] ** self.t)
                far = (p - old[i]).abs() > MIXED["min_step"]
                quotients.append(torch.where(far, (after - before[i]).abs() / (p - old[i]).abs(), 0.0))
        self.learn(quotients)

    def learn(self, quotients: list[Tensor]) -> None:
        beta = MIXED["beta2"]
        largest = max((float(q.max()) for q in quotients), default=0.0)
        for i, q in enumerate(quotients):
            if self.lipschitz == "max":
                self.rho[i] = beta * self.rho[i] + (1.0 - beta) * largest
            elif self.lipschitz == "element":
                self.rho[i] = torch.where(q > 0.0, beta * self.rho[i] + (1.0 - beta) * q, self.rho[i])

    def moved(self, i: int, w: Tensor, g: Tensor) -> Tensor:
        m, v = self.moments[i]
        if self.base == "sgd":
            m.mul_(0.9).add_(g + 1e-2 * w)
            return w - 0.1 * m
        m.mul_(0.9).add_(0.1 * g)
        v.mul_(0.999).add_(0.001 * g * g)
        return w - 0.01 * (m / (1 - 0.9**self.t)) / ((v / (1 - 0.999**self.t)).sqrt() + 1e-8)


def seeds() -> Iterator[int]:
    """What PerturbedOPT draws from the generator of :func:`noisy_net`."""
    generator = torch.Generator().manual_seed(7)
    while True:
        yield int(torch.randint(2**63 - 1, (), generator=generator))
