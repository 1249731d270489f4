"""Labels drawn from a softmax: one sampler for flatmin.curvature and for PerturbedOPT."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from flatmin import PerturbedOPT, curvature, ops
from flatmin.ops._softmax_labels import draw_labels

LOGITS = torch.tensor([0.0, 1.0, -2.0, 3.0])


def test_classes_come_with_the_probabilities_of_the_softmax() -> None:
    count = 40_000
    labels = draw_labels(LOGITS.expand(count, 4), ops.random_key(1))
    p = LOGITS.double().softmax(0)
    found = labels.bincount(minlength=4) / count
    assert ((found - p).abs() < 4 * (p * (1 - p) / count).sqrt()).all()


def test_labels_are_functions_of_the_key() -> None:
    rows = LOGITS.expand(100, 4)
    first = draw_labels(rows, ops.random_key(1, 2, 3))
    torch.manual_seed(5)
    assert torch.equal(first, draw_labels(rows, ops.random_key(1, 2, 3)))
    for other in (ops.random_key(2, 2, 3), ops.random_key(1, 3, 3), ops.random_key(1, 2, 4)):
        assert not torch.equal(first, draw_labels(rows, other))
    assert torch.equal(first, draw_labels(rows.double(), ops.random_key(1, 2, 3)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_crash(value: float) -> None:
    rows = torch.tensor([[0.0, value, 1.0]])
    assert draw_labels(rows, ops.random_key(0)).tolist() == [1]


def test_both_sides_draw_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one class for certain, both give the squared gradient of that label."""
    drawn = []

    def first(logits: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        drawn.append(key)
        return torch.zeros(len(logits), dtype=torch.int64)

    monkeypatch.setattr("flatmin.curvature._labels.draw_labels", first)
    monkeypatch.setattr("flatmin.optim.perturbed_opt._estimates.draw_labels", first)
    torch.manual_seed(0)
    net, x, y = torch.nn.Linear(3, 4), torch.randn(5, 3), torch.zeros(5).long()
    expected = 5 * torch.autograd.grad(F.cross_entropy(net(x), y), net.weight)[0] ** 2
    found = curvature.gnb_diag(net, F.cross_entropy, (x, y)).value[0]
    assert torch.allclose(found, expected, rtol=1e-5)
    opt = PerturbedOPT(torch.optim.SGD(net.parameters(), lr=0.1), curvature="gnb", beta1=0.0)
    opt.update_curvature(lambda: net(x))
    state = opt._set.states[net.weight]
    assert torch.allclose(state.curvature, expected, rtol=1e-5)
    assert len(drawn) == 2
