"""What measuring refuses: the error names the argument or the parameter, and the way out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatmin
from flatmin import curvature
from models import batches, small_net
from snapshots import assert_as_before, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")


def ones(net: nn.Module) -> list[Tensor]:
    return [torch.ones_like(p) for p in net.parameters() if p.requires_grad]


# ---- refusals ----


def test_an_operator_without_double_backward_names_the_way_out() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
            return F.scaled_dot_product_attention(q, k, v).mean((1, 2))

    torch.manual_seed(0)
    net, data = Attention(), (torch.randn(2, 5, 4, dtype=torch.float64), torch.tensor([0, 3]))
    before = snapshot(net)
    for call in (curvature.hutchinson_diag, curvature.exact_diag):
        with pytest.raises(RuntimeError, match="method='finite_difference'"):
            call(net, F.cross_entropy, data)
    assert_as_before(net, before)
    v = ones(net)
    found = curvature.hvp(net, F.cross_entropy, data, v, method="finite_difference")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = curvature.hvp(net, F.cross_entropy, data, v)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(found, exact, strict=True))


def test_an_error_of_the_model_is_its_own() -> None:
    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match="my own"):
        curvature.hutchinson_diag(small_net(), loss_fn, batches(1))


def _net_call(**options: Any) -> Callable[[], Any]:
    arguments: dict[str, Any] = {"model": small_net(), "loss_fn": F.cross_entropy, "data": batches(1)} | options
    return lambda: curvature.hutchinson_diag(**arguments)


def _frozen() -> nn.Module:
    net = small_net()
    net.requires_grad_(False)
    return net


WEIGHT = nn.Parameter(torch.ones(2))

REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "model": (TypeError, "model: function given", _net_call(model=lambda x: x)),
    "frozen model": (ValueError, "model: none of its parameters", _net_call(model=_frozen())),
    "loss_fn": (TypeError, "loss_fn: str given", _net_call(loss_fn="mse")),
    "unreduced loss": (ValueError, r"loss_fn: returned a float32 tensor of shape \(8, 3\)",
                       _net_call(loss_fn=lambda output, y: output)),
    "iterator": (TypeError, "data: an iterator", _net_call(data=iter(batches(1)))),
    "tensor": (TypeError, "data: a float32 tensor", _net_call(data=torch.ones(3))),
    "no batch": (ValueError, "data: holds no samples", _net_call(data=[])),
    "no pair": (ValueError, "data: a batch is a float32 tensor", _net_call(data=[batches(1)[0][0]] * 3)),
    "targets": (ValueError, "data: the targets of a batch have no length", _net_call(data=[(batches(1)[0][0], 1)])),
    "one tensor": (TypeError, "params: one tensor given", _net_call(params=WEIGHT)),
    "no params": (ValueError, "params: empty", _net_call(params=[])),
    "twice": (ValueError, "params: a tensor is given twice", _net_call(params=[WEIGHT, WEIGHT])),
    "frozen": (ValueError, "params: tensor 0 does not require", _net_call(params=[torch.ones(2)])),
    "complex": (TypeError, "params: tensor 0 is a complex64",
                _net_call(params=[torch.ones(2, dtype=torch.complex64, requires_grad=True)])),
    "no tensor": (TypeError, "params: item 0 is a str", _net_call(params=["weight"])),
    "samples": (ValueError, "samples: 0 given", _net_call(samples=0)),
    "distribution": (ValueError, "distribution: 'uniform' given; give one of", _net_call(distribution="uniform")),
    "method": (ValueError, "method: 'exact' given; give one of", _net_call(method="exact")),
    "step": (ValueError, "step: 0.0 given", _net_call(step=0.0)),
    "seed": (ValueError, "seed: -1 given", _net_call(seed=-1)),
    "limit": (ValueError, "limit: 239 parameters are more than 238",
              lambda: curvature.exact_diag(small_net(), F.cross_entropy, batches(1), limit=238)),
    "v": (ValueError, "v: 1 tensors given for 6",
          lambda: curvature.hvp(small_net(), F.cross_entropy, batches(1), [torch.ones(3)])),
    "shape of v": (ValueError, "v: item 0 is a float32 tensor of shape",
                   lambda: curvature.hvp(small_net(), F.cross_entropy, batches(1), [torch.ones(3)] * 6)),
    "v of one": (TypeError, "v: a float32 tensor",
                 lambda: curvature.hvp(small_net(), F.cross_entropy, batches(1), torch.ones(3))),
    "regression": (ValueError, "a Gauss-Newton-Bartlett estimate is for classifiers",
                   lambda: curvature.gnb_diag(nn.Linear(2, 2), F.mse_loss, (torch.ones(3, 2), torch.randn(3, 2)))),
    "no logits": (TypeError, "model: returned no tensor",
                  lambda: curvature.gnb_diag(nn.Flatten(0), F.mse_loss, (WEIGHT.data, WEIGHT.data), params=[WEIGHT])),
    "labels": (ValueError, r"data: targets of shape \(3, 1\)",
               lambda: curvature.gnb_diag(nn.Linear(2, 2), F.mse_loss, (torch.ones(3, 2), torch.ones(3, 1).long()))),
    "mode": (ValueError, "mode: 'mean' given; give one of",
             lambda: curvature.lipschitz(small_net(), F.cross_entropy, batches(1), mode="mean")),
    "quantile": (ValueError, "quantile: 0.0 given",
                 lambda: curvature.lipschitz(small_net(), F.cross_entropy, batches(1), quantile=0.0)),
    "curvature": (ValueError, "curvature: 'fisher' given; give one of",
             lambda: curvature.lipschitz(small_net(), F.cross_entropy, batches(1), curvature="fisher")),
    "neighbourhood": (ValueError, "gamma and eps: both 0",
                      lambda: curvature.lipschitz(small_net(), F.cross_entropy, batches(1), gamma=0.0, eps=0.0)),
    "noise of lipschitz": (
        ValueError, "distribution: 'normal' given; give one of",
        lambda: curvature.lipschitz(small_net(), F.cross_entropy, batches(1), distribution="normal"),
    ),
    "samples of numpy": (ValueError, "samples: np.int64\\(0\\) given", _net_call(samples=np.int64(0))),
    "seed of 65 bits": (ValueError, "seed: 18446744073709551616 given", _net_call(seed=2**64)),
    "fractional seed": (ValueError, "seed: 1.5 given", _net_call(seed=1.5)),
    "step of text": (ValueError, "step: 'x' given", _net_call(step="x")),
    "gamma": (TypeError, "gamma: 'x' given",
              lambda: curvature.lipschitz(small_net(), F.cross_entropy, batches(1), gamma="x")),
    "eps": (TypeError, "eps: None given",
            lambda: curvature.expected_sharpness(small_net(), F.cross_entropy, batches(1), scale=0.1, eps=None)),
    "quantile of text": (TypeError, "quantile: 'x' given",
                         lambda: curvature.lipschitz(small_net(), F.cross_entropy, batches(1), quantile="x")),
    "scale": (TypeError, "scale: 'x' given",
              lambda: curvature.expected_sharpness(small_net(), F.cross_entropy, batches(1), scale="x")),
    "infinite scale": (ValueError, "scale: inf given",
                       lambda: curvature.expected_sharpness(small_net(), F.cross_entropy, batches(1), scale=math.inf)),
    "lipschitz": (ValueError, "lipschitz: -1.0 given",
                  lambda: curvature.expected_sharpness(small_net(), F.cross_entropy, batches(1), scale=1.0,
                                                       lipschitz=-1.0)),
    "delta": (TypeError, "delta: 'x' given",
              lambda: flatmin.pacgen(small_net(), F.cross_entropy, batches(1), delta="x")),
    "limit of text": (ValueError, "limit: 'x' given",
                      lambda: curvature.exact_diag(small_net(), F.cross_entropy, batches(1), limit="x")),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "call"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_argument(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_a_curvature_that_is_not_finite_names_the_parameter() -> None:
    """At the weights, and where only the perturbed weights see it."""
    net = small_net()
    with torch.no_grad():
        net[2].weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"curvature: not finite in \d+ of 36 elements of '0.weight'"):
        curvature.lipschitz(net, F.cross_entropy, batches(1), curvature_samples=1)

    class Cliff(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.height = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return (self.height**2 * torch.where(self.height.detach() == 0, 1.0, float("nan"))).expand(2, 2)

    cliff = Cliff()
    with pytest.raises(
        ValueError, match="curvature at the perturbed weights: not finite in 2 of 2 elements of 'height'"
    ):
        curvature.lipschitz(cliff, lambda output, y: output.sum(), (torch.ones(2), torch.ones(2)), curvature="exact")
    assert not cliff.height.any()
