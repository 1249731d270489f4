"""The PAC-Bayes bound behind PACGen, at the noise and the temperature that make it smallest.

For independent noise u of mean 0 with ``|u_i| <= N_i = gamma |w_i| + eps``, a loss in [0, 1] whose Hessian has the
Lipschitz constant rho within that box, a prior uniform on ``|w_i| <= tau_i = |w_i| + N_i``, n samples and m parameters,
with probability 1 - delta

    E_u L(w + u) <= Lhat(w) + sum_i E[u_i^2] b_i / 2 + (sum_i KL_i + log(1 / delta)) / eta + eta / (2 n),
    b_i = H_ii + rho sqrt(m) N_i / 3

for any eta > 0: PAC-Bayes-Hoeffding with the loss expanded to third order, ``||u||^3 <= sqrt(m) sum_i |u_i|^3`` and
``|u_i|^3 <= N_i u_i^2`` (Wang et al. 2018, arXiv 1809.07402; the constants are derived here, since the paper's are
not confirmed). With a rho for each weight ``b_i = H_ii + rho_i sqrt(m) N_i / 3``, so that equal rho_i are one rho. The
expansion is then no theorem but a measure in the form of a bound: the theorem where all rho_i are equal, and not below
what parameters that do not interact would need, ``rho_i N_i / 3``. A negative b_i counts as 0, as in the paper.

Units: the losses, ``1 / eta`` and the bound have that of the loss; H_ii loss / weight^2; rho loss / weight^3; gamma has
none, eps, N_i and sigma_i that of a weight. All depends on each weight through one number,

    r_i = N_i^2 b_i / 3.

Uniform noise on ``(-sigma_i, sigma_i)``: ``E[u_i^2] = sigma_i^2 / 3`` and ``KL_i = log(tau_i / sigma_i)``; best is
``sigma_i = min(1 / sqrt(eta b_i / 3), N_i) = N_i / sqrt(max(eta r_i, 1))``.

Normal noise of size sigma_i, cut at N_i: with ``a = N_i / sigma_i``, ``Z = erf(a / sqrt 2)`` and ``s = 1 - 2 a phi(a) /
Z``, ``E[u_i^2] = s sigma_i^2`` and ``KL_i = log(2 tau_i / (sigma_i sqrt(2 pi) Z)) - s / 2``. Of all laws within the box
the one that minimises the bound has a density proportional to ``exp(-eta b_i u^2 / 2)`` (Gibbs' variational principle),
which is this one with ``sigma_i = 1 / sqrt(eta b_i)``, ``a^2 = 3 eta r_i``: its bound is never above that of uniform
noise. sigma_i may exceed N_i; as b_i goes to 0 the law becomes uniform on the box.

eta has to be fixed before the data are seen, and so has tau; taken from the weights, as here, they make a number to
compare models by rather than a guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Bound", "NoiseBound", "optimal_sigma"]

_CHUNK = 1 << 20  # elements: temporaries of 8 MiB
_GRID, _GOLDEN = 33, 30  # evaluations of the search for eta, to a relative width below 1e-6
_WIDTH = 1e-3  # of the bins of log r_i that stand for more than _EXACT weights during the search
_EXACT = 1 << 16


class Bound(NamedTuple):
    """The bound for one law of the noise, at its best eta.

    Attributes:
        value: ``loss + rise + divergence / eta + eta / (2 n)``.
        eta: the temperature that minimises it.
        loss: training loss.
        rise: ``sum_i E[u_i^2] b_i / 2``, what the expansion allows for the rise of the loss under the noise.
        divergence: ``sum_i KL_i + log(1 / delta)``, in nats.
        samples: n.
    """

    value: float
    eta: float
    loss: float
    rise: float
    divergence: float
    samples: int


@torch.no_grad()
def _neighbourhood(
    params: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    lipschitz: float | Sequence[Tensor],
    gamma: float,
    eps: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """``|w_i|``, ``N_i`` and ``r_i`` of each tensor, float64."""
    root = math.sqrt(sum(p.numel() for p in params))
    ws, ns, rs = [], [], []
    for i, p in enumerate(params):
        wide = "cpu" if p.device.type == "mps" else p.device  # MPS has no float64
        w = p.detach().to(wide, torch.float64).abs()
        h = curvatures[i].to(wide, torch.float64)
        rho = lipschitz if isinstance(lipschitz, float | int) else lipschitz[i].to(wide, torch.float64)
        n = gamma * w + eps
        ws.append(w)
        ns.append(n)
        rs.append(n * n * (h / 3.0 + n * rho * (root / 9.0)).clamp(min=0.0))
    return ws, ns, rs


def optimal_sigma(
    params: Sequence[Tensor],
    curvatures: Sequence[Tensor],
    lipschitz: float | Sequence[Tensor],
    eta: float,
    *,
    gamma: float = 0.1,
    eps: float = 0.1,
) -> list[Tensor]:
    """``sigma_i = min(1 / sqrt(eta (H_ii / 3 + rho sqrt(m) N_i / 9)), N_i)``: the sizes of uniform noise that minimise
    the bound at ``eta``, float64. m is the number of scalars in ``params``.

    :func:`flatmin.ops.scaled_noise_` draws it with ``scale = sqrt(3 / eta)`` and ``lipschitz = rho sqrt(m) / 3``; the
    best truncated normal noise with ``scale = 1 / sqrt(eta)`` and the same rho, if ``scale / sqrt(c_i) <= N_i``.
    """
    _, ns, rs = _neighbourhood(params, curvatures, lipschitz, gamma, eps)
    return [n * (eta * r).clamp(min=1.0).rsqrt() for n, r in zip(ns, rs, strict=True)]


class NoiseBound:
    """The bound as a function of eta, for both laws.

    Args:
        params, curvatures: ``w`` and ``H_ii``, in equal shapes.
        lipschitz: rho >= 0, or tensors like ``params``.
        gamma, eps: of the neighbourhood N_i.
        loss: training loss.
        samples: n.
        delta: in (0, 1).
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        curvatures: Sequence[Tensor],
        lipschitz: float | Sequence[Tensor],
        *,
        gamma: float,
        eps: float,
        loss: float,
        samples: int,
        delta: float,
    ) -> None:
        self.loss, self.samples = loss, samples
        ws, ns, rs = _neighbourhood(params, curvatures, lipschitz, gamma, eps)
        self._chunks: list[_Weighted] = [(chunk, None) for r in rs for chunk in torch.split(r.flatten(), _CHUNK)]
        self._count = sum(r.numel() for r in rs)
        self._bins = self._chunks if self._count <= _EXACT else _histogram(self._chunks)
        # log(tau_i / N_i); a weight of 0 without neighbourhood has neither noise nor prior
        widths = [torch.where(n > 0.0, torch.log1p(w / n), 0.0).sum() for w, n in zip(ws, ns, strict=True)]
        self._least = math.fsum(map(float, widths)) + math.log(1.0 / delta)

    def uniform(self, eta: float, rough: bool = False) -> Bound:
        """With uniform noise of the best sizes at ``eta``; ``rough`` sums over bins of r."""

        def terms(r: Tensor) -> tuple[Tensor, Tensor]:
            return r.clamp(max=1.0 / eta) * 0.5, (eta * r).clamp(min=1.0).log() * 0.5

        return self._bound(eta, terms, rough)

    def truncated_normal(self, eta: float, rough: bool = False) -> Bound:
        """With truncated normal noise of the best sizes at ``eta``; ``rough`` sums over bins of r."""

        def terms(r: Tensor) -> tuple[Tensor, Tensor]:
            a = (3.0 * eta * r).sqrt()
            box = a < 1e-8  # s and the logarithm round to 0; their quotients are 0 / 0, or as erf happens to round
            a = a.clamp(min=1e-8)
            z = torch.erf(a * math.sqrt(0.5))
            density = a * math.sqrt(2.0 / math.pi)
            s = torch.where(box, 0.0, 1.0 - density * (-0.5 * a * a).exp() / z)
            return s / (2.0 * eta), torch.where(box, 0.0, (density / z).log() - 0.5 * s)

        return self._bound(eta, terms, rough)

    def _bound(self, eta: float, terms: Callable[[Tensor], tuple[Tensor, Tensor]], rough: bool) -> Bound:
        sums = []
        for r, weight in self._bins if rough else self._chunks:
            sums.append(torch.stack([(t if weight is None else t * weight).sum() for t in terms(r)]))
        device = sums[0].device
        rise, divergence = torch.stack([s.to(device) for s in sums]).sum(0).tolist()
        divergence += self._least
        value = self.loss + rise + divergence / eta + eta / (2.0 * self.samples)
        return Bound(value, eta, self.loss, rise, divergence, self.samples)

    def minimise(self, law: Callable[[float, bool], Bound]) -> Bound:
        """The smallest value of ``law`` over eta.

        Its derivative by eta is ``1 / (2 n) - D(eta) / eta^2``, D the divergence (the noise is at its optimum). D is at
        least that of the widest noise and grows by no more than m / 2 per unit of log eta, so beyond an eta with
        ``eta^2 > 2 n D`` and ``eta^2 > n m / 2`` the bound only rises. In between it may have several minima: a grid
        finds the lowest, golden sections refine it. Where bins stood for the weights, ``eta <- sqrt(2 n D)``, which
        contracts around a minimum, takes their error (below 1e-3) out.
        """
        n = self.samples
        low = math.sqrt(2.0 * n * self._least)
        high = max(2.0 * low, math.sqrt(0.5 * n * self._count))
        while high**2 <= 2.0 * n * law(high, True).divergence:
            high *= 2.0
        step = math.log(high / low) / (_GRID - 1)

        def at(x: float) -> Bound:
            return law(low * math.exp(x), True)

        best = min(range(_GRID), key=lambda k: at(step * k).value)
        left, right = step * (best - 1), step * (best + 1)
        golden = 0.5 * (math.sqrt(5.0) - 1.0)
        x, y = right - golden * (right - left), left + golden * (right - left)
        at_x, at_y = at(x), at(y)
        for _ in range(_GOLDEN):
            if at_x.value <= at_y.value:
                right, y, at_y = y, x, at_x
                x = right - golden * (right - left)
                at_x = at(x)
            else:
                left, x, at_x = x, y, at_y
                y = left + golden * (right - left)
                at_y = at(y)
        found = min(at_x, at_y)
        if self._bins is self._chunks:
            return found
        found = law(found.eta, False)
        for _ in range(2):
            found = law(math.sqrt(2.0 * n * found.divergence), False)
        return found


#: Values of r, and how many weights each stands for (None: one).
_Weighted = tuple[Tensor, Tensor | None]


def _histogram(chunks: Sequence[_Weighted]) -> list[_Weighted]:
    """Bins of log r by their centres: 25 million weights take 2 s for every eta, some ten thousand bins 1 ms. Weights
    with r = 0 add nothing to any sum."""
    device = chunks[0][0].device
    logs = torch.cat([r[r > 0.0].log().to(device) for r, _ in chunks])
    if not logs.numel():
        return [(logs, None)]
    low = logs.min()
    counts = ((logs - low) / _WIDTH).long().bincount()
    centres = (low + _WIDTH * (torch.arange(len(counts), device=device) + 0.5)).exp()
    return [(centres[counts > 0], counts[counts > 0])]
