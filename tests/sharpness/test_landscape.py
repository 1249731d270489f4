"""flatmin.sharpness.line and plane: values, directions, BatchNorm, continued files, figures."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatmin.sharpness import Landscape, filter_normalised, line, plane
from models import batches, raw, same_bits, small_net, weights
from sharpness_problems import Quadratic, mean_output, nothing

pytestmark = pytest.mark.usefixtures("one_thread")


def normed_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 3)]
    return nn.Sequential(*layers)


def test_golden_filter_normalisation() -> None:
    w, d = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [2.0, 2.0]])
    found, bias = filter_normalised([d, torch.ones(3)], [w, torch.ones(3)])
    assert torch.allclose(found, torch.tensor([[5.0, 0.0], [0.70710678, 0.70710678]]), rtol=1e-7)
    assert torch.equal(bias, torch.zeros(3))


def test_line_between_solutions_is_that_of_their_losses() -> None:
    net, other, data = small_net(torch.float64), small_net(torch.float64, seed=5), batches(3, torch.float64)
    for to in (other.state_dict(), [p.detach() for p in other.parameters()]):
        found = line(net, F.cross_entropy, data, to, points=5)
        assert found.axes == ((-0.5, 0.0, 0.5, 1.0, 1.5),)
        accuracy = found.accuracy
        assert accuracy is not None
        for i, a in enumerate(found.axes[0]):
            here = copy.deepcopy(net)
            with torch.no_grad():
                for p, q in zip(here.parameters(), other.parameters(), strict=True):
                    p.lerp_(q, a)
                outputs = [(here(x), y) for x, y in data]
                loss = sum(float(F.cross_entropy(z, y)) for z, y in outputs) / 3
                right = sum(int((z.argmax(1) == y).sum()) for z, y in outputs) / 24
            assert float(found.loss[i]) == pytest.approx(loss, rel=1e-12)
            assert float(accuracy[i]) == right


def test_plane_of_given_directions_on_a_quadratic() -> None:
    """Along its eigenvectors: ``(a_1 (w_1 + x)^2 + a_2 (w_2 + y)^2) / 2``; no classes, so no accuracy."""
    net = Quadratic([2.0, 6.0], [0.1, -0.2])
    one, two = torch.eye(2, dtype=torch.float64)
    found = plane(net, mean_output, nothing(), ([one], [two]), points=(3, 4), extent=((-1.0, 1.0), (0.0, 3.0)))
    x, y = (torch.tensor(axis, dtype=torch.float64) for axis in found.axes)
    assert found.shape == (3, 4)
    assert torch.allclose(found.loss, (0.1 + x[:, None]) ** 2 + 3.0 * (y - 0.2) ** 2, rtol=1e-12)
    assert found.accuracy is None


def test_random_directions_have_the_size_of_the_filters() -> None:
    """Rows of one weight matrix: the losses are those at w + a d with d written out."""
    net, data = small_net(torch.float64), batches(1, torch.float64)
    found = plane(net, F.cross_entropy, data, points=3, extent=(-0.5, 0.5))
    again = plane(net, F.cross_entropy, data, points=3, extent=(-0.5, 0.5))
    other = plane(net, F.cross_entropy, data, points=3, extent=(-0.5, 0.5), seed=1)
    assert torch.equal(found.loss, again.loss)
    assert not torch.equal(found.loss, other.loss)
    middle = float(F.cross_entropy(net(data[0][0]), data[0][1]).detach())
    assert float(found.loss[1, 1]) == pytest.approx(middle, rel=1e-12)
    assert found.loss.flatten().unique().numel() == 9


def test_plane_through_three_solutions() -> None:
    net = Quadratic([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    points = [torch.tensor([3.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 0.0])]
    solutions = [[p.double()] for p in points]
    found = plane(net, mean_output, nothing(), solutions=(solutions[0], solutions[1]), points=(5, 6))
    assert found.marks == {"weights": (0.0, 0.0), "solution 1": (3.0, 0.0), "solution 2": (1.0, 2.0)}
    assert found.axes[0][0] == pytest.approx(-0.6)
    assert found.axes[1][-1] == pytest.approx(2.4)
    x, y = (torch.tensor(axis, dtype=torch.float64) for axis in found.axes)
    assert torch.allclose(found.loss, 0.5 * (x[:, None] ** 2 + y**2))  # the axes are orthonormal
    with pytest.raises(ValueError, match="on one line"):
        plane(net, mean_output, nothing(), solutions=(solutions[0], [2.0 * solutions[0][0]]))


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_batch_norm(mode: str) -> None:
    """Against a copy at the other solution: with its running statistics of before, or with those of the data."""
    net, other = normed_net(), normed_net(1)
    data = [*batches(2), (batches(1)[0][0][:3], batches(1)[0][1][:3])]
    net.eval()
    net[2].running_mean.fill_(0.3)
    found = line(net, F.cross_entropy, data, other.state_dict(), points=2, extent=(0.0, 1.0), batch_norm=mode)
    here = copy.deepcopy(other).eval()
    if mode == "keep":
        here[2].load_state_dict(net[2].state_dict())
        here[2].weight.data, here[2].bias.data = other[2].weight.data, other[2].bias.data
    else:
        inner = [here[1](x.flatten(1)) for x, _ in data]
        means, variances = [z.mean(0) for z in inner], [z.var(0) for z in inner]
        sizes = torch.tensor([8.0, 8.0, 3.0])[:, None] / 19.0
        here[2].running_mean = (sizes * torch.stack(means)).sum(0).detach()
        here[2].running_var = (sizes * torch.stack(variances)).sum(0).detach()
    with torch.no_grad():
        loss = sum(float(F.cross_entropy(here(x), y)) * len(y) for x, y in data) / 19.0
    assert float(found.loss[1]) == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("batch_norm", ["keep", "recompute"])
@pytest.mark.parametrize("fails", [False, True])
def test_model_is_as_it_was(fails: bool, batch_norm: str) -> None:
    net = normed_net()
    net[5].weight.requires_grad_(False)
    before = {name: raw(t).clone() for name, t in net.state_dict().items()}
    momentum, random, calls = net[2].momentum, torch.get_rng_state(), []

    def loss_fn(outputs: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        if fails and len(calls) == 8:
            raise KeyboardInterrupt
        return F.cross_entropy(outputs, y)

    try:
        plane(net, loss_fn, batches(2), points=3, batch_norm=batch_norm)
    except KeyboardInterrupt:
        assert fails
    assert len(calls) == (8 if fails else 18 * (1 if batch_norm == "keep" else 2))
    assert all(torch.equal(raw(t), before[name]) for name, t in net.state_dict().items())
    assert net.training
    assert net[2].training
    assert net[2].momentum == momentum
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in net.parameters())


def test_interrupted_grid_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "plane.json"
    net, calls = small_net(), []

    def loss_fn(outputs: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return F.cross_entropy(outputs, y)

    with pytest.raises(KeyboardInterrupt):
        plane(net, loss_fn, batches(1), points=3, path=path)
    part = Landscape.load(path)
    assert [v is not None for v in part.values] == [True] * 5 + [False] * 4
    assert part.loss.isnan().sum() == 4
    found = plane(net, loss_fn, batches(1), points=3, path=path)
    assert len(calls) == 6 + 4
    whole = plane(net, F.cross_entropy, batches(1), points=3)
    assert torch.equal(found.loss, whole.loss)
    stored = Landscape.load(path)
    assert (stored.values, stored.axes, stored.labels, stored.marks) == (
        whole.values,
        whole.axes,
        whole.labels,
        whole.marks,
    )
    for change, what in (
        ({"points": 4}, "axes"),
        ({"seed": 1}, "directions"),
        ({"batch_norm": "recompute"}, "batch_n"),
    ):
        with pytest.raises(ValueError, match=f"^path: .*{what}"):
            plane(net, F.cross_entropy, batches(1), path=path, **({"points": 3} | change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights or directions"):
        plane(small_net(seed=2), F.cross_entropy, batches(1), points=3, path=path)
    assert Landscape.load(path).values == whole.values  # a refusal writes nothing


def test_other_files_are_refused(tmp_path: Path) -> None:
    for text in ("[1]", "{}", "no json", '{"format": "flatmin landscape 1"}'):
        path = tmp_path / "other.json"
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no landscape"):
            line(small_net(), F.cross_entropy, batches(1), path=path)
        assert path.read_text() == text


def test_16_bit_weights() -> None:
    net = small_net(torch.bfloat16)
    before = weights(net)
    found = plane(net, F.cross_entropy, batches(1, torch.bfloat16), points=2)
    assert found.loss.isfinite().all()
    assert same_bits(weights(net), before)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda net: line(net, F.cross_entropy, batches(1), points=1), "points"),
        (lambda net: plane(net, F.cross_entropy, batches(1), points=(2, 2, 2)), "points"),
        (lambda net: line(net, F.cross_entropy, batches(1), extent=(1.0, 0.0)), "extent"),
        (lambda net: line(net, F.cross_entropy, batches(1), batch_norm="eval"), "batch_norm"),
        (lambda net: line(net, F.cross_entropy, batches(1), {"0.weight": torch.zeros(1)}), "to: no entry '0.bias'"),
        (lambda net: line(net, F.cross_entropy, batches(1), [torch.zeros(1)] * 6), "to: item 0"),
        (lambda net: line(net, F.cross_entropy, batches(1), weights(net), direction=weights(net)), "to and direction"),
        (lambda net: plane(net, F.cross_entropy, batches(1), (weights(net),)), "directions"),
    ],
)
def test_bad_arguments_are_named(call: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}"):
        call(small_net())


# ---- figures ----


def labels_of(axis: Any) -> tuple[str, str]:
    return axis.get_xlabel(), axis.get_ylabel()


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    net, other = small_net(), small_net(seed=5)
    found = line(net, F.cross_entropy, batches(1), other.state_dict(), points=5)
    left, right = found.plot(tmp_path / "line.png").axes
    assert labels_of(left) == ("a, with weights w + a (w' - w)", "loss / units of loss_fn")
    assert right.get_ylabel() == "accuracy / %"
    assert left.lines[0].get_ydata().tolist() == found.loss.tolist()
    assert [text.get_text() for text in left.texts] == ["weights", "to"]
    over = plane(net, F.cross_entropy, batches(1), points=4)
    loss, accuracy, bar, second = over.plot(tmp_path / "contour.png").axes
    assert labels_of(loss) == ("a, with weights w + a d1 + b d2", "b; d1, d2 filter-normalised")
    assert labels_of(accuracy) == labels_of(loss)
    assert (bar.get_ylabel(), second.get_ylabel()) == ("loss / units of loss_fn", "accuracy / %")
    surface, bar = over.plot(tmp_path / "surface.png", kind="surface").axes
    assert surface.get_zlabel() == bar.get_ylabel() == "loss / units of loss_fn"
    assert over.plot(kind="surface", log=True).axes[0].get_zlabel() == r"$\log_{10}$ (loss / units of loss_fn)"
    assert over.plot(log=True).axes[0].get_title() == "Loss over a plane"
    assert {p.name for p in tmp_path.iterdir()} == {"line.png", "contour.png", "surface.png"}
    with pytest.raises(ValueError, match=r"^kind"):
        over.plot(kind="heat")


def test_figures_of_parts_and_of_nothing() -> None:
    pytest.importorskip("matplotlib")
    part = Landscape(
        ((0.0, 1.0, 2.0), (0.0, 1.0)), ("a", "b"), [(1.0, None)] * 4 + [None, (float("inf"), None)], {}, "keep", ""
    )
    assert len(part.plot().axes) == 2  # flat, and without two points
    part.plot(kind="surface")
    with pytest.raises(ValueError, match="finite"):
        Landscape(((0.0, 1.0),), ("a",), [None, None], {}, "keep", "").plot()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        Landscape(((0.0, 1.0),), ("a",), [(1.0, None)] * 2, {}, "keep", "").plot()


def test_a_path_that_cannot_be_written_is_refused_before_anything_is_evaluated(tmp_path: Path) -> None:
    calls = 0

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(outputs, targets)

    with pytest.raises(ValueError, match=r"path: .*x\.json lies in no folder that exists; make the folder first"):
        line(small_net(), loss_fn, batches(1), path=tmp_path / "missing" / "x.json")
    with pytest.raises(ValueError, match=r"path: .* holds no landscape"):
        line(small_net(), loss_fn, batches(1), path=tmp_path)
    assert calls == 0


def test_a_file_with_too_few_values_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    found = line(small_net(), F.cross_entropy, batches(1), points=3, path=path)
    found.values.pop()
    found.save(path)
    with pytest.raises(ValueError, match=r"path: .* holds no landscape"):
        line(small_net(), F.cross_entropy, batches(1), points=3, path=path)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_statistics_of_a_scripted_model_cannot_be_recomputed() -> None:
    """Its BatchNorm is none of torch's classes: it was left as it was, and the result called recomputed."""
    net = torch.jit.script(normed_net().eval())
    with pytest.raises(ValueError, match="batch_norm: 'recompute' given, but '2' is scripted"):
        line(net, F.cross_entropy, batches(1), points=2, batch_norm="recompute")
