"""The laws of the noise, by their distribution at 10^7 draws: Kolmogorov and Smirnov, moments, independence.

Seeds are fixed, so a test passes always or never. Bounds are those that independent draws exceed with a probability
below 1e-5 (5 sigma) or, for the largest distance of distributions D, 1e-4: P(sqrt(n) D > 2.23) = 2 exp(-2 * 2.23^2).
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from flatmin import ops

N = 10_000_000
KS_BOUND = 2.23 / math.sqrt(N)
KEY = (20260101, 3)


@functools.cache
def drawn(law: str, cut: float = 1.0) -> Tensor:
    """N draws in units of sigma, from weights of 0. For the truncated law sigma = 1 / cut of the neighbourhood 1."""
    params = [torch.zeros(N)]
    backup, key = ops.backup_like(params), ops.random_key(*KEY)
    if law == "truncated_normal":
        ops.scaled_noise_(params, backup, key, distribution=law, curvatures=[torch.full((N,), cut**2)], eps=1.0)
        return params[0].double() * cut
    ops.scaled_noise_(params, backup, key, distribution=law, eps=1.0)
    return params[0].double()


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2.0))


def cdf(law: str, x: Tensor, cut: float) -> Tensor:
    if law == "uniform":
        return 0.5 * (x + 1.0)
    if law == "normal":
        return normal_cdf(x)
    low, high = normal_cdf(torch.tensor([-cut, cut], dtype=torch.float64))
    return (normal_cdf(x) - low) / (high - low)


def moments(law: str, cut: float) -> tuple[float, float]:
    """Variance and fourth moment. Truncated at a: with phi and m = 2 Phi(a) - 1, variance 1 - 2 a phi / m and fourth
    moment 3 - 2 (a^3 + 3 a) phi / m (integration by parts)."""
    if law == "uniform":
        return 1 / 3, 1 / 5
    if law == "normal":
        return 1.0, 3.0
    if law == "rademacher":
        return 1.0, 1.0
    phi, mass = math.exp(-0.5 * cut * cut) / math.sqrt(2 * math.pi), math.erf(cut / math.sqrt(2))
    return 1 - 2 * cut * phi / mass, 3 - 2 * (cut**3 + 3 * cut) * phi / mass


CONTINUOUS = [("uniform", 1.0), ("normal", 1.0), *(("truncated_normal", cut) for cut in (1.0, 1.5, 3.0, 7.0))]


@pytest.mark.parametrize(("law", "cut"), CONTINUOUS)
def test_distribution(law: str, cut: float) -> None:
    x = drawn(law, cut).sort().values
    expected = cdf(law, x, cut)
    steps = torch.arange(N + 1, dtype=torch.float64) / N
    distance = max((steps[1:] - expected).max().item(), (expected - steps[:-1]).max().item())
    assert distance <= KS_BOUND


@pytest.mark.parametrize(("law", "cut"), [*CONTINUOUS, ("rademacher", 1.0)])
def test_moments(law: str, cut: float) -> None:
    x = drawn(law, cut)
    variance, fourth = moments(law, cut)
    eighth = {"uniform": 1 / 9, "rademacher": 1.0}.get(law, 105.0)  # of the normal law, above the truncated one's
    assert abs(x.mean().item()) <= 5 * math.sqrt(variance / N)
    assert abs(x.square().mean().item() - variance) <= 5 * math.sqrt((fourth - variance**2) / N) + 1e-9
    assert abs(x.pow(3).mean().item()) <= 5 * math.sqrt(15.0 / N)
    assert abs(x.pow(4).mean().item() - fourth) <= 5 * math.sqrt(max(eighth - fourth**2, 0.0) / N) + 1e-9


@pytest.mark.parametrize("cut", [1.0, 1.5, 3.0])
def test_no_draw_beyond_the_cut(cut: float) -> None:
    """And the cut is reached: within 1e-4 of it there are about 1e-4 times the density there, times N."""
    largest = drawn("truncated_normal", cut).abs().max().item()
    assert cut - 1e-3 <= largest <= cut * (1 + 2**-23)
    uniform = drawn("uniform").abs().max().item()
    assert 1 - 1e-5 <= uniform < 1.0


def test_tails_of_the_normal_law() -> None:
    """Beyond 4 and 5 sigma a Poisson number: 633 and 5.7 expected of 10^7. The radius ends at 6.66."""
    x = drawn("normal").abs()
    for bound in (3.0, 4.0, 5.0):
        expected = N * math.erfc(bound / math.sqrt(2))
        assert abs((x > bound).sum().item() - expected) <= 5 * math.sqrt(expected) + 1
    assert x.max().item() < 6.67


@pytest.mark.parametrize("law", ["uniform", "normal", "rademacher"])
def test_elements_are_uncorrelated(law: str) -> None:
    """Over distances that matter to the generator (words of a block, vectors, chunks), of values and of squares."""
    x = drawn(law)
    for values in (x, x.square() - x.square().mean()):
        scale = values.square().mean().item()
        if scale < 1e-12:  # squares of +-1
            continue
        for lag in (1, 2, 3, 4, 7, 8, 16, 128, 256, 4096):
            product = (values[lag:] * values[:-lag]).mean().item() / scale
            assert abs(product) <= 5 / math.sqrt(N - lag)


@pytest.mark.parametrize("law", ["uniform", "normal", "rademacher"])
def test_tensors_draws_streams_and_seeds_are_independent(law: str) -> None:
    n = N // 4
    keys = [ops.random_key(*KEY), ops.random_key(KEY[0], 4), ops.random_key(*KEY, 1), ops.random_key(KEY[0] + 1, 3)]
    samples = []
    for key in keys:
        tensors = [torch.empty(n), torch.empty(n)]
        ops.probe_(tensors, key, distribution=law)
        samples += [t.double() for t in tensors]
    for i, a in enumerate(samples):
        for b in samples[:i]:
            correlation = (a * b).mean().item() / math.sqrt(a.square().mean().item() * b.square().mean().item())
            assert abs(correlation) <= 5 / math.sqrt(n)


def test_the_radius_and_the_angle_share_no_word() -> None:
    """A pair of normal draws: radius squared exponential with mean 2, angle uniform, independent."""
    pairs = drawn("normal").view(-1, 2)
    radius, turn = pairs.square().sum(1), torch.atan2(pairs[:, 1], pairs[:, 0]) / (2 * math.pi) + 0.5
    n = len(radius)
    for values, law in ((1 - torch.exp(-radius / 2), "radius"), (turn, "angle")):
        ordered = values.sort().values
        steps = torch.arange(n + 1, dtype=torch.float64) / n
        distance = max((steps[1:] - ordered).max().item(), (ordered - steps[:-1]).max().item())
        assert distance <= 2.23 / math.sqrt(n), law
    centred = (radius - radius.mean()) * (turn - turn.mean())
    assert abs(centred.mean().item()) <= 5 * math.sqrt(4.0 / 12.0 / n)
