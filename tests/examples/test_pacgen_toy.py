"""examples/pacgen/toy_surface.py: what it finds, against the network written down a second time in numpy."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import flatmin
from pacgen_examples import Stop, UsageError, _flags, _toy_problem, assert_picture, toy_surface

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- the toy surface ----


def numpy_loss(result: dict[str, Any], w: NDArray[np.float64]) -> float:
    """The network written down a second time, from what the JSON says of it."""
    settings = result["settings"]
    entries = np.empty(4)
    entries[settings["free"]] = w
    entries[[i for i in range(4) if i not in settings["free"]]] = settings["held"]
    matrix = entries.reshape(2, 2)
    hidden = np.array(result["x"]).T
    for _ in range(settings["layers"] - 1):
        hidden = 1.0 / (1.0 + np.exp(-(matrix @ hidden)))
    logits = matrix @ hidden
    right = logits[np.array(result["y"], int), np.arange(logits.shape[1])]
    return float((np.logaddexp(*logits) - right).mean())


def numpy_hessian(result: dict[str, Any], w: NDArray[np.float64], h: float = 1e-3) -> NDArray[np.float64]:
    """Central differences of the loss: errors of h^2 = 1e-6 times a fourth derivative, and 1e-16 / h^2 = 1e-10."""
    e = h * np.eye(2)
    f = [[numpy_loss(result, w + s * e[0] + t * e[1]) for t in (-1, 0, 1)] for s in (-1, 0, 1)]
    mixed = (f[2][2] - f[2][0] - f[0][2] + f[0][0]) / 4
    return np.array([[f[2][1] - 2 * f[1][1] + f[0][1], mixed], [mixed, f[1][2] - 2 * f[1][1] + f[1][0]]]) / h**2


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves, after its search was interrupted once and went on."""
    out = tmp_path_factory.mktemp("toy")
    made = toy_surface.make_problem
    asked = []

    def interrupted(seed: int, number: int) -> _toy_problem.Problem:
        asked.append(number)
        if len(asked) == 13:
            raise Stop
        return made(seed, number)

    args = toy_surface.parse_args(["--out", str(out), "--points", "7"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_surface, "make_problem", interrupted)
        with pytest.raises(Stop):
            toy_surface.run(args)
        assert json.loads((out / "search.json").read_text())["problems"] == 12
        toy_surface.run(args)
    result = json.loads((out / "toy.json").read_text())
    # 12 was asked for twice, every other problem once, and the one that was found again to be drawn
    found = result["search"]["found"]
    assert asked == [*range(13), *range(12, found + 1), found]
    assert result["search"]["problems"] == found + 1
    return out


@pytest.fixture(scope="module")
def toy_result(toy: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((toy / "toy.json").read_text())
    return result


def test_toy_has_a_sharp_optimum_of_larger_pacgen(toy_result: dict[str, Any]) -> None:
    sharp, flat = toy_result["sharp"], toy_result["flat"]
    assert sharp["psi"] > flat["psi"]
    assert sharp["loss"] < flat["loss"] < sharp["loss"] + 0.1
    assert sharp["eigenvalues"][1] > 2 * flat["eigenvalues"][1]
    assert max(sharp["pressure"]) > 1.0 >= max(flat["pressure"])


@pytest.mark.parametrize("name", ["sharp", "flat"])
def test_toy_minima_are_minima_with_these_hessians(toy_result: dict[str, Any], name: str) -> None:
    minimum = toy_result[name]
    w = np.array(minimum["w"])
    assert numpy_loss(toy_result, w) == pytest.approx(minimum["loss"], rel=1e-12)
    hessian = numpy_hessian(toy_result, w)
    # differences of 1e-3 err by 1e-6 times the fourth derivative, which is below 30 at the sharp minimum
    np.testing.assert_allclose(hessian, minimum["hessian"], atol=5e-5)
    assert np.linalg.eigvalsh(hessian)[0] > 0
    np.testing.assert_allclose(np.linalg.eigvalsh(minimum["hessian"]), minimum["eigenvalues"], atol=1e-12)
    # a minimum is lower than all around it: 0.01 away the loss rises by at least lambda_min 1e-4 / 2 = 2e-8
    around = [numpy_loss(toy_result, w + 0.01 * np.array([math.cos(a), math.sin(a)])) for a in np.arange(0, 6.3, 0.3)]
    assert min(around) > minimum["loss"]


def test_toy_sharp_minimum_is_the_global_one(toy_result: dict[str, Any]) -> None:
    """Of 4,000 random points of the plane none is lower."""
    w = np.random.default_rng(0).uniform(-toy_surface.REACH, toy_surface.REACH, (4000, 2))
    assert min(numpy_loss(toy_result, row) for row in w) >= toy_result["sharp"]["loss"]


@pytest.mark.parametrize("name", ["sharp", "flat"])
def test_toy_lipschitz_constant_bounds_the_change_of_the_hessian(toy_result: dict[str, Any], name: str) -> None:
    minimum = toy_result[name]
    w = np.array(minimum["w"])
    n = 0.1 * np.abs(w) + 0.1
    here = numpy_hessian(toy_result, w)
    quotients = []
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (0, 1), (-0.5, 0.25), (0.25, -0.75)):
        u = signs * n  # points of the script's grid, whose steps are N / 4
        change = np.linalg.norm(numpy_hessian(toy_result, w + u) - here, 2)
        quotients.append(change / np.linalg.norm(u))
    # numerical Hessians err by 5e-5 each
    assert 0 < max(quotients) <= minimum["lipschitz"] + 1e-4 / n.min()


@pytest.mark.parametrize("name", ["sharp", "flat"])
def test_toy_pacgen_is_the_formula(toy_result: dict[str, Any], name: str) -> None:
    """Psi = sum log((|w| + N) max(sqrt(c), 1 / N)), c = max(H_ii + rho N, 0), with N = 0.1 |w| + 0.1."""
    minimum = toy_result[name]
    psi = 0.0
    for w, h in zip(minimum["w"], np.diag(minimum["hessian"]), strict=True):
        n = 0.1 * abs(w) + 0.1
        c = max(h + minimum["lipschitz"] * n, 0.0)
        psi += math.log((abs(w) + n) * max(math.sqrt(c), 1 / n))
    assert minimum["psi"] == pytest.approx(psi, rel=1e-12)


class Toy(nn.Module):
    """The toy's network as a module of two parameters, for flatmin's own Hessian."""

    def __init__(self, result: dict[str, Any], w: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.settings = result["settings"]

    def forward(self, x: Tensor) -> Tensor:
        held = torch.tensor(self.settings["held"], dtype=torch.float64)
        rest = [i for i in range(4) if i not in self.settings["free"]]
        order = torch.tensor([*self.settings["free"], *rest]).argsort()
        matrix = torch.cat([self.w, held])[order].view(2, 2)
        for _ in range(self.settings["layers"] - 1):
            x = torch.sigmoid(x @ matrix.mT)
        return x @ matrix.mT


@pytest.mark.parametrize("name", ["sharp", "flat"])
def test_toy_agrees_with_pacgen_of_a_module(toy_result: dict[str, Any], name: str) -> None:
    minimum = toy_result[name]
    data = torch.tensor(toy_result["x"], dtype=torch.float64), torch.tensor(toy_result["y"]).long()
    found = flatmin.pacgen(
        Toy(toy_result, minimum["w"]),
        nn.functional.cross_entropy,
        data,
        curvature="exact",
        lipschitz=minimum["lipschitz"],
        progress=False,
    )
    assert found.psi == pytest.approx(minimum["psi"], rel=1e-10)


def test_toy_eta_minimises_the_lowest_point_of_the_bound(toy_result: dict[str, Any]) -> None:
    surface = toy_result["surface"]
    loss, psi, eta = np.array(surface["loss"]), np.array(surface["psi"]), toy_result["eta"]
    best = _toy_problem.bound(loss, psi, eta).min()
    for factor in (0.5, 0.8, 0.95, 1.05, 1.25, 2.0):
        assert _toy_problem.bound(loss, psi, factor * eta).min() > best


def test_toy_draws_again_without_a_search(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(toy / "toy.json", tmp_path)
    monkeypatch.setattr(toy_surface, "search", None)
    toy_surface.run(toy_surface.parse_args(["--out", str(tmp_path), "--plot-only"]))
    for name in ("surface.png", "bound.png", "labels.png"):
        assert_picture(tmp_path / name)


def test_toy_fails_where_pacgen_is_not_larger(
    toy_result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharp, flat = toy_result["sharp"], toy_result["flat"]
    turned = toy_result | {"sharp": sharp | {"psi": flat["psi"]}, "flat": flat | {"psi": sharp["psi"]}}
    (tmp_path / "toy.json").write_text(json.dumps(turned))
    for name in ("plot_surface", "plot_bound", "plot_labels"):
        monkeypatch.setattr(toy_surface, name, lambda *_: None)
    args = toy_surface.parse_args(["--out", str(tmp_path), "--plot-only"])
    with pytest.raises(SystemExit, match=r"sharp minimum.*not above"):
        _flags.main(lambda: toy_surface.run(args))


def test_toy_says_so_if_there_is_no_pair(tmp_path: Path) -> None:
    args = toy_surface.parse_args(["--out", str(tmp_path), "--limit", "1"])
    with pytest.raises(UsageError, match="no pair of minima among 1 problems"):
        toy_surface.run(args)
