"""flatmin.RegressionNoise."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import scipy.stats
import torch

import flatmin
from flatmin import RegressionNoise


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rademacher(dtype: torch.dtype) -> None:
    y = torch.zeros(100_000, dtype=dtype)
    noisy = RegressionNoise(0.5, generator=seeded())(y)
    assert noisy.dtype == dtype and set(noisy.unique().tolist()) == {-0.5, 0.5}
    assert abs(float(noisy.double().mean())) < 4 * 0.5 / len(y) ** 0.5
    assert not y.any()


def test_normal() -> None:
    y = torch.full((1000, 100), 3.0)
    noisy = RegressionNoise(2.0, "normal", generator=seeded())(y)
    assert scipy.stats.kstest(((noisy - 3.0) / 2.0).flatten().double().numpy(), "norm").pvalue > 1e-4


def test_by_index() -> None:
    y = torch.zeros(50, 3)
    noise = RegressionNoise(1.0, generator=seeded())
    order = torch.randperm(50, generator=seeded())
    whole = noise(y, index=torch.arange(50))
    assert torch.equal(noise(y[order], index=order), whole[order])
    noise.set_epoch(2)
    assert not torch.equal(noise(y, index=torch.arange(50)), whole)
    assert noise.epoch == 2


def test_a_resumed_run_draws_on() -> None:
    y = torch.zeros(100)
    noise = RegressionNoise(1.0, "normal", generator=seeded())
    first = noise(y)
    state = noise.state_dict()
    again = pickle.loads(pickle.dumps(noise))
    second = noise(y)
    assert not torch.equal(first, second) and torch.equal(again(y), second)
    other = RegressionNoise(1.0, "normal")
    other.load_state_dict(state)
    assert torch.equal(other(y), second) and other.seed == noise.seed
    assert repr(noise) == "RegressionNoise(sigma=1.0, distribution='normal')"


def test_a_gradient_flows_through_nothing() -> None:
    assert RegressionNoise(0.0)(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]
    assert RegressionNoise(1.0)(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RegressionNoise(-1.0), ValueError, "sigma: -1.0"),
        (lambda: RegressionNoise(float("inf")), ValueError, "sigma: inf"),
        (lambda: RegressionNoise(1.0, "cauchy"), ValueError, "distribution: 'cauchy'"),
        (lambda: RegressionNoise(1.0)(torch.zeros(3, dtype=torch.int64)), TypeError, "targets: torch.int64"),
        (lambda: RegressionNoise(1.0)([1.0]), TypeError, "targets: list"),
        (lambda: RegressionNoise(1.0)(torch.zeros(3), index=torch.arange(4)), ValueError, r"index: shape \(4,\)"),
        (lambda: RegressionNoise(1.0)(torch.zeros(3), index=[0, 1, 2]), TypeError, "index: list given"),
        (lambda: RegressionNoise(1.0)(torch.zeros(2), index=torch.rand(2)), TypeError, "index: torch.float32 given"),
    ],
)
def test_errors(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# ---- both passes of SAM see one draw ----


@pytest.mark.parametrize("way", ["closure", "perturb"])
def test_both_passes_of_sam_see_the_same_labels(way: str) -> None:
    noise = flatmin.LabelNoise(5, 0.5, "exclude_true", generator=seeded())
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 5)
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
    x, clean = torch.randn(64, 4), torch.arange(64) % 5
    seen = []
    for _ in range(2):
        y = noise(clean)

        def loss(y: torch.Tensor = y) -> torch.Tensor:
            opt.zero_grad()
            seen.append(y.clone())
            value = torch.nn.functional.cross_entropy(model(x), y)
            value.backward()
            return value

        if way == "closure":
            opt.step(loss)
        else:
            loss()
            with opt.perturb():
                loss()
            opt.step()
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], clean)
