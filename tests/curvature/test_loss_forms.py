"""Losses and targets that a measurement must refuse, since it would measure something else."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatmin import curvature
from flatmin.sharpness import line
from several_passes import inputs, net

pytestmark = pytest.mark.usefixtures("one_thread")


def data() -> tuple[Tensor, Tensor]:
    return inputs(6), torch.arange(6) % 2


SUMS: dict[str, Any] = {
    "a criterion": nn.CrossEntropyLoss(reduction="sum"),
    "a partial function": functools.partial(F.cross_entropy, reduction="sum"),
    "both": functools.partial(nn.CrossEntropyLoss(reduction="sum")),
}


@pytest.mark.parametrize("loss_fn", SUMS.values(), ids=SUMS)
def test_a_sum_over_the_batch_is_refused(loss_fn: Any) -> None:
    """It would count as many times as the batch has samples."""
    for measure in (curvature.eigenvalues, curvature.hutchinson_trace, line):
        with pytest.raises(ValueError, match=r"loss_fn: has reduction='sum', .* give reduction='mean'"):
            measure(net(), loss_fn, data())


def test_a_mean_over_the_batch_is_taken() -> None:
    expected = curvature.eigenvalues(net(), F.cross_entropy, data(), k=1).values
    for loss_fn in (nn.CrossEntropyLoss(), functools.partial(F.cross_entropy, reduction="mean")):
        assert curvature.eigenvalues(net(), loss_fn, data(), k=1).values == expected


def test_the_fisher_matrix_needs_targets_for_each_sample() -> None:
    x, y = data()
    own_loss = curvature.Batches(
        [(x, y)], forward=lambda model, batch: (F.cross_entropy(model(batch[0]), batch[1]), None)
    )
    with pytest.raises(ValueError, match="data: the targets are a NoneType; matrix='fisher' takes the loss of each"):
        curvature.eigenvalues(net(), lambda loss, _: loss, own_loss, matrix="fisher")


def test_targets_of_the_fisher_matrix_in_a_mapping() -> None:
    """Counted by their tensors: the number of entries is none of samples."""
    x, y = data()

    def loss_fn(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, targets["y"])

    found = curvature.eigenvalues(net(), loss_fn, (x, {"y": y}), k=2, matrix="fisher")
    assert found.values == curvature.eigenvalues(net(), F.cross_entropy, (x, y), k=2, matrix="fisher").values


def test_layers_of_one_parameter_have_no_two_ends() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    x = inputs(6)
    found = curvature.layer_eigenvalues(model, F.mse_loss, (x, x[:, :1]), k=2, which="both", by="parameter")
    assert {name: len(one.values) for name, one in found.items()} == {
        "0.weight": 4,
        "0.bias": 2,
        "2.weight": 2,
        "2.bias": 1,
    }
    assert found["2.bias"].values == pytest.approx((2.0,))
