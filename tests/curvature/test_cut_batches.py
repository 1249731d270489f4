"""Batches cut into pieces, for micro-batches and for groups of samples: whatever container they come in."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatmin import curvature
from flatmin.sharpness import m_sharpness
from several_passes import inputs, net

pytestmark = pytest.mark.usefixtures("one_thread")


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Fields:
    x: Tensor
    y: Tensor


class Encoding(collections.UserDict[str, Tensor]):
    """As the batches of a tokenizer: a mapping whose items are attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


class Movable:
    """An object that nobody knows how to cut."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def to(self, device: torch.device) -> Movable:
        return Movable(self.x.to(device), self.y.to(device))


def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch.x), batch.y


def ragged(form: Callable[..., Any]) -> list[Any]:
    x, y = inputs(10), torch.arange(10) % 2
    return [form(x=x[:7], y=y[:7]), form(x=x[7:], y=y[7:])]


def pairs() -> list[tuple[Tensor, Tensor]]:
    return [tuple(pair) for pair in ragged(Pair)]


FORMS: dict[str, Callable[..., Any]] = {"named tuple": Pair, "dataclass": Fields, "mapping with attributes": Encoding}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_pieces_of_any_container_have_their_due_weight(form: Callable[..., Any]) -> None:
    """A container that was taken whole for every piece let a batch of 7 count as four of 7."""
    data = curvature.Batches(ragged(form), forward=forward)
    v = torch.ones(26, dtype=torch.float64)
    expected = curvature.linear_operator(net(), F.cross_entropy, pairs()) @ v
    found = curvature.linear_operator(net(), F.cross_entropy, data, micro_batch=2) @ v
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    groups = m_sharpness(net(), F.cross_entropy, data, 0.1, 3)
    assert groups.sizes == (3, 3, 3, 1)
    assert groups.per_group == pytest.approx(m_sharpness(net(), F.cross_entropy, pairs(), 0.1, 3).per_group, rel=1e-12)


def test_a_pair_of_mappings_is_no_list_with_one_item_for_each_sample() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            return self.net(inputs["x"])

    def loss_fn(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, targets["y"])

    x, y = inputs(4), torch.arange(4) % 2
    data = [({"x": x[i : i + 2]}, {"y": y[i : i + 2]}) for i in (0, 2)]
    v = torch.ones(26, dtype=torch.float64)
    found = curvature.linear_operator(Named(), loss_fn, data, micro_batch=1) @ v
    torch.testing.assert_close(found, curvature.linear_operator(Named(), loss_fn, data) @ v, rtol=1e-12, atol=1e-15)


def test_lists_of_plain_values_are_cut_by_sample_and_others_kept() -> None:
    x = inputs(3)
    seen: list[Any] = []

    def noting(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        seen.append((len(batch["x"]), batch["names"], batch["scale"], batch["shape"]))
        return model(batch["x"]), torch.zeros(len(batch["x"]), dtype=torch.int64)

    batch = {"x": x, "names": ["a", "b", "c"], "scale": 2.0, "shape": (4, 5)}
    m_sharpness(net(), F.cross_entropy, curvature.Batches([batch], forward=noting), 0.1, 2)
    assert [one for i, one in enumerate(seen) if one not in seen[:i]] == [
        (2, ["a", "b"], 2.0, (4, 5)),
        (1, ["c"], 2.0, (4, 5)),
    ]


def test_what_cannot_be_cut_is_refused() -> None:
    data = curvature.Batches(ragged(Movable), forward=forward)
    v = torch.ones(26, dtype=torch.float64)
    whole = curvature.linear_operator(net(), F.cross_entropy, data, micro_batch=7) @ v  # nothing to cut
    torch.testing.assert_close(whole, curvature.linear_operator(net(), F.cross_entropy, data) @ v)
    with pytest.raises(ValueError, match="micro_batch: cannot cut a Movable in a batch of 7 samples; give"):
        curvature.linear_operator(net(), F.cross_entropy, data, micro_batch=2) @ v
    with pytest.raises(ValueError, match="data: cannot cut a Movable in a batch of 7 samples; give"):
        m_sharpness(net(), F.cross_entropy, data, 0.1, 2)
    tokens = curvature.Batches(ragged(Fields), forward=forward, size=lambda batch: 5 * len(batch.x))
    with pytest.raises(ValueError, match=r"data: cannot cut a tensor of shape \(7, 3\) in a batch of 35 samples"):
        m_sharpness(net(), F.cross_entropy, tokens, 0.1, 2)


def test_features_made_in_inference_mode_are_measured() -> None:
    """As a linear probe has them: autograd does not take such tensors."""
    model = net()
    with torch.inference_mode():
        data = [(x + 0.0, y + 0) for x, y in pairs()]
        found = curvature.eigenvalues(model, F.cross_entropy, data, k=2)
        with pytest.raises(ValueError, match="params: tensor 0 was made in inference mode"):
            curvature.eigenvalues(net(), F.cross_entropy, data, k=2)
    assert found.values == curvature.eigenvalues(net(), F.cross_entropy, pairs(), k=2).values
