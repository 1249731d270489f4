"""Passes over the data must repeat: augmentation, hidden generators, workers, data that the model writes into."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from flatmin import curvature
from flatmin._rng import Generators
from flatmin.curvature._containers import fingerprint, same_prints
from several_passes import SEVERAL_PASSES, inputs, net, vectors

pytestmark = pytest.mark.usefixtures("one_thread")

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
