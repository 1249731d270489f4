"""The operators on labels against plain torch: the same bits from every kernel. test_emulator.py runs this file too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flatmin import ops, reference
from flatmin.label_noise import label_table
from flatmin.ops import _labels

KINDS = ("exclude_true", "uniform", "pair")
NONE = torch.empty(0, dtype=torch.int64)


def labels_of(shape: tuple[int, ...], classes: int, seed: int) -> Tensor:
    """Random labels, every ninth of them ignored."""
    y = torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))
    y.view(-1)[::9] = -100
    return y


def by_reference(y: Tensor, key: Tensor, classes: int, p: float, kind: str, index: Tensor | None) -> Tensor:
    offset, span = _labels._KINDS[kind](classes)
    out = torch.empty_like(y)
    reference.corrupt_labels(
        y, NONE if index is None else index, NONE, NONE, key, out, classes, round(p * 2**32), span, offset, -100
    )
    return out


@given(
    shape=st.sampled_from([(0,), (1,), (), (7,), (130,), (5, 3), (9, 6, 7), (3, 200), (4500,)]),
    classes=st.sampled_from([2, 3, 10, 1000, 2**31 - 1]),
    p=st.sampled_from([0.0, 1e-9, 0.2, 0.3, 0.5, 0.999, 1.0]),
    kind=st.sampled_from(KINDS),
    indexed=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_kind_is_the_reference(
    shape: tuple[int, ...], classes: int, p: float, kind: str, indexed: bool, seed: int
) -> None:
    y = labels_of(shape, classes, seed % 2**32)
    before, key = y.clone(), ops.random_key(seed, seed % 2**32, seed % 2**16)
    index = torch.randint(2**40, shape[:1], generator=torch.Generator().manual_seed(1)) if indexed and shape else None
    noisy = ops.corrupt_labels(y, key, classes, p, kind=kind, index=index)
    assert torch.equal(noisy, by_reference(y, key, classes, p, kind, index))
    assert torch.equal(y, before)
    assert torch.equal(noisy == -100, y == -100)
    assert bool(((noisy >= 0) & (noisy < classes) | (y == -100)).all())


@pytest.mark.parametrize("classes", [1, 2, 5, 33])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_table_is_the_reference(classes: int, indexed: bool) -> None:
    g = torch.Generator().manual_seed(classes)
    matrix = torch.rand(classes, classes, generator=g, dtype=torch.float64) ** 4
    matrix[matrix < 0.05] = 0.0
    matrix += 1e-3 * torch.eye(classes)
    bounds, targets = label_table(matrix / matrix.sum(1, keepdim=True))
    y, key = labels_of((700,), classes, 3), ops.random_key(5)
    index = torch.randint(2**50, (700,), generator=g) if indexed else None
    noisy, expected = ops.corrupt_labels(y, key, classes, table=(bounds, targets), index=index), torch.empty_like(y)
    reference.corrupt_labels(
        y, NONE if index is None else index, bounds, targets, key, expected, classes, 0, 1, 0, -100
    )
    assert torch.equal(noisy, expected)


@given(
    count=st.sampled_from([0, 1, 33, 500]),
    inner=st.sampled_from([0, 1, 5, 31, 32, 40, 300]),
    law=st.sampled_from(["uniform", "normal", "rademacher"]),
    indexed=st.booleans(),
)
def test_draws_are_the_reference(count: int, inner: int, law: str, indexed: bool) -> None:
    key = ops.random_key(2**64 - 1, 6, 1)
    index = torch.randint(2**40, (count,), generator=torch.Generator().manual_seed(1)) if indexed else None
    got = ops.draw_samples(count, inner, key, distribution=law, index=index)
    want = reference.draw_samples(NONE if index is None else index, key, count, inner, _labels._LAWS[law])
    assert got.shape == want.shape == (count, inner) and got.dtype == want.dtype == torch.float32
    # a radius of Box and Muller near 0 is the root of 24 bits of float32; the bits are tested against probe_ below
    torch.testing.assert_close(got, want, rtol=2e-6, atol=4e-4 if law == "normal" else 0.0)


def test_an_index_of_positions_is_none_at_all() -> None:
    """And a sample's noise does not depend on where in the batch it is, nor on what else is in it."""
    y, key = labels_of((60, 37), 10, 1), ops.random_key(1, 2, 3)
    noisy = ops.corrupt_labels(y, key, 10, 0.5)
    assert torch.equal(ops.corrupt_labels(y, key, 10, 0.5, index=torch.arange(60)), noisy)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:17]
    assert torch.equal(ops.corrupt_labels(y[order], key, 10, 0.5, index=order), noisy[order])
    each = torch.arange(60 * 37).view(60, 37)
    assert torch.equal(ops.corrupt_labels(y, key, 10, 0.5, index=each), noisy)
    draws = ops.draw_samples(60, 37, key)
    assert torch.equal(ops.draw_samples(17, 37, key, index=order), draws[order])


def test_words_are_those_of_the_other_operators() -> None:
    """Philox4x32-10 by (seed, step, position), as everything random here."""
    key = ops.random_key(3, 7, 2)
    words = reference.random_words(100, key, 0)
    flips = ops.corrupt_labels(torch.zeros(100, dtype=torch.int64), key, 2, 0.25) == 1
    assert torch.equal(flips, words < 2**30)
    probe = [torch.empty(100)]
    ops.probe_(probe, key, distribution="normal")
    assert torch.equal(ops.draw_samples(100, 1, key).view(-1), probe[0])


def test_labels_of_any_strides() -> None:
    y, key = labels_of((40, 30), 10, 1), ops.random_key(1)
    assert torch.equal(ops.corrupt_labels(y.t(), key, 10, 0.5), ops.corrupt_labels(y.t().contiguous(), key, 10, 0.5))


def test_out_of_labels() -> None:
    y, key = labels_of((40, 30), 10, 1), ops.random_key(1)
    out = torch.zeros_like(y)
    version = out._version
    assert ops.corrupt_labels(y, key, 10, 0.5, out=out) is out
    assert torch.equal(out, ops.corrupt_labels(y, key, 10, 0.5)) and out._version == version + 1


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": 1.5}, "p: 1.5"),
        ({"p": float("nan")}, "p: nan"),
        ({"kind": "symmetric"}, "kind: 'symmetric'"),
        ({"num_classes": 1}, "num_classes: 1"),
        ({"index": torch.arange(3)}, r"index: shape \(3,\)"),
    ],
)
def test_bad_options_of_labels(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.corrupt_labels(
            **{"labels": torch.zeros(5, dtype=torch.int64), "key": ops.random_key(1), "num_classes": 5} | change
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(5)}, "labels is not of type int64"),
        ({"labels": torch.zeros(5, dtype=torch.int64).to_sparse()}, "labels is sparse"),
        ({"index": torch.tensor([0, 1, 2, 3, -1])}, r"index\[4\] is -1"),
        ({"index": torch.tensor([0, 2**50, 2, 3, 1])}, rf"index\[1\] is {2**50}"),
        ({"out": torch.zeros(4, dtype=torch.int64)}, "out has other sizes"),
        ({"out": torch.zeros(5)}, "out is not of type int64"),
        ({"out": torch.zeros(10, dtype=torch.int64)[::2]}, "out is not contiguous"),
        ({"num_classes": 0, "kind": "pair"}, "classes: 0 given"),
        ({"table": (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(5, 2, dtype=torch.int64))}, "bounds has 8"),
        ({"key": torch.empty(0, dtype=torch.uint64)}, "key is empty"),
    ],
)
def test_bad_tensors_of_labels(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.corrupt_labels(
            **{"labels": torch.ones(5, dtype=torch.int64), "key": ops.random_key(1), "num_classes": 5} | change
        )


@pytest.mark.parametrize(("at", "label"), [(0, 10), (7, -1), (899, -101), (450, 2**40)])
def test_a_label_out_of_range_is_named(at: int, label: int) -> None:
    """The first of them, with its position and value."""
    y = labels_of((30, 30), 10, 1)
    y.view(-1)[-1] = -1 if at != 899 else label
    y.view(-1)[at] = label
    with pytest.raises(RuntimeError, match=rf"labels: element {at} is {label}, but there are 10 classes"):
        ops.corrupt_labels(y, ops.random_key(1), 10, 0.5)


def test_out_is_not_the_labels() -> None:
    y = torch.zeros(10, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="out shares memory with labels"):
        ops.corrupt_labels(y[:8], ops.random_key(1), 5, out=y[2:])
    index = torch.arange(8)
    with pytest.raises(RuntimeError, match="out shares memory"):
        ops.corrupt_labels(y[:8], ops.random_key(1), 5, index=index, out=index)


@pytest.mark.parametrize("law", ["truncated_normal", "cauchy"])
def test_draws_of_an_unknown_law(law: str) -> None:
    with pytest.raises(ValueError, match="distribution"):
        ops.draw_samples(3, 1, ops.random_key(1), distribution=law)


@pytest.mark.parametrize("index", [torch.tensor([0.0, 0.5, 1.0]), [0, 1, 2], torch.tensor([True, False, True])])
def test_numbers_of_samples_are_integers(index: Any) -> None:
    """No fraction is cut off."""
    for call in (
        lambda: ops.draw_samples(3, 1, ops.random_key(1), index=index),
        lambda: ops.corrupt_labels(torch.zeros(3, dtype=torch.int64), ops.random_key(1), 5, index=index),
    ):
        with pytest.raises(TypeError, match=r"index: .* given; give the numbers of the samples"):
            call()


def test_without_a_kernel_the_reference_runs_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_labels._library, "DEVICES", frozenset())
    monkeypatch.setattr(_labels, "_warned", set())
    y, key = labels_of((50,), 10, 1), ops.random_key(1)
    with pytest.warns(UserWarning, match="no kernel for cpu"):
        noisy = ops.corrupt_labels(y, key, 10, 0.5)
    assert torch.equal(noisy, by_reference(y, key, 10, 0.5, "exclude_true", None))
    assert ops.draw_samples(5, 2, key).shape == (5, 2)
    y[3] = 10
    with pytest.raises(RuntimeError, match="element 3 is 10"):
        ops.corrupt_labels(y, key, 10, 0.5)
