"""How batches reach a measurement: their size, their containers, passes that must repeat, where the classes are."""

from __future__ import annotations

import collections
import functools
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import flatmin
from flatmin import curvature
from flatmin._rng import Generators
from flatmin.curvature._containers import fingerprint, same_prints, to_device
from models import same_bits


@pytest.fixture(autouse=True)
def one_thread(restore_threads: None) -> None:
    """For tensors this small a second thread costs more than it brings."""
    torch.set_num_threads(1)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def inputs(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trace(model: nn.Module, loss_fn: Any, data: Any) -> float:
    return sum(float(d.sum()) for d in curvature.exact_diag(model, loss_fn, data))


def vectors(model: nn.Module) -> list[Tensor]:
    return [0.1 * torch.ones_like(p) for p in model.parameters()]


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


# ---- passes that differ ----


class Augmented(torch.utils.data.Dataset[Any]):
    """Samples with a shift that ``draw`` makes anew each time."""

    def __init__(self, draw: Callable[[], float], **attributes: Any) -> None:
        self.draw = draw
        self.x, self.y = inputs(12), torch.arange(12) % 2
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Any:
        return self.x[i] + 0.3 * self.draw(), self.y[i]


def hidden_numpy() -> Callable[[], float]:
    generator = np.random.default_rng(0)
    return lambda: generator.standard_normal()


def hidden_python() -> Callable[[], float]:
    generator = random.Random(0)
    return lambda: generator.gauss(0.0, 1.0)


HIDDEN: dict[str, Callable[[], Any]] = {
    "numpy's Generator": lambda: DataLoader(Augmented(hidden_numpy()), batch_size=5),
    "Python's Random": lambda: DataLoader(Augmented(hidden_python()), batch_size=5),
    "persistent workers": lambda: DataLoader(
        Augmented(lambda: float(torch.randn(()))), batch_size=5, num_workers=1, persistent_workers=True
    ),
}

SEVERAL_PASSES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "difference": lambda m, data: curvature.hvp(m, F.cross_entropy, data, vectors(m), method="finite_difference"),
    "sharpness": lambda m, data: curvature.expected_sharpness(m, F.cross_entropy, data, scale=0.1, samples=2),
    "probes": lambda m, data: curvature.hutchinson_trace(m, F.cross_entropy, data, samples=2),
    "diagonals of lipschitz": lambda m, data: curvature.lipschitz(
        m, F.cross_entropy, data, curvature="squared_gradient"
    ),
    "pacgen": lambda m, data: flatmin.pacgen(
        m, F.cross_entropy, data, curvature="squared_gradient", lipschitz=1.0, noise_samples=0
    ),
}


@pytest.mark.parametrize("measure", SEVERAL_PASSES.values(), ids=SEVERAL_PASSES)
def test_passes_over_differing_data_raise_in_every_method(measure: Callable[[nn.Module, Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"data: batch 0 differs .* persistent_workers=False"):
        measure(net(), HIDDEN["numpy's Generator"]())


@pytest.mark.parametrize("loader", HIDDEN.values(), ids=HIDDEN)
def test_passes_over_differing_data_raise_for_every_hidden_generator(loader: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="data: batch 0 differs"):
        SEVERAL_PASSES["difference"](net(), loader())


def test_data_written_into_by_the_model_raise() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x)
            x += 1.0
            return y

    with torch.no_grad():  # a measurement switches gradients on; the inputs need none
        data = [(inputs(4), torch.tensor([0, 1, 1, 0]))]
    with pytest.raises(ValueError, match="do not write into the batches"):
        curvature.expected_sharpness(InPlace(), F.cross_entropy, data, scale=0.1)


def test_a_pass_of_another_length_raises() -> None:
    class OneShot(IterableDataset[Any]):
        def __init__(self) -> None:
            self.rows = iter(TensorDataset(inputs(12), torch.arange(12) % 2))
            self.spare = TensorDataset(inputs(12), torch.arange(12) % 2)

        def __iter__(self) -> Iterator[Any]:
            yield from self.rows
            yield from [self.spare[i] for i in range(5)]

    with pytest.raises(ValueError, match="data: 5 samples in a pass, 17 in the first one"):
        SEVERAL_PASSES["difference"](net(), DataLoader(OneShot(), batch_size=5))


def test_one_pass_over_augmented_data_is_a_measurement() -> None:
    found = curvature.squared_gradient_diag(net(), F.cross_entropy, HIDDEN["numpy's Generator"]())
    assert all(t.isfinite().all() for t in found)


REPEATED: dict[str, Callable[[], Augmented]] = {
    "numpy, global": lambda: Augmented(lambda: np.random.standard_normal()),  # noqa: NPY002
    "Python, global": lambda: Augmented(lambda: random.gauss(0.0, 1.0)),
    "torch, global": lambda: Augmented(lambda: float(torch.randn(()))),
    "numpy, of the dataset": lambda: _own(np.random.default_rng(0), "standard_normal"),
    "numpy's old one, of the dataset": lambda: _own(np.random.RandomState(0), "standard_normal"),
    "Python, of the dataset": lambda: _own(random.Random(0), "random"),
}


def _own(generator: Any, method: str) -> Augmented:
    return Augmented(getattr(generator, method), generator=generator)


def _bits(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return [x.tolist() if isinstance(x, np.ndarray) else x for x in generator.get_state()]


@pytest.mark.parametrize("dataset", REPEATED.values(), ids=REPEATED)
def test_every_pass_draws_the_same_augmentation(dataset: Callable[[], Augmented]) -> None:
    """Finite differences are two passes, automatic differentiation is one: they agree if both see one function. And the
    generators are as they were."""
    model, data = net(), dataset()
    loader = DataLoader(data, batch_size=5)
    own = getattr(data, "generator", None)
    before = [_bits(random._inst), _bits(np.random.mtrand._rand), own and _bits(own)]  # type: ignore[attr-defined]
    pair = [
        curvature.hvp(model, F.cross_entropy, loader, vectors(model), method=m)
        for m in ("autograd", "finite_difference")
    ]
    # truncation is step^2 < 1e-8 times a third derivative of order 1
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*pair, strict=True))
    assert before == [_bits(random._inst), _bits(np.random.mtrand._rand), own and _bits(own)]  # type: ignore[attr-defined]


def test_workers_that_live_for_one_pass_draw_the_same() -> None:
    loader = DataLoader(Augmented(lambda: np.random.standard_normal()), batch_size=5, num_workers=1)  # noqa: NPY002
    assert all(t.isfinite().all() for t in SEVERAL_PASSES["difference"](net(), loader))


def test_numpy_is_not_imported_for_its_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy.random")
    states = Generators(net())
    states.set()
    assert states.numpy is None
    assert "numpy.random" not in sys.modules


def test_the_check_reads_no_batch_of_its_own() -> None:
    read = []

    class Counted(Augmented):
        def __getitem__(self, i: int) -> Any:
            read.append(i)
            return super().__getitem__(i)

    SEVERAL_PASSES["difference"](net(), DataLoader(Counted(lambda: 0.0), batch_size=5))
    assert len(read) == 2 * 12


def test_fingerprints_tell_batches_apart() -> None:
    x = inputs(1000).repeat(1, 100)  # more elements than are compared
    batch = {"x": x, "words": ["a", "b"], "n": 3, "half": x.half(), "array": np.arange(3)}
    assert same_prints(fingerprint(batch), fingerprint({**batch, "x": x.clone()}))
    for change in ({"x": x.flip(0)}, {"words": ["a", "c"]}, {"n": 4}, {"half": x}, {"array": np.arange(4)}):
        assert not same_prints(fingerprint(batch), fingerprint({**batch, **change}))
    nan = torch.tensor([float("nan"), 1.0])
    assert same_prints(fingerprint([nan, float("nan")]), fingerprint([nan.clone(), float("nan")]))


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


# ---- where the classes are ----


class Tokens(nn.Module):
    """Logits [samples, 7 tokens, 7 classes]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 7, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 7, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(7, (40, 7), generator=generator)


def over_the_last(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def exact_gauss_newton(model: Tokens, x: Tensor, kept: Tensor) -> Tensor:
    """Of the weight: x_j^2 p_c (1 - p_c), averaged over the positions that count."""
    p = model(x).softmax(-1)[kept].detach()
    return torch.einsum("nc,nj->cj", p * (1 - p), x[kept] ** 2) / len(p)


def test_classes_that_may_be_in_either_dimension_are_asked_for() -> None:
    model, (x, y) = Tokens(), tokens()
    with pytest.raises(ValueError, match=r"class_dim: needed.*\(40, 7\).*\(40, 7, 7\)"):
        curvature.gnb_diag(model, over_the_last, (x, y))
    expected = exact_gauss_newton(model, x, torch.ones(40, 7, dtype=torch.bool))
    for dim in (2, -1):
        value, stderr, _ = curvature.gnb_diag(model, over_the_last, (x, y), class_dim=dim, samples=100)
        assert ((value[0] - expected).abs() < 4 * stderr[0]).all()
        assert (stderr[0] < 0.2 * expected).all()


def test_pacgen_is_told_where_the_classes_are() -> None:
    model, data = Tokens(), tokens()
    options: dict[str, Any] = {"lipschitz": 1.0, "noise_samples": 0}
    with pytest.raises(ValueError, match=r"class_dim: needed.*functools.partial\(gnb_diag, class_dim="):
        flatmin.pacgen(model, over_the_last, data, curvature="gnb", **options)
    told = functools.partial(curvature.gnb_diag, class_dim=-1, samples=3)
    found = flatmin.pacgen(model, over_the_last, data, curvature=told, **options)
    assert same_bits(found.curvature, told(model, over_the_last, data).value)
    assert found.psi_stderr is not None


@pytest.mark.parametrize(
    "loss_fn", [F.cross_entropy, nn.CrossEntropyLoss(), functools.partial(F.cross_entropy, label_smoothing=0.1)]
)
def test_torch_criteria_say_where_the_classes_are(loss_fn: Any) -> None:
    """Dimension 1: the same classes, moved there, give the same numbers."""

    class First(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).movedim(-1, 1)

    x, y = tokens()
    found = curvature.gnb_diag(First(), loss_fn, (x, y), samples=2)
    last = curvature.gnb_diag(Tokens(), over_the_last, (x, y), samples=2, class_dim=-1)
    assert same_bits(found.value, last.value)


def test_one_fitting_dimension_needs_no_word() -> None:
    x, y = tokens()
    x, y = x[:, :5], y[:, :5]  # 5 tokens, 7 classes
    found = curvature.gnb_diag(Tokens(), over_the_last, (x, y))
    assert same_bits(found.value, curvature.gnb_diag(Tokens(), over_the_last, (x, y), class_dim=2).value)
    with pytest.raises(ValueError, match="with the classes in dimension 1"):
        curvature.gnb_diag(Tokens(), over_the_last, (x, y), class_dim=1)
    soft = F.one_hot(y, 7).double()
    found = curvature.gnb_diag(Tokens(), over_the_last, (x, soft))
    assert same_bits(found.value, curvature.gnb_diag(Tokens(), over_the_last, (x, y)).value)


def test_probabilities_that_sum_to_one_either_way_are_asked_for() -> None:
    x, _ = tokens()
    doubly = torch.eye(7, dtype=torch.float64).expand(40, 7, 7)
    with pytest.raises(ValueError, match="class_dim: needed"):
        curvature.gnb_diag(Tokens(), over_the_last, (x, doubly))


@pytest.mark.parametrize(
    ("loss_fn", "ignored"),
    [
        (over_the_last, -100),
        (nn.CrossEntropyLoss(ignore_index=6), 6),
        (functools.partial(F.cross_entropy, ignore_index=-1), -1),
    ],
)
def test_ignored_labels_take_no_part(loss_fn: Any, ignored: int) -> None:
    model, (x, y) = Tokens(), tokens()
    kept = torch.rand(40, 7, generator=torch.Generator().manual_seed(3)) < 0.5
    y = torch.where(kept, y.clamp(max=5), ignored)
    value, stderr, _ = curvature.gnb_diag(model, loss_fn, (x, y), class_dim=-1, samples=100)
    assert ((value[0] - exact_gauss_newton(model, x, kept)).abs() < 4 * stderr[0]).all()


@pytest.mark.parametrize(("dim", "kind"), [(0, ValueError), (3, ValueError), ("last", TypeError)])
def test_a_class_dimension_that_cannot_be_is_refused(dim: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"class_dim: {dim!r} given"):
        curvature.gnb_diag(Tokens(), over_the_last, tokens(), class_dim=dim)
