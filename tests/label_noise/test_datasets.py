"""Noise on whole data sets: exact counts, items that never change, workers, torchvision's ways in."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from flatmin import LabelNoise
from flatmin.label_noise import NoisyDataset


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels_of(n: int, classes: int = 10) -> Tensor:
    return torch.randint(classes, (n,), generator=seeded())


# ---- corrupt ----


@pytest.mark.parametrize("n", [0, 1, 7, 1000, 4321])
@pytest.mark.parametrize(
    ("kind", "p"), [("exclude_true", 0.2), ("uniform", 0.37), ("pair", 0.5), ("exclude_true", 1.0)]
)
def test_exact_counts(n: int, kind: str, p: float) -> None:
    noise, y = LabelNoise(10, p, kind, generator=seeded()), labels_of(n)
    noisy = noise.corrupt(y)
    flipped = noisy != y
    assert int(flipped.sum()) == round(noise.effective_rate * n)
    assert torch.equal(noise.corrupt(y), noisy)
    if kind == "pair":
        assert torch.equal(noisy[flipped], (y[flipped] + 1) % 10)


def test_exact_counts_of_each_class() -> None:
    y = labels_of(5000)
    noisy = LabelNoise(10, 0.4, "cifar10", generator=seeded()).corrupt(y)
    for c, to in {0: 0, 1: 1, 2: 0, 3: 5, 4: 7, 5: 3, 6: 6, 7: 7, 8: 8, 9: 1}.items():
        mine = noisy[y == c]
        assert int((mine != c).sum()) == (0 if to == c else round(0.4 * len(mine)))
        assert set(mine.tolist()) <= {c, to}
    matrix = torch.tensor([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0], [0.05, 0.05, 0.9]])
    y = labels_of(5000, 3)
    noisy = LabelNoise(3, kind=matrix, generator=seeded()).corrupt(y)
    for c in range(3):
        mine = noisy[y == c]
        assert int((mine != c).sum()) == round((1.0 - float(matrix[c, c])) * len(mine))
    assert int((noisy[y == 0] == 1).sum()) == pytest.approx(0.3 * int((y == 0).sum()), rel=0.15)


def test_which_labels_change_is_uniform() -> None:
    """Over seeds each position is flipped equally often: a binomial count within 5 sigma."""
    y = torch.zeros(200, dtype=torch.int64)
    counts = sum((LabelNoise(3, 0.3, "exclude_true", generator=seeded(s)).corrupt(y) != 0).long() for s in range(400))
    assert isinstance(counts, Tensor)
    assert float((counts - 120).abs().max()) < 5 * (400 * 0.3 * 0.7) ** 0.5
    others = torch.cat([LabelNoise(3, 1.0, "uniform", generator=seeded(s)).corrupt(y) for s in range(100)])
    assert abs(int((others == 1).sum()) - int((others == 2).sum())) < 5 * (20_000 * 2 / 3) ** 0.5


def test_ignored_labels_do_not_count() -> None:
    y = labels_of(1000)
    y[::4] = -100
    noisy = LabelNoise(10, 0.2, "exclude_true", generator=seeded()).corrupt(y)
    assert torch.equal(noisy == -100, y == -100)
    assert int((noisy != y).sum()) == 150


def test_corrupt_takes_lists_and_masks() -> None:
    noise = LabelNoise(10, 0.5, "exclude_true", generator=seeded())
    assert noise.corrupt([1, 2, 3, 4]).dtype == torch.int64
    mask = labels_of(600).view(10, 6, 10)
    assert noise.corrupt(mask).shape == mask.shape
    with pytest.raises(TypeError, match=r"labels: torch.float32 given; give integers"):
        noise.corrupt([0.5])
    with pytest.raises(RuntimeError, match="element 1 is 12"):
        noise.corrupt([1, 12])
    for kind in ("smooth", "gaussian"):
        with pytest.raises(ValueError, match="makes soft targets"):
            LabelNoise(10, 0.5, kind).corrupt([1])


# ---- wrap ----


class Items(Dataset[Any]):
    """Items that no attribute lists the labels of."""

    def __init__(self, n: int) -> None:
        self.y = labels_of(n).tolist()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, int, str]:
        return torch.tensor([float(i)]), self.y[i], f"name {i}"


class Listed(Items):
    """As torchvision's: a list of the labels."""

    @property
    def targets(self) -> list[int]:
        return self.y


def tensors(n: int) -> TensorDataset:
    return TensorDataset(torch.arange(float(n)).view(n, 1), labels_of(n))


@pytest.mark.parametrize(
    "make", [Items, Listed, tensors, lambda n: Subset(Listed(2 * n), range(n)), lambda n: Subset(Items(n), range(n))]
)
def test_wrap(make: Any) -> None:
    dataset = make(500)
    noise = LabelNoise(10, 0.3, "exclude_true", generator=seeded())
    noisy = noise.wrap(dataset)
    assert isinstance(noisy, NoisyDataset) and len(noisy) == 500
    assert noisy.clean.tolist() == [int(dataset[i][1]) for i in range(500)]
    assert int(noisy.flipped.sum()) == 150 and torch.equal(noisy.flipped, noisy.targets != noisy.clean)
    assert noisy.labels is noisy.targets
    for i in (0, 499, 17, 17):
        x, y, *rest = noisy[i]
        assert torch.equal(x, dataset[i][0]) and int(y) == int(noisy.targets[i])
        assert type(y) is type(dataset[i][1]) and rest == list(dataset[i][2:])
    assert "150 labels flipped (30.00%)" in repr(noisy)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores
@pytest.mark.parametrize("workers", [0, 4])
def test_an_item_is_the_same_under_shuffling_and_workers(workers: int) -> None:
    noisy = LabelNoise(10, 0.5, "exclude_true", generator=seeded()).wrap(tensors(300))
    seen = torch.full((300,), -1)
    loader = DataLoader(noisy, batch_size=32, shuffle=True, num_workers=workers, generator=seeded(workers))
    for x, y in loader:
        seen[x.view(-1).long()] = y
    assert torch.equal(seen, noisy.targets)
    assert torch.equal(seen, LabelNoise(10, 0.5, "exclude_true", generator=seeded()).wrap(tensors(300)).targets)


def test_a_data_set_that_changes_labels_itself_is_refused() -> None:
    class Shifted(Listed):
        def __getitem__(self, i: int) -> tuple[Tensor, int, str]:
            x, y, name = super().__getitem__(i)
            return x, (y + 1) % 10, name

    dataset = Shifted(20)
    noise = LabelNoise(10, 0.3, "pair")
    with pytest.raises(RuntimeError, match=r"item 3 has label .* target_transform"):
        noise.wrap(dataset)[3]
    given = noise.wrap(dataset, labels=[(y + 1) % 10 for y in dataset.y])
    assert given[3][1] == int(given.targets[3])
    with pytest.raises(ValueError, match=r"labels: shape \(2,\) given for 20 items"):
        noise.wrap(dataset, labels=[1, 2])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1.5, 2.0], "labels: torch.float32 given; give integers"),
        (torch.tensor([1.0, 2.0]), "labels: torch.float32 given; give integers"),
        (["cat", "dog"], "labels: list given, which is no tensor of integers"),
        ([[1], [2, 3]], "labels: list given, which is no tensor of integers"),
    ],
)
def test_labels_that_are_no_integers(labels: Any, message: str) -> None:
    """Neither is rounded: a regression target 1.5 is no class 1."""
    noise = LabelNoise(10, 0.3, "pair")
    with pytest.raises(TypeError, match=message):
        noise.corrupt(labels)
    with pytest.raises(TypeError, match=message):
        noise.wrap([(0, 1), (0, 2)], labels)


@pytest.mark.parametrize("label", [1.5, torch.tensor(1.5), torch.tensor([0, 1]), "cat", None])
def test_items_whose_labels_are_no_integers(label: Any) -> None:
    noise = LabelNoise(10, 0.3, "pair")
    with pytest.raises(TypeError, match=r"dataset: item 0 has label .*; labels are integers, one for each item"):
        noise.wrap([(0, label)])
    with pytest.raises(TypeError, match=r"dataset: item 0 has label"):
        noise.wrap([(0, label)], [1])[0]


def test_a_data_set_has_a_length() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield 0, 1

    with pytest.raises(TypeError, match=r"dataset: Endless has no length, .*; give a map-style data set"):
        LabelNoise(10, 0.3, "pair").wrap(Endless())


def test_nothing_to_corrupt() -> None:
    assert LabelNoise(10, 0.3, "pair").corrupt([]).dtype == torch.int64
    assert len(LabelNoise(10, 0.3, "cifar10").wrap([])) == 0


def test_one_class_is_checked_too() -> None:
    noise = LabelNoise(1, 0.5, "uniform")
    assert noise.corrupt([0, 0]).tolist() == [0, 0]
    with pytest.raises(RuntimeError, match="labels: element 1 is 5"):
        noise.corrupt([0, 5])


def test_items_are_pairs() -> None:
    with pytest.raises(TypeError, match="dataset: item 0 is a Tensor; items are tuples"):
        LabelNoise(10, 0.3, "pair").wrap([torch.zeros(3)])


# ---- fresh noise in a DataLoader ----


def batches(noise: LabelNoise, workers: int, index: int | None, **options: Any) -> Iterator[Any]:
    n = 512
    data = TensorDataset(torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.arange(n))
    torch.manual_seed(7)  # the workers' seeds
    return iter(DataLoader(data, 64, num_workers=workers, collate_fn=noise.collate(index=index), **options))


@pytest.mark.parametrize("workers", [0, 2])
def test_collate(workers: int) -> None:
    noise = LabelNoise(2, 0.5, "exclude_true", generator=seeded())
    noisy = [y for _, y, _ in batches(noise, workers, None)]
    assert 200 < int(torch.cat(noisy).sum()) < 312
    assert all(not torch.equal(a, b) for i, a in enumerate(noisy) for b in noisy[:i])  # workers draw their own


def test_collate_by_index_does_not_depend_on_workers() -> None:
    noise = LabelNoise(2, 0.5, "exclude_true", generator=seeded())
    alone, shared = ([y for _, y, _ in batches(noise, workers, 2)] for workers in (0, 2))
    assert all(map(torch.equal, alone, shared))
    noise.set_epoch(1)
    assert not torch.equal(next(batches(noise, 2, 2))[1], alone[0])


def test_workers_that_live_on_see_the_epoch() -> None:
    """set_epoch reaches persistent workers, which got their copy of the noise when they started."""
    noise = LabelNoise(2, 0.5, "exclude_true", generator=seeded())
    data = TensorDataset(torch.zeros(64), torch.zeros(64, dtype=torch.int64), torch.arange(64))
    loader = DataLoader(data, 64, num_workers=1, collate_fn=noise.collate(index=2), persistent_workers=True)
    (first,) = [y for _, y, _ in loader]
    noise.set_epoch(1)
    (second,) = [y for _, y, _ in loader]
    noise.set_epoch(0)
    (third,) = [y for _, y, _ in loader]
    assert torch.equal(first, third) and not torch.equal(first, second)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda noise: pickle.loads(pickle.dumps(noise))])
def test_workers_that_live_on_see_the_epoch_of_a_copy(copied: Any) -> None:
    """A copy, or what a checkpoint held, has an epoch of its own that its workers see change."""
    noise = copied(LabelNoise(2, 0.5, "exclude_true", generator=seeded()))
    data = TensorDataset(torch.zeros(64), torch.zeros(64, dtype=torch.int64), torch.arange(64))
    loader = DataLoader(data, 64, num_workers=1, collate_fn=noise.collate(index=2), persistent_workers=True)
    first, second = [], []
    for epoch, seen in enumerate((first, second)):
        noise.set_epoch(epoch)
        seen.extend(y for _, y, _ in loader)
    assert not torch.equal(first[0], second[0])


def test_an_epoch_is_a_word() -> None:
    noise = LabelNoise(10, 0.5, "pair")
    with pytest.raises(ValueError, match=r"epoch: 4294967296 given; give an integer below 2\^32"):
        noise.set_epoch(2**32)
    noise.set_epoch(2**32 - 1)
    assert noise(torch.zeros(3, dtype=torch.int64), index=torch.arange(3)).shape == (3,)


def test_collate_counts_entries_from_the_end_too() -> None:
    noise = LabelNoise(2, 1.0, "exclude_true")
    x, y = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    assert [t.tolist() for t in noise.collate(lambda items: (x, y), target=-1)([])] == [[0, 0], [1, 1]]
    assert len(noise.collate(lambda items: [x, y, y], target=-2, index=-1)([])) == 3
    with pytest.raises(TypeError, match="the labels are its entry -3"):
        noise.collate(lambda items: (x, y), target=-3)([])


class Batch(NamedTuple):
    image: Tensor
    label: Tensor


def test_collate_keeps_a_namedtuple() -> None:
    """torch's default makes one of items that are one."""
    batch = LabelNoise(2, 1.0, "exclude_true").collate()([Batch(torch.zeros(3), torch.tensor(0))] * 2)
    assert isinstance(batch, Batch) and batch.label.tolist() == [1, 1]


def test_items_keep_a_namedtuple() -> None:
    items = [Batch(torch.zeros(3), torch.tensor(0)), Batch(torch.ones(3), torch.tensor(1))]
    loader = DataLoader(LabelNoise(2, 1.0, "exclude_true").wrap(items), batch_size=2)
    (batch,) = loader
    assert isinstance(batch, Batch) and batch.label.tolist() == [1, 0]
    assert batch.image.tolist() == [[0.0] * 3, [1.0] * 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "label"}, "target: 'label' given; give the place of an entry"),
        ({"target": None}, "target: None given"),
        ({"index": 1.0}, "index: 1.0 given; give the place of an entry"),
        ({"collate_fn": 3}, "collate_fn: 3 given; give a function"),
    ],
)
def test_bad_arguments_of_collate(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        LabelNoise(2, 1.0, "exclude_true").collate(**options)


def test_collate_keeps_the_type_of_a_batch() -> None:
    noise = LabelNoise(2, 1.0, "exclude_true")
    make = noise.collate(lambda items: [torch.zeros(2), torch.zeros(2, dtype=torch.int64)])
    batch = make([])
    assert isinstance(batch, list) and batch[1].tolist() == [1, 1]
    with pytest.raises(TypeError, match="the labels are its entry 3"):
        noise.collate(lambda items: (1, 2), target=3)([])
    with pytest.raises(TypeError, match="a batch is a dict"):
        noise.collate(lambda items: {"x": 1})([])


def test_target_transform() -> None:
    """torchvision calls it with the label of each item: fresh noise whenever an item is read."""
    noise = LabelNoise(10, 0.5, "exclude_true", generator=seeded())
    read = [[noise(3) for _ in range(200)] for _ in range(2)]
    assert read[0] != read[1] and all(60 < sum(y != 3 for y in ys) < 140 for ys in read)


def test_one_label_by_its_number() -> None:
    """A label alone gets what it gets in a batch, whichever integer its number is."""
    noise, n = LabelNoise(10, 0.5, "exclude_true", generator=seeded()), 20
    together = noise(torch.full((n,), 3), index=torch.arange(n))
    for number in (int, np.int64, torch.tensor):
        assert [noise(3, index=number(i)) for i in range(n)] == together.tolist()
