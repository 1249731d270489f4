"""flatmin.report and compare: the numbers are those of the single measures, within a budget, side by side, drawn."""

from __future__ import annotations

import gc
import json
import math
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatmin
from flatmin import curvature
from flatmin.curvature._measurement import Measurement
from flatmin.sharpness import Report, compare, expected_sharpness, m_sharpness, pacgen, report
from flatmin.sharpness._plan import FULL, LEAST, groups_within, planned
from models import raw
from sharpness_problems import Quadratic, mean_output, nothing, relu_data, relu_net

pytestmark = pytest.mark.usefixtures("one_thread")


def parts(n: int, size: int) -> list[tuple[Tensor, Tensor]]:
    x, y = relu_data(n)
    return list(zip(x.split(size), y.split(size), strict=True))


def held_out() -> tuple[Tensor, Tensor]:
    x, y = relu_data(40)
    return x[24:], y[24:]


@pytest.fixture(scope="module")
def found() -> Report:
    torch.set_num_threads(1)
    return report(relu_net(), F.cross_entropy, parts(24, 10), held_out(), m=(1, 4, None, 512))


@pytest.fixture(scope="module")
def other(found: Report) -> Report:
    """The same function, scaled."""
    return report(relu_net(3.0), F.cross_entropy, parts(24, 10), held_out(), m=(1, 4, None), like=found)


def test_fit_and_norms(found: Report) -> None:
    net, (x, y) = relu_net(), relu_data(24)
    for name, (inputs, targets) in (("train", (x, y)), ("test", held_out())):
        loss = F.cross_entropy(net(inputs), targets)
        assert found[f"{name}_loss"].value == pytest.approx(float(loss.detach()), rel=1e-12)
        right = (net(inputs).argmax(1) == targets).double().mean()
        assert found[f"{name}_accuracy"].value == pytest.approx(float(right), rel=1e-12)
    assert found["loss_gap"].value == found["test_loss"].value - found["train_loss"].value
    assert found["accuracy_gap"].value == found["train_accuracy"].value - found["test_accuracy"].value
    params = list(net.parameters())
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), params)
    for key, tensors in (("weight_norm", params), ("gradient_norm", grads)):
        norm = float(torch.cat([t.detach().flatten() for t in tensors]).norm())
        assert found[key].value == pytest.approx(norm, rel=1e-12)


def test_rows_are_those_of_the_single_measures(found: Report) -> None:
    net, data = relu_net(), parts(24, 10)
    top = curvature.eigenvalues(net, F.cross_entropy, data, k=5)
    assert found["lambda_1"].value == pytest.approx(top.lambda_1, rel=1e-6)
    assert found["lambda_1_over_lambda_5"].value == pytest.approx(top.lambda_1_over_lambda_5, rel=1e-4)
    density = curvature.spectral_density(net, F.cross_entropy, data, probes=5, steps=30)
    trace = density.trace_of(lambda x: x)
    assert (found["trace"].value, found["trace"].error) == (trace.value, trace.stderr)
    for m in (1, 4):
        single = m_sharpness(net, F.cross_entropy, data, 0.05, m)
        row = found[f"m_sharpness_{m}"]
        assert (row.value, row.error) == (single.value, single.stderr)
        assert found.m_sharpness[m].sizes == (m,) * (24 // m)
    everything = found["m_sharpness_all"]
    assert (everything.value, everything.error) == (m_sharpness(net, F.cross_entropy, data, 0.05).value, None)
    assert "m_sharpness_512" not in found
    noise = expected_sharpness(net, F.cross_entropy, data, scale=0.01, samples=10, antithetic=True)
    assert (found["expected_sharpness"].value, found["expected_sharpness"].error) == (noise.value, noise.stderr)
    bound = pacgen(net, F.cross_entropy, data, curvature_samples=20)
    assert (found["psi"].value, found["bound_uniform"].value) == (bound.psi, bound.bound_uniform)
    with pytest.raises(KeyError, match="the rows are train_loss"):
        found["lambda_2"]


def test_table_and_json(found: Report) -> None:
    text = str(found)
    for row in found:
        line = next(line for line in text.splitlines() if line.startswith(row.label + " "))
        assert row.unit in line
        assert row.note in line
    assert "samples for curvature and sharpness: 24" in text
    stored = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert stored["rows"]["lambda_1"]["value"] == found["lambda_1"].value
    assert stored["rows"]["train_accuracy"]["error"] is None
    assert stored["m_sharpness"][1]["per_group"] == list(found.m_sharpness[4].per_group)
    assert stored["pacgen"]["psi"] == found["psi"].value
    assert stored["settings"]["seed"] == 0
    assert len(stored["density"]["nodes"]) == 5


def test_without_test_data_and_classes() -> None:
    """Rows that have no meaning are left out; a matrix of two rows has no lambda_5."""
    found = report(Quadratic([1.0, 4.0], [0.2, 0.1]), mean_output, nothing(8), m=(2,))
    keys = {row.key for row in found}
    assert not keys & {"train_accuracy", "test_loss", "loss_gap", "lambda_1_over_lambda_5"}
    assert found["lambda_1"].value == pytest.approx(4.0)
    assert found["trace"].value == pytest.approx(5.0)
    assert len(found.plot().axes) == 6


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3)
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


@pytest.mark.parametrize("budget_s", [None, 1e-3])
def test_model_is_as_it_was(budget_s: float | None) -> None:
    net = Dropout()
    before = {name: raw(t).clone() for name, t in net.state_dict().items()}
    random = torch.get_rng_state()
    report(net, F.cross_entropy, parts(24, 12), m=(6,), budget_s=budget_s)
    assert all(torch.equal(raw(t), before[name]) for name, t in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_also_after_an_exception(kind: type[BaseException]) -> None:
    """Stopped early and late, so that it falls into several of the measures, with the weights away in some."""
    net = Dropout()
    calls, at = [0], 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == at:
            raise kind("stop")
        return F.cross_entropy(outputs, targets)

    def run() -> None:
        calls[0] = 0
        amounts = {"products": 6, "probes": 1, "steps": 3, "pairs": 1, "curvature_samples": 1, "noise_samples": 1}
        report(net, loss, parts(12, 6), m=(6,), amounts=amounts)

    run()
    before = {name: raw(t).clone() for name, t in net.state_dict().items()}
    random, last = torch.get_rng_state(), calls[0]
    for at in range(2, last, max(1, last // 12)):
        with pytest.raises(kind, match="stop"):
            run()
        assert all(torch.equal(raw(t), before[name]) for name, t in net.state_dict().items()), at
        assert all(p.grad is None and p.requires_grad for p in net.parameters())
        assert torch.equal(torch.get_rng_state(), random)


def test_nothing_outlives_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """No measurement, which holds the model and copies of its weights, is alive afterwards, without a collection."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    plain = Measurement.__init__

    def init(self: Measurement, *args: Any, **options: Any) -> None:
        plain(self, *args, **options)
        alive.add(self)
        seen.append(1)

    seen: list[int] = []
    monkeypatch.setattr(Measurement, "__init__", init)
    net = relu_net()
    gc.collect()
    gc.disable()
    try:
        kept = report(net, F.cross_entropy, parts(12, 6), held_out(), m=(6,), amounts={"products": 6, "probes": 1})
        assert not alive
        outside = weakref.ref(net)
        del net
        assert outside() is None, "the report holds the model"
    finally:
        gc.enable()
    assert len(seen) > 5
    assert kept["lambda_1"].value > 0.0


def test_bfloat16_parameters() -> None:
    """Against the same weights in float32, within the coarseness of 8 bits; the weights come back to the bit."""
    net = relu_net().to(torch.bfloat16)
    before = [raw(p).clone() for p in net.parameters()]
    x, y = relu_data(24)
    amounts = {"products": 30, "probes": 2, "steps": 10, "pairs": 3, "curvature_samples": 4}
    coarse = report(net, F.cross_entropy, (x.to(torch.bfloat16), y), m=(4,), amounts=amounts)
    assert all(torch.equal(raw(p), b) for p, b in zip(net.parameters(), before, strict=True))
    fine = report(net.float(), F.cross_entropy, (x.float(), y), m=(4,), amounts=amounts)
    for key in ("train_loss", "weight_norm", "gradient_norm", "lambda_1", "trace", "m_sharpness_4"):
        assert coarse[key].value == pytest.approx(fine[key].value, rel=0.1), key


# ---- budgets ----


def test_a_budget_is_kept_and_used() -> None:
    product = 1e-5
    for seconds in (3.0, 10.0, 100.0, 1000.0):
        plan, used = planned(seconds, product, 50_000)
        assert plan.cost() * used * product <= 0.7 * seconds
        assert used == 50_000 or plan[:-1] == LEAST[:-1]
    assert planned(1e6, product, 50_000) == (FULL._replace(seconds_for_groups=2e5), 50_000)
    numbers = [planned(s, product, 50_000) for s in (1.0, 30.0, 60.0, 90.0, 120.0)]
    assert all(a[1] <= b[1] and all(x <= y for x, y in zip(a[0], b[0], strict=True)) for a, b in pairwise(numbers))
    assert numbers[1] != numbers[3]
    plan, used = planned(-5.0, product, 50_000)  # nothing is left: the least that means anything
    assert (plan[:-1], used) == (LEAST[:-1], 64)
    assert planned(0.0, product, 10)[1] == 10
    assert [groups_within(s, 0.1) for s in (0.0, 1.0, 1e9, math.inf)] == [2, 10, 64, 64]


@pytest.mark.parametrize("forward", [False, True])
def test_a_small_budget_measures_the_first_samples(forward: bool) -> None:
    data: Any = parts(200, 50)
    if forward:
        batches = [{"x": x, "y": y} for x, y in data]
        data = curvature.Batches(batches, forward=lambda model, batch: (model(batch["x"]), batch["y"]))
    found = report(relu_net(), F.cross_entropy, data, m=(8, 128), budget_s=1e-6)
    assert found.samples == 64
    assert found.settings["training samples"] == 200
    assert found.plan[:-1] == LEAST[:-1]
    assert found.settings["density"] == f"{LEAST.probes} probes of {LEAST.steps} steps"
    assert found.m_sharpness.keys() == {8}
    x, y = relu_data(200)
    single = m_sharpness(relu_net(), F.cross_entropy, (x[:64], y[:64]), 0.05, 8, max_groups=2)
    assert found["m_sharpness_8"].value == pytest.approx(single.value, rel=1e-10)
    assert found["psi"].value == pytest.approx(
        pacgen(relu_net(), F.cross_entropy, (x[:64], y[:64]), curvature_samples=LEAST.curvature_samples).psi, rel=1e-6
    )
    again = report(relu_net(2.0), F.cross_entropy, data, m=(8,), like=found)
    assert compare(found, again).differences == {}


def test_amounts_are_those_given() -> None:
    amounts = {"samples": 60, "products": 30, "probes": 2, "steps": 10, "pairs": 3, "curvature_samples": 4, "groups": 5}
    found = report(relu_net(), F.cross_entropy, parts(200, 50), m=(8, 100), amounts=amounts)
    assert found.samples == 60 and found.settings["training samples"] == 200
    assert found.plan == FULL._replace(**{k: n for k, n in amounts.items() if k not in ("samples", "groups")})
    assert found.m_sharpness.keys() == {8} and found.m_sharpness[8].sizes == (8,) * 5
    assert len(found.density.nodes) == 2 and len(found.density.nodes[0]) <= 10
    x, y = relu_data(200)
    first = curvature.eigenvalues(relu_net(), F.cross_entropy, (x[:60], y[:60]), k=5)
    assert found["lambda_1"].value == pytest.approx(first.lambda_1, rel=1e-6)
    again = report(relu_net(), F.cross_entropy, parts(200, 50), m=(8, 100), like=found)
    assert compare(found, again).differences == {}
    assert [row.value for row in again] == [row.value for row in found]
    # of all samples, the groups alone bounded
    assert report(relu_net(), F.cross_entropy, parts(24, 10), m=(8,), amounts={"groups": 2}).m_sharpness[8].sizes == (
        8,
        8,
    )


# ---- side by side ----


def test_comparison(found: Report, other: Report) -> None:
    sides = flatmin.compare(found, other, names=("plain", "scaled"))
    assert sides.differences == {}
    assert [x.key for x, _ in sides.rows] == [row.key for row in found]
    by_key = {x.key: (x, y) for x, y in sides.rows}
    assert by_key["lambda_1"][1].value == other["lambda_1"].value
    assert by_key["train_loss"][0].value == pytest.approx(by_key["train_loss"][1].value, rel=1e-12)
    rises = torch.tensor(other.m_sharpness[1].per_group) - torch.tensor(found.m_sharpness[1].per_group)
    paired = float(rises.mean() / (rises.std() / len(rises) ** 0.5))
    assert sides.apart("m_sharpness_1") == pytest.approx(paired, rel=1e-4)
    trace = other["trace"].value - found["trace"].value
    error = math.hypot(found["trace"].error or 0.0, other["trace"].error or 0.0)
    assert sides.apart("trace") == pytest.approx(trace / error)
    assert sides.apart("train_loss") is None
    assert sides.apart("lambda_1") is None  # a residual is no standard error
    lines = str(sides).splitlines()
    assert "plain" in lines[0]
    assert "scaled / plain" in lines[0]
    stored = json.loads(json.dumps(sides.as_dict(), allow_nan=False))
    assert stored["rows"]["trace"]["ratio"] == other["trace"].value / found["trace"].value
    figure = sides.plot()
    ratios, density, groups = figure.axes
    assert ratios.get_xlabel() == "ratio scaled / plain"
    assert density.get_xlabel() == "eigenvalue / (loss / weight$^2$)"
    assert [t.get_text() for t in groups.get_legend().get_texts()] == ["plain", "scaled"]


def test_differences_are_said(found: Report) -> None:
    changed = Report(**{**vars(found), "settings": found.settings | {"rho": 0.1}})
    assert "measured differently: rho 0.05 (a), 0.1 (b)" in str(compare(found, changed))


def test_figure(found: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = found.plot(tmp_path / "report.png")
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "loss / units of loss_fn",
        "eigenvalue / (loss / weight$^2$)",
        "density / (weight$^2$ / loss)",
        "rise of the loss / units of loss_fn",
        "mean rise of the loss / units of loss_fn",
        "bound / units of the loss",
    ]
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert heights == list(found.eigenvalues.values)
    assert figure.axes[3].lines[0].get_xdata().tolist() == [1, 4, 24]
    assert (tmp_path / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"budget_s": 0.0}, "budget_s"),
        ({"budget_s": "1"}, "budget_s"),
        ({"m": (0,)}, "m:"),
        ({"m": 4}, "m:"),
        ({"rho": -1.0}, "rho"),
        ({"scale": math.nan}, "scale"),
        ({"adaptive": "layer"}, "adaptive"),
        ({"method": "exact"}, "method"),
        ({"seed": -1}, "seed"),
        ({"like": 3}, "like"),
        ({"amounts": 60}, "amounts"),
        ({"amounts": {"draws": 3}}, "amounts: 'draws' is none; there are samples, products"),
        ({"amounts": {"probes": 0}}, "amounts: probes"),
        ({"amounts": {"probes": 2}, "budget_s": 1.0}, "amounts"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{named}"):
        report(relu_net(), F.cross_entropy, relu_data(), **options)


def test_only_reports_are_compared(found: Report) -> None:
    with pytest.raises(TypeError, match=r"^b: a dict"):
        compare(found, found.as_dict())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^budget_s and like"):
        report(relu_net(), F.cross_entropy, relu_data(), budget_s=1.0, like=found)


def test_infinite_numbers_are_printed_drawn_and_left_out_of_json(tmp_path: Path) -> None:
    """A loss without curvature: lambda_1 / lambda_5 is infinite."""
    net = nn.Linear(5, 3).double()
    amounts = {"products": 10, "probes": 2, "steps": 3, "pairs": 2, "curvature_samples": 2, "noise_samples": 2}
    found = report(net, mean_output, relu_data(8), m=(4,), amounts=amounts)
    assert found["lambda_1_over_lambda_5"].value == math.inf
    assert "lambda_1 / lambda_5" in str(found)
    assert " inf" in str(found)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["rows"]["lambda_1_over_lambda_5"]["value"] is None
    both = compare(found, found)
    assert " inf" in str(both)
    json.dumps(both.as_dict(), allow_nan=False)
    found.plot(tmp_path / "report.png")
    both.plot(tmp_path / "compare.png")
