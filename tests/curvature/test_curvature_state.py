"""What measuring leaves behind: nothing. Forms of data, several devices, progress."""

from __future__ import annotations

import copy
import gc
import io
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from flatmin import curvature, ops
from flatmin.curvature._measurement import Measurement, Part
from models import Batch, batches, same_bits, small_net
from snapshots import assert_as_before, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")


def stateful_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """With all that a forward pass can change: dropout draws, BatchNorm counts, and one module is frozen."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 3)]
    net = nn.Sequential(*layers).to(dtype)
    net[5].bias.requires_grad_(False)
    net[1].weight.grad = torch.full_like(net[1].weight, 0.5)
    return net


def ones(net: nn.Module) -> list[Tensor]:
    return [torch.ones_like(p) for p in net.parameters() if p.requires_grad]


MEASURES: dict[str, Callable[[nn.Module, Any, Any], Any]] = {
    "hvp": lambda net, loss, data: curvature.hvp(net, loss, data, ones(net)),
    "hvp, difference": lambda net, loss, data: curvature.hvp(net, loss, data, ones(net), method="finite_difference"),
    "hutchinson": lambda net, loss, data: curvature.hutchinson_diag(net, loss, data, samples=2),
    "hutchinson, difference": lambda net, loss, data: curvature.hutchinson_diag(
        net, loss, data, samples=2, method="finite_difference"
    ),
    "hutchinson, normal": lambda net, loss, data: curvature.hutchinson_diag(
        net, loss, data, samples=1, distribution="normal"
    ),
    "trace": lambda net, loss, data: curvature.hutchinson_trace(net, loss, data, samples=2),
    "squared gradient": curvature.squared_gradient_diag,
    "exact": lambda net, loss, data: curvature.exact_diag(net, loss, data, params=[net[5].weight]),
    "lipschitz": lambda net, loss, data: curvature.lipschitz(net, loss, data, curvature_samples=1),
    "sharpness": lambda net, loss, data: curvature.expected_sharpness(net, loss, data, scale=0.1, samples=2),
    "antithetic": lambda net, loss, data: curvature.expected_sharpness(
        net, loss, data, scale=0.1, samples=1, antithetic=True
    ),
    "pacgen": lambda net, loss, data: flatmin.pacgen(net, loss, data, curvature_samples=1, noise_samples=1),
}
GNB = {"gnb": lambda net, loss, data: curvature.gnb_diag(net, loss, data, samples=2)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("measure", [*MEASURES.values(), *GNB.values()], ids=[*MEASURES, *GNB])
def test_everything_is_left_as_it_was(measure: Callable[..., Any], training: bool) -> None:
    net = stateful_net().train(training)
    net[3].train(not training)  # a module in a mode of its own
    before = snapshot(net)
    measure(net, F.cross_entropy, batches(2))
    assert_as_before(net, before)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_also_after_an_exception(measure: Callable[..., Any], call: int) -> None:
    """Wherever it comes: at the weights themselves, or while they are moved."""
    net, calls = stateful_net(), 0
    before = snapshot(net)

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return F.cross_entropy(output, targets)

    try:
        measure(net, loss_fn, batches(1))
    except KeyboardInterrupt:
        assert calls == call
    else:
        assert calls < call
    assert_as_before(net, before)


def test_a_loss_may_be_measured_without_gradients_and_before_a_backward_pass() -> None:
    """Within no_grad and inference_mode too; and a graph of the caller's survives what does not move the weights."""
    net, data = stateful_net().eval(), batches(2)
    expected = curvature.hutchinson_trace(net, F.cross_entropy, data, samples=2)
    loss = F.cross_entropy(net(data[0][0]), data[0][1])
    with torch.no_grad():
        assert curvature.hutchinson_trace(net, F.cross_entropy, data, samples=2) == expected
    with torch.inference_mode():
        assert curvature.hutchinson_trace(net, F.cross_entropy, data, samples=2) == expected
    loss.backward()


# ---- one function of the weights ----


@pytest.mark.parametrize("training", [True, False])
def test_every_pass_sees_the_same_dropout_masks_and_statistics(training: bool) -> None:
    """Otherwise the two gradients of a difference would be those of two functions, 1 / step apart."""
    net, data = stateful_net(torch.float64).train(training), batches(2, torch.float64)
    v = [0.1 * t for t in ones(net)]
    exact = curvature.hvp(net, F.cross_entropy, data, v)
    found = curvature.hvp(net, F.cross_entropy, data, v, method="finite_difference")
    # truncation is step^2 < 1e-8 times a third derivative of order 1
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(exact, found, strict=True))
    torch.manual_seed(1)
    other = curvature.hvp(net, F.cross_entropy, data, v)
    assert same_bits(exact, other) == (not training)


@pytest.mark.parametrize("in_place", [True, False])
def test_models_with_state_of_their_own_start_every_pass_from_the_same(in_place: bool) -> None:
    """A buffer that every forward pass halves, and that the output depends on."""

    class Fading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = stateful_net(torch.float64)
            self.register_buffer("scale", torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            output = self.inner(x) * self.scale.clone()
            if in_place:
                self.scale.mul_(0.5)
            else:
                self.scale = self.scale * 0.5
            return output

    net, data = Fading(), batches(2, torch.float64)
    buffer, v = net.scale, [0.1 * t for t in ones(net)]
    pair = [curvature.hvp(net, F.cross_entropy, data, v, method=m) for m in ("autograd", "finite_difference")]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*pair, strict=True))
    assert net.scale is buffer
    assert float(buffer) == 1.0


@pytest.mark.parametrize("own", [False, True])
def test_a_shuffling_loader_gives_every_pass_the_same_order(own: bool) -> None:
    """In training mode BatchNorm makes the loss a function of which samples share a batch."""
    (x, y), net = batches(1, torch.float64)[0], stateful_net(torch.float64)
    generator = torch.Generator().manual_seed(4) if own else None
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=generator)
    before = (generator.get_state() if generator else torch.get_rng_state()).clone()
    v = [0.1 * t for t in ones(net)]
    pair = [curvature.hvp(net, F.cross_entropy, loader, v, method=m) for m in ("autograd", "finite_difference")]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*pair, strict=True))
    assert torch.equal(before, generator.get_state() if generator else torch.get_rng_state())


@pytest.mark.parametrize("measure", [*MEASURES.values(), *GNB.values()], ids=[*MEASURES, *GNB])
def test_no_graph_outlives_its_batch(measure: Callable[..., Any]) -> None:
    """At each forward pass all that earlier ones kept for their backward pass is gone, without a garbage collector."""

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()  # with its graph, which may keep it, it would be a cycle
            kept.add(self)

    class Watched(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            alive.append(len(kept))
            with torch.autograd.graph.saved_tensors_hooks(Kept, lambda held: held.tensor):
                output: Tensor = super().forward(x)
            largest.append(len(kept))
            return output

    kept: weakref.WeakSet[Any] = weakref.WeakSet()
    alive: list[int] = []
    largest: list[int] = []
    net = Watched(*stateful_net())
    gc.collect()
    gc.disable()
    try:
        measure(net, F.cross_entropy, batches(2))
    finally:
        gc.enable()
    assert len(alive) > 1
    assert not any(alive)
    assert any(largest) or measure in (MEASURES["sharpness"], MEASURES["antithetic"])


# ---- data ----


def test_forms_of_data(capsys: pytest.CaptureFixture[str]) -> None:
    class Inputs(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, inputs: Any) -> Tensor:
            return self.net(inputs["image"][0])

    class Batches:
        def __iter__(self) -> Iterator[Batch]:
            yield from data

    net, data = small_net(), batches(2)
    expected = curvature.hutchinson_trace(net, F.cross_entropy, data, samples=2)
    assert curvature.hutchinson_trace(net, F.cross_entropy, Batches(), samples=2) == expected
    assert curvature.hutchinson_trace(net, F.cross_entropy, tuple(data), samples=2) == expected
    nested = [({"image": [x]}, y) for x, y in data]
    assert curvature.hutchinson_trace(Inputs(net), F.cross_entropy, nested, samples=2) == expected
    empty = (data[0][0][:0], data[0][1][:0])
    assert curvature.hutchinson_trace(net, F.cross_entropy, [empty, *data], samples=2) == expected
    assert curvature.hutchinson_trace(net, F.cross_entropy, data[0], samples=2) != expected
    assert capsys.readouterr().err == ""  # no progress bar where there is no terminal


# ---- several devices ----


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measurement works in two parts, as if every other parameter lay on a second device."""
    plain = Measurement.__init__

    def init(self: Measurement, *args: Any, **options: Any) -> None:
        plain(self, *args, **options)
        (only,) = self.parts
        self.parts = [Part(i, only.device, only.positions[i::2]) for i in range(2) if only.positions[i:]]

    monkeypatch.setattr(Measurement, "__init__", init)


@pytest.mark.usefixtures("in_parts")
def test_parameters_on_several_devices() -> None:
    net, data = small_net(torch.float64), batches(2, torch.float64)
    before = snapshot(net)
    options: dict[str, Any] = {"samples": 2}
    for law in ("rademacher", "normal"):
        found = curvature.hutchinson_diag(net, F.cross_entropy, data, distribution=law, **options)
        again = curvature.hutchinson_diag(
            net, F.cross_entropy, data, distribution=law, method="finite_difference", **options
        )
        # truncation is step^2 < 1e-8 times a third derivative of order 1
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found.value, again.value, strict=True))
        trace = curvature.hutchinson_trace(net, F.cross_entropy, data, distribution=law, **options)
        assert trace.samples == 2
        assert trace.value == pytest.approx(sum(float(t.sum()) for t in found.value), rel=1e-10)
    exact = curvature.exact_diag(net, F.cross_entropy, data)
    by_one = flatmin.pacgen(net, F.cross_entropy, data, curvature=exact, lipschitz=1.0, noise_samples=1)
    rows = ops.pacgen(list(net.parameters()), exact, gamma=0.1, eps=0.1, lipschitz=1.0)
    assert [layer.psi for layer in by_one.layers] == rows[:, 0].tolist()
    quotients = curvature.lipschitz(net, F.cross_entropy, data, curvature="exact", mode="element")
    assert isinstance(quotients, list)
    largest = max(float(q.max()) for q in quotients)
    assert curvature.lipschitz(net, F.cross_entropy, data, curvature="exact") == largest
    assert_as_before(net, before)


# ---- progress ----


class _Tqdm:
    """Stands for tqdm.tqdm, and remembers."""

    def __init__(self, **options: Any) -> None:
        self.options, self.count, self.open = options, 0, True
        self.made.append(self)

    made: list[_Tqdm] = []  # noqa: RUF012

    def update(self) -> None:
        self.count += 1

    def close(self) -> None:
        self.open = False


def test_progress_counts_batches_and_ends_with_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = types.ModuleType("tqdm")
    stub.tqdm = _Tqdm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm", stub)
    monkeypatch.setattr(_Tqdm, "made", [])
    net, data = small_net(), batches(3)
    curvature.hutchinson_diag(net, F.cross_entropy, data, samples=2, method="finite_difference", progress=True)
    (bar,) = _Tqdm.made
    assert bar.options["total"] == bar.count == 12
    assert not bar.open
    curvature.hutchinson_diag(net, F.cross_entropy, data, samples=1, progress=False)
    assert len(_Tqdm.made) == 1
    with pytest.raises(ValueError, match="loss_fn"):
        curvature.hutchinson_diag(net, lambda output, y: output, data)
    assert not _Tqdm.made[1].open
    assert _Tqdm.made[1].options["disable"] is None  # tqdm's word for: where stderr is a terminal


def test_numbers_of_numpy_are_numbers() -> None:
    net, data = small_net(), batches(1)
    whole: dict[str, Any] = {"samples": np.int64(2), "seed": np.int64(3)}
    found = curvature.hutchinson_diag(net, F.cross_entropy, data, **whole)
    assert same_bits(found.value, curvature.hutchinson_diag(net, F.cross_entropy, data, samples=2, seed=3).value)
    rise = curvature.expected_sharpness(net, F.cross_entropy, data, scale=np.float32(0.125), eps=np.int32(1), **whole)
    assert rise == curvature.expected_sharpness(net, F.cross_entropy, data, scale=0.125, samples=2, seed=3)
    sizes: dict[str, Any] = {"gamma": np.float64(0.1), "delta": np.float64(0.05), "lipschitz": np.float32(1.0)}
    counts: dict[str, Any] = {"curvature_samples": np.int64(2), "noise_samples": np.uint8(1)}
    assert flatmin.pacgen(net, F.cross_entropy, data, **sizes, **counts).psi == (
        flatmin.pacgen(net, F.cross_entropy, data, lipschitz=1.0, curvature_samples=2, noise_samples=1).psi
    )


def test_without_tqdm_there_is_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    found = curvature.squared_gradient_diag(small_net(), F.cross_entropy, batches(1), progress=True)
    assert same_bits(found, curvature.squared_gradient_diag(small_net(), F.cross_entropy, batches(1), progress=False))


def test_estimates_can_be_copied_and_saved() -> None:
    found = curvature.hutchinson_diag(small_net(), F.cross_entropy, batches(1), samples=2)
    assert not any(t.requires_grad for t in [*found.value, *found.stderr])
    assert same_bits(copy.deepcopy(found).value, found.value)
    file = io.BytesIO()
    torch.save(found.value, file)
    file.seek(0)
    assert same_bits(torch.load(file), found.value)
