"""The recipe for CUDA graphs: its step is SAM's, its replays are its step, and what cannot be captured is refused."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatmin
from gpu_runs import DEVICE, HOST
from models import same_bits
from problems import filled

RECIPES = Path(__file__).parents[2] / "examples" / "trainers"
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("cuda_graph")


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))


def _batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 8, generator=generator), torch.randint(3, (6,), generator=generator)) for _ in range(count)]


def _numbers(count: int) -> list[tuple[float, float]]:
    """Rate and radius of each step."""
    return [(0.1 / (i + 1), 0.05 * (i + 1)) for i in range(count)]


def _by_the_wrapper(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    opt, losses = flatmin.SAM(torch.optim.SGD(net.parameters(), **SGD), rho=0.05, model=net), []
    for (x, y), (lr, rho) in zip(batches, _numbers(len(batches)), strict=True):
        opt.param_groups[0].update(lr=lr, sam_rho=rho)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        losses.append(float(opt.step(closure).detach()))
    return losses


def _by_the_recipe(net: nn.Module, step: Any, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    losses = []
    for (x, y), (lr, rho) in zip(batches, _numbers(len(batches)), strict=True):
        step.group["lr"], step.rho = lr, rho
        losses.append(float(step(x, y)))
    return losses


def test_the_step_that_is_captured_is_sam(recipe: ModuleType) -> None:
    """To the bit, with the rate and the radius of the moment; BatchNorm's statistics are of the first pass."""
    nets, batches = (_net(), _net()), _batches(5)
    expected = _by_the_wrapper(nets[0], batches)
    base = torch.optim.SGD(nets[1].parameters(), **SGD)
    step = recipe.GraphedSAM(nets[1], F.cross_entropy, base, 0.05, batches[0])
    assert _by_the_recipe(nets[1], step, batches) == expected
    state = [net.state_dict() for net in nets]
    assert all(torch.equal(state[0][name], state[1][name]) for name in state[0])
    # the momentum is in the base's checkpoint
    again = torch.optim.SGD(nets[1].parameters(), **SGD)
    again.load_state_dict(base.state_dict())
    momenta = [again.state[p]["momentum_buffer"] for p in nets[1].parameters()]
    assert all(torch.equal(a, b) for a, b in zip(momenta, step.momenta, strict=True))


REFUSED: dict[str, tuple[str, Callable[[Any], torch.optim.Optimizer]]] = {
    "Adam": ("base: Adam given; give torch.optim.SGD.*count their steps on the host", torch.optim.Adam),
    "two groups": (
        "base: has 2 groups",
        lambda params: torch.optim.SGD([{"params": [p]} for p in list(params)[:2]], lr=0.1),
    ),
    "maximize": ("base: maximize=True", lambda params: torch.optim.SGD(params, lr=0.1, maximize=True)),
    "dampening": ("base: dampening=0.1", lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.1)),
}


@pytest.mark.parametrize(("message", "base"), REFUSED.values(), ids=REFUSED)
def test_what_a_graph_cannot_hold_is_refused(
    recipe: ModuleType, message: str, base: Callable[[Any], torch.optim.Optimizer]
) -> None:
    net = _net()
    with pytest.raises(ValueError, match=message):
        recipe.GraphedSAM(net, F.cross_entropy, base(net.parameters()), 0.05, _batches(1)[0])


def test_what_a_replay_would_not_see_is_refused(recipe: ModuleType) -> None:
    net, (batch, (x, y)) = _net(), _batches(2)
    before = [p.detach().clone() for p in net.parameters()]
    base = torch.optim.SGD(net.parameters(), **SGD)
    step = recipe.GraphedSAM(net, F.cross_entropy, base, 0.05, batch)
    with pytest.raises(ValueError, match=r"x: shape \(5, 8\) given; the step is for \(6, 8\)"):
        step(x[:5], y[:5])
    base.param_groups[0]["momentum"] = 0.5
    with pytest.raises(RuntimeError, match="is not what the step was made with"):
        step(x, y)
    with pytest.raises(RuntimeError, match="capture: the parameters are on cpu; CUDA graphs need a GPU"):
        step.capture()
    assert same_bits(before, [p.detach() for p in net.parameters()])


def test_without_a_gpu_the_script_says_so() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, str(RECIPES / "cuda_graph.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("cuda_graph.py: needs a GPU that torch sees")


# ---- on a GPU ----


class Elementwise(nn.Module):
    """Its gradients are computed element by element: the same bits whether captured or not."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(filled(shape, torch.float32, i) for i, shape in enumerate([(129, 65), (4097,)]))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1.0
        return torch.cat([(w.flatten() - x[: w.numel()]) ** 2 for w in self.weights])


def _distance(outputs: Tensor, y: Tensor) -> Tensor:
    return ((outputs - y) ** 2).sum()


@pytest.mark.cuda
def test_replays_are_the_step(recipe: ModuleType) -> None:
    """To the bit, with new batches, rates and radii; and capturing changes nothing."""
    size = 129 * 65
    batches = [(filled((size,), torch.float32, i), filled((size + 4097,), torch.float32, 9 + i)) for i in range(5)]
    batches = [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches]
    nets = [Elementwise().to(DEVICE) for _ in range(2)]
    begin = [p.detach().clone() for p in nets[0].parameters()]
    steps = [
        recipe.GraphedSAM(net, _distance, torch.optim.SGD(net.parameters(), **SGD), 0.05, batches[0]) for net in nets
    ]
    steps[1].capture()
    assert same_bits([p.detach() for p in nets[1].parameters()], begin)
    assert not any(m.any() for m in steps[1].momenta)
    for number, batch in enumerate(batches):
        for step in steps:
            step.group["lr"], step.rho = 1e-3 / (number + 1), 0.05 * (number + 1)
            step(*batch)
        assert same_bits(*([p.detach() for p in net.parameters()] for net in nets))
        assert same_bits(steps[0].momenta, steps[1].momenta)
        assert torch.equal(steps[0].loss, steps[1].loss)
    assert not same_bits([p.detach() for p in nets[1].parameters()], begin)
    assert float(nets[0].calls) == float(nets[1].calls) == 5  # of the first passes


@pytest.mark.cuda
def test_a_graphed_network_trains_as_the_wrapper(recipe: ModuleType) -> None:
    """With matrix products, whose bits may depend on where they run."""
    nets = [_net().to(DEVICE) for _ in range(2)]
    batches = [(x.to(DEVICE), y.to(DEVICE)) for x, y in _batches(5)]
    expected = _by_the_wrapper(nets[0], batches)
    step = recipe.GraphedSAM(nets[1], F.cross_entropy, torch.optim.SGD(nets[1].parameters(), **SGD), 0.05, batches[0])
    step.capture()
    assert _by_the_recipe(nets[1], step, batches) == pytest.approx(expected, rel=1e-4)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(a.to(HOST), b.to(HOST), rtol=1e-3, atol=1e-5)


@pytest.mark.cuda
def test_the_script_trains_on_a_gpu(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    recipe._toy.show(recipe.train)
    before, after = (float(word) for word in capsys.readouterr().out.replace(",", "").split()[1:4:2])
    assert after < 0.5 * before
