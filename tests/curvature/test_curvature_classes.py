"""Where the classes are: the dimension of the logits, and labels that take no part."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatmin
from flatmin import curvature
from models import same_bits

pytestmark = pytest.mark.usefixtures("one_thread")

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
