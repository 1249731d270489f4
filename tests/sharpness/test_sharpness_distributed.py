"""Two processes that share the data measure what one process measures over all of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import flatmin
from flatmin import sharpness
from two_processes import run_on_two

Batches = list[tuple[Tensor, Tensor]]
AMOUNTS = {"products": 12, "probes": 2, "steps": 4, "pairs": 2, "curvature_samples": 2, "noise_samples": 2}


def _net() -> nn.Module:
    """With statistics that a pass over the data can compute anew."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double().eval()


def _data(seed: int = 1) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    sizes = (8, 4, 6, 2)
    return [
        (torch.randn(n, 6, generator=generator, dtype=torch.float64), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


def _share(rank: int, data: Batches) -> Batches:
    """12 and 8 samples of 20: both whole groups of four."""
    return data[:2] if rank == 0 else data[2:]


def _numbers(found: Any) -> list[float]:
    """All that is a number; the error of one group is none."""
    if isinstance(found, float | int):
        return [] if math.isnan(found) else [float(found)]
    return [x for part in found for x in _numbers(part)]


def _line(net: nn.Module, data: Batches, **options: Any) -> Any:
    return sharpness.line(net, F.cross_entropy, data, points=3, **options).values


def _plane(net: nn.Module, data: Batches, **options: Any) -> Any:
    return sharpness.plane(net, F.cross_entropy, data, points=2, batch_norm="recompute", **options).values


def _pacgen(net: nn.Module, data: Batches, **options: Any) -> Any:
    found = flatmin.pacgen(net, F.cross_entropy, data, curvature_samples=3, noise_samples=2, **options)
    assert found.sharpness is not None
    assert found.samples == 20
    return found.psi, found.training_loss, found.bound_uniform, found.sharpness


def _pacgen_of_squares(net: nn.Module, data: Batches, **options: Any) -> Any:
    return flatmin.pacgen(
        net, F.cross_entropy, data, curvature="squared_gradient", lipschitz=1.0, noise_samples=0, **options
    ).psi


def _report(net: nn.Module, data: Batches, **options: Any) -> Any:
    test = _data(2)
    found = flatmin.report(
        net,
        F.cross_entropy,
        data,
        test if len(data) == 4 else _share(0 if data[0][1].shape == (8,) else 1, test),
        amounts=AMOUNTS,
        m=(1, 4, None),
        **options,
    )
    assert found.samples == found.settings["training samples"] == 20
    return [(row.value, row.error or 0.0) for row in found]


def _m_sharpness(net: nn.Module, data: Batches, **options: Any) -> Any:
    return sharpness.m_sharpness(net, F.cross_entropy, data, 0.1, **options)


MEASURES: dict[str, Callable[..., Any]] = {
    "m-sharpness": lambda net, data, **o: _m_sharpness(net, data, m=4, **o),
    "m-sharpness, several ascents": lambda net, data, **o: _m_sharpness(net, data, m=2, steps=2, restarts=3, **o),
    "m-sharpness of all": lambda net, data, **o: _m_sharpness(net, data, steps=3, restarts=2, **o),
    "Keskar": lambda net, data, **o: sharpness.keskar(net, F.cross_entropy, data, iterations=4, restarts=2, **o),
    "Keskar in a subspace": lambda net, data, **o: sharpness.keskar(net, F.cross_entropy, data, dim=3, **o),
    "expected": lambda net, data, **o: sharpness.expected_sharpness(
        net, F.cross_entropy, data, scale=0.05, samples=3, antithetic=True, **o
    ),
    "line": _line,
    "plane, statistics anew": _plane,
    "PACGen": _pacgen,
    "PACGen, squared gradients": _pacgen_of_squares,
    "report": _report,
}


def _both(rank: int) -> None:
    net, data = _net(), _data()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    for name, measure in MEASURES.items():
        alone = _numbers(measure(net, data, progress=False))
        # a DistributedDataParallel brings its group
        shared = {"process_group": dist.group.WORLD} if name != "expected" else {}
        model = net if name != "expected" else DistributedDataParallel(net)
        together = _numbers(measure(model, _share(rank, data), progress=False, **shared))
        assert together == pytest.approx(alone, rel=1e-7, abs=1e-11), name
        local = (
            _numbers(measure(net, _share(rank, data), progress=False)) if name[:6] not in ("PACGen", "report") else []
        )
        assert local != pytest.approx(alone, rel=1e-3), name  # a share is not all of the data
        mine = torch.tensor(together, dtype=torch.float64)
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(mine, first), name  # to the bit, so that all ranks decide alike
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_two_processes_are_one() -> None:
    run_on_two(_both)


def _landscape_file(rank: int, path: Path) -> None:
    """The first rank alone has the file: it is continued on both, and its error is raised on both."""
    net, share = _net(), _share(rank, _data())
    mine = path / f"rank{rank}.json"
    both: dict[str, Any] = {"process_group": dist.group.WORLD, "progress": False}
    found = sharpness.line(net, F.cross_entropy, share, points=3, path=mine, **both)
    assert mine.exists() == (rank == 0)
    if rank == 0:
        stored = sharpness.Landscape.load(mine)
        stored.values[1] = None
        stored.values[2] = (7.0, None)
        stored.save(mine)
    again = sharpness.line(net, F.cross_entropy, share, points=3, path=mine, **both)
    assert again.values[:2] == found.values[:2]
    assert again.values[2] == (7.0, None)
    with pytest.raises(ValueError, match="holds another landscape"):
        sharpness.line(net, F.cross_entropy, share, points=4, path=mine, **both)


def test_a_landscape_is_continued_by_all_ranks(tmp_path: Path) -> None:
    run_on_two(_landscape_file, tmp_path)


def _limits(rank: int) -> None:
    net, share = _net(), _share(rank, _data())
    both: dict[str, Any] = {"process_group": dist.group.WORLD, "progress": False}
    assert _m_sharpness(net, share, m=2, max_groups=3, **both).sizes == (2, 2, 2, 2)  # two of each rank
    found = flatmin.report(net, F.cross_entropy, share, amounts=AMOUNTS | {"samples": 10}, m=(2,), **both)
    assert found.samples == 10  # 6 and 4
    assert sum(found.m_sharpness[2].sizes) == 10
    like = flatmin.report(net, F.cross_entropy, share, like=found, m=(2,), **both)
    assert [row.value for row in like] == [row.value for row in found]
    budget = flatmin.report(net, F.cross_entropy, share, budget_s=0.2 + rank, m=(2,), **both)  # the first rank's counts
    plans: list[Any] = [None, None]
    dist.all_gather_object(plans, (budget.plan, budget.samples, budget.m_sharpness[2].sizes))
    assert plans[0] == plans[1]
    for curvature in ("gnb", lambda *_, **__: []):
        with pytest.raises(ValueError, match=r"curvature: .* is that of one rank"):
            flatmin.pacgen(net, F.cross_entropy, share, curvature=curvature, **both)


def test_amounts_are_of_all_ranks() -> None:
    run_on_two(_limits)
