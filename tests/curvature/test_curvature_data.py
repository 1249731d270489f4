"""How batches reach a measurement: their size, their containers, loaders without a length, dictionaries."""

from __future__ import annotations

import collections
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import flatmin
from flatmin import curvature
from flatmin.curvature._containers import to_device
from models import same_bits
from several_passes import SEVERAL_PASSES, inputs, net

pytestmark = pytest.mark.usefixtures("one_thread")


def trace(model: nn.Module, loss_fn: Any, data: Any) -> float:
    return sum(float(d.sum()) for d in curvature.exact_diag(model, loss_fn, data))


# ---- how often a batch counts ----


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


PAIRS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "dict": lambda a, b: {"a": a, "b": b},
    "list, as default_collate makes it": lambda a, b: [a, b],
    "named tuple": Pair,
    "nested": lambda a, b: {"a": [a], "b": {"c": b}},
}


def two_heads(output: Tensor, targets: Any) -> Tensor:
    """Squared errors of two targets, in whichever container."""
    found: list[Tensor] = []
    queue = [targets]
    while queue:
        x = queue.pop(0)
        if isinstance(x, Tensor):
            found.append(x)
        else:
            queue += x.values() if isinstance(x, dict) else x
    a, b = found
    return F.mse_loss(output[:, 0], a) + F.mse_loss(output[:, 1].tanh(), b)


@pytest.mark.parametrize("form", PAIRS.values(), ids=PAIRS)
def test_targets_in_a_container_do_not_change_the_weight_of_a_batch(form: Callable[[Tensor, Tensor], Any]) -> None:
    """Batches of 8 and of 2: the trace is that of all ten samples in one batch, and pacgen counts ten."""
    model, x = net(), inputs(10)
    a, b = x.sum(1), x.prod(1)
    data = [(x[:8], form(a[:8], b[:8])), (x[8:], form(a[8:], b[8:]))]
    expected = trace(model, two_heads, [(x, form(a, b))])
    assert trace(model, two_heads, data) == pytest.approx(expected, rel=1e-12)
    equal_weights = sum(trace(model, two_heads, [batch]) for batch in data) / 2
    assert abs(equal_weights - expected) > 1e-3  # what two targets' length would have given
    found = flatmin.pacgen(model, two_heads, data, curvature="exact", lipschitz=1.0, noise_samples=0)
    assert found.samples == 10


def test_targets_that_are_a_list_of_numbers_count_by_the_inputs() -> None:
    model, x = net(), inputs(10)
    labels = [0, 1] * 5

    def loss_fn(output: Tensor, targets: list[int]) -> Tensor:
        return F.cross_entropy(output, torch.tensor(targets))

    data = [(x[:8], labels[:8]), (x[8:], labels[8:])]
    assert trace(model, loss_fn, data) == pytest.approx(trace(model, loss_fn, [(x, labels)]), rel=1e-12)


DISAGREEING: dict[str, tuple[Any, Any]] = {
    "targets among each other": (inputs(8), {"a": torch.zeros(8), "b": torch.zeros(4)}),
    "targets of one row": (inputs(8), torch.zeros(1, 8)),
    "flattened tokens": (inputs(8).view(4, 2, 3), torch.zeros(8)),
}


@pytest.mark.parametrize("batch", DISAGREEING.values(), ids=DISAGREEING)
def test_tensors_that_disagree_about_the_size_are_refused(batch: tuple[Any, Any]) -> None:
    def loss_fn(output: Tensor, _: Any) -> Tensor:
        return (output**2).mean()

    with pytest.raises(ValueError, match=r"data: the tensors of a batch do not agree .*Batches\(data, size="):
        trace(net(), loss_fn, [batch])
    data = curvature.Batches([batch, (inputs(2), None)], size=lambda batch: batch[0].numel() // 3)
    ten = torch.cat([batch[0].reshape(-1, 3), inputs(2)])
    assert trace(net(), loss_fn, data) == pytest.approx(trace(net(), loss_fn, [(ten, None)]), rel=1e-12)


def test_a_batch_without_tensors_has_no_size() -> None:
    with pytest.raises(ValueError, match="data: a batch holds no tensor with a dimension"):
        trace(net(), F.mse_loss, [("text", "text")])
    with pytest.raises(ValueError, match="size: what it returned: -1 given"):
        trace(net(), F.mse_loss, curvature.Batches([(inputs(2), inputs(2))], size=lambda batch: -1))


def test_sequences_of_different_lengths_count_as_sequences() -> None:
    torch.manual_seed(0)
    rnn = nn.RNN(3, 2).double()

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch[0])[1][0], batch[1]

    sequences = [inputs(length, seed=length) for length in (5, 4, 4, 2, 1)]
    y = torch.tensor([0, 1, 0, 1, 1])
    whole = curvature.Batches([(pack_sequence(sequences), y)], forward=forward)
    parts = [(pack_sequence(sequences[:4]), y[:4]), (pack_sequence(sequences[4:]), y[4:])]
    found = trace(rnn, F.cross_entropy, curvature.Batches(parts, forward=forward))
    assert found == pytest.approx(trace(rnn, F.cross_entropy, whole), rel=1e-12)


# ---- loaders without a length ----


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(TensorDataset(inputs(11), torch.arange(11) % 2))


class Unsized:
    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(Stream(), batch_size=4))

    def __len__(self) -> int:
        raise NotImplementedError


class Sampler:
    """Of batches, without a length."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]])


LENGTHLESS: dict[str, Callable[[], Any]] = {
    "IterableDataset": lambda: DataLoader(Stream(), batch_size=4),
    "a length that is not implemented": Unsized,
    "a batch sampler": lambda: DataLoader(TensorDataset(inputs(11), torch.arange(11) % 2), batch_sampler=Sampler()),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("loader", LENGTHLESS.values(), ids=LENGTHLESS)
def test_loaders_without_a_length(loader: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    totals: list[Any] = []
    stub = types.ModuleType("tqdm")
    bar = types.SimpleNamespace(update=lambda: None, close=lambda: None)
    stub.tqdm = lambda total, **_: totals.append(total) or bar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm", stub)
    model = net()
    expected = trace(model, F.cross_entropy, (inputs(11), torch.arange(11) % 2))
    assert trace(model, F.cross_entropy, loader()) == pytest.approx(expected, rel=1e-12)
    assert totals == [1, None]


# ---- containers keep their types ----


class Encoding(collections.UserDict[str, Any]):
    """As the tokenizers of transformers return them: attributes are keys."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: Any) -> Encoding:
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class MovesItself:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any) -> None:
        self.x = self.x.to(device)


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    name: str = "frozen"


class Items(list[Any]):
    pass


META = torch.device("meta")
CONTAINERS: dict[str, tuple[Any, Callable[[Any], Tensor]]] = {
    "UserDict with attributes": (Encoding(input_ids=torch.ones(2)), lambda c: c.input_ids),
    "OrderedDict": (collections.OrderedDict(x=torch.ones(2)), lambda c: c["x"]),
    "defaultdict": (collections.defaultdict(list, x=torch.ones(2)), lambda c: c["x"]),
    "named tuple": (Pair(torch.ones(2), torch.ones(2)), lambda c: c.b),
    "PackedSequence": (pack_sequence([torch.ones(2), torch.ones(1)]), lambda c: c.data),
    "object with to()": (MovesItself(torch.ones(2)), lambda c: c.x),
    "frozen dataclass": (Frozen(torch.ones(2)), lambda c: c.x),
    "subclass of list": (Items([torch.ones(2)]), lambda c: c[0]),
    "nested": ({"a": [Pair(torch.ones(2), torch.ones(2))]}, lambda c: c["a"][0].a),
}


@pytest.mark.parametrize(("container", "tensor"), CONTAINERS.values(), ids=CONTAINERS)
def test_containers_are_moved_and_keep_their_type(container: Any, tensor: Callable[[Any], Tensor]) -> None:
    moved = to_device(container, META)
    assert type(moved) is type(container)
    assert tensor(moved).is_meta
    assert not tensor(container).is_meta  # the user's own stays where it was
    if not isinstance(container, MovesItself):
        assert to_device(container, torch.device("cpu")) is container


def test_a_mapping_that_cannot_be_written_becomes_a_dict() -> None:
    assert to_device(types.MappingProxyType({"x": torch.ones(2)}), META)["x"].is_meta


@pytest.mark.parametrize("form", [lambda x: Encoding(input_ids=x), MovesItself, Frozen], ids=["UserDict", "to", "data"])
def test_models_get_the_container_that_the_loader_gave(form: Callable[[Tensor], Any]) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, batch: Any) -> Tensor:
            assert type(batch) is type(form(inputs(1)))
            return self.net(batch.input_ids if isinstance(batch, Encoding) else batch.x)

    x, y = inputs(10), torch.arange(10) % 2
    data = [(form(x[:8]), y[:8]), (form(x[8:]), y[8:])]
    expected = trace(net(), F.cross_entropy, (x, y))
    assert trace(Reads(), F.cross_entropy, data) == pytest.approx(expected, rel=1e-12)


def test_a_packed_sequence_is_a_leaf() -> None:
    packed = pack_sequence([inputs(3), inputs(2)])
    assert isinstance(to_device([packed], torch.device("cpu"))[0], PackedSequence)


# ---- feeding a batch to the model ----


class Language(nn.Module):
    """Called with keywords; gives its loss and logits, as the models of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, *, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.net(input_ids)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return types.SimpleNamespace(loss=loss, logits=logits)


def logits_and_labels(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(input_ids=batch["input_ids"]).logits, batch["labels"]


def dictionaries() -> list[dict[str, Tensor]]:
    x, y = inputs(10), torch.arange(10) % 2
    return [{"input_ids": x[:8], "labels": y[:8]}, {"input_ids": x[8:], "labels": y[8:]}]


def test_dictionaries_are_fed_by_a_function() -> None:
    model = Language()
    expected = trace(net(), F.cross_entropy, (inputs(10), torch.arange(10) % 2))
    data = curvature.Batches(dictionaries(), forward=logits_and_labels)
    assert trace(model, F.cross_entropy, data) == pytest.approx(expected, rel=1e-12)
    own = curvature.Batches(dictionaries(), forward=lambda model, batch: (model(**batch), None))
    assert trace(model, lambda outputs, _: outputs.loss, own) == pytest.approx(expected, rel=1e-12)
    one = curvature.Batches(dictionaries()[0], forward=logits_and_labels)  # a mapping is one batch
    x, y = inputs(10)[:8], (torch.arange(10) % 2)[:8]
    assert trace(model, F.cross_entropy, one) == pytest.approx(trace(net(), F.cross_entropy, (x, y)), rel=1e-12)


def test_every_measurement_takes_batches_with_a_function() -> None:
    """And its value is that of pairs."""
    pairs = [(batch["input_ids"], batch["labels"]) for batch in dictionaries()]
    data = curvature.Batches(dictionaries(), forward=logits_and_labels)
    first, second = net(), Language()
    for kind in ("hutchinson", "gnb", "squared_gradient"):
        options: dict[str, Any] = {"curvature": kind, "curvature_samples": 2, "noise_samples": 2}
        found = flatmin.pacgen(second, F.cross_entropy, data, **options)
        assert found.as_dict() | {"layers": 0} == (
            flatmin.pacgen(first, F.cross_entropy, pairs, **options).as_dict() | {"layers": 0}
        )
    for measure in (SEVERAL_PASSES["difference"], SEVERAL_PASSES["sharpness"], SEVERAL_PASSES["probes"]):
        a, b = measure(first, pairs), measure(second, data)
        assert same_bits(a, b) if isinstance(a, list) else a == b


def test_a_function_as_curvature_gets_the_data_as_they_were_given() -> None:
    pairs = [(batch["input_ids"], batch["labels"]) for batch in dictionaries()]
    seen = []

    def ones(model: nn.Module, loss_fn: Any, data: Any, params: Any) -> list[Tensor]:
        seen.append(data)
        return [torch.ones_like(p) for p in params]

    curvature.lipschitz(net(), F.cross_entropy, pairs, curvature=ones)
    assert all(data is pairs for data in seen)


def test_refusals_of_batches() -> None:
    with pytest.raises(ValueError, match=r"data: a batch is a dict.*curvature.Batches\(data, forward="):
        trace(net(), F.cross_entropy, dictionaries())
    with pytest.raises(TypeError, match="forward: 3 given"):
        curvature.Batches([], forward=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="forward: returned a float64 tensor"):
        trace(Language(), F.cross_entropy, curvature.Batches(dictionaries(), forward=lambda m, b: b["input_ids"]))
