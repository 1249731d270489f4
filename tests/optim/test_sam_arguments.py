"""What SAM refuses to be built from, or to work on: the message names the argument, and nothing has moved."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flatmin import SAM
from models import (
    build,
    give_grads,
    params_of,
    same_bits,
    sgd,
    small_net,
    torch_optimizers,
    weights,
    wrappable_optimizers,
)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": -0.1}, ValueError, "rho: -0.1"),
        ({"rho": math.nan}, ValueError, "rho: nan"),
        ({"rho": math.inf}, ValueError, "rho: inf"),
        ({"rho": "0.1"}, TypeError, "rho: '0.1'"),
        ({"rho": torch.ones(2)}, ValueError, r"rho: a tensor of shape \(2,\)"),
        ({"p": 0.5}, ValueError, "p: 0.5"),
        ({"p": math.nan}, ValueError, "p: nan"),
        ({"p": "2"}, TypeError, "p: '2'"),
        ({"adaptive": "asma"}, ValueError, "adaptive: 'asma'"),
        ({"eta": -1.0}, ValueError, "eta: -1.0"),
        ({"eps": math.nan}, ValueError, "eps: nan"),
        ({"interval": 0}, ValueError, "interval: 0"),
        ({"interval": 1.5}, ValueError, "interval: 1.5"),
        ({"start": -1}, ValueError, "start: -1"),
        ({"rounding": "up"}, ValueError, "rounding: 'up'"),
        ({"sync": "global"}, ValueError, "sync: 'global'"),
        ({"model": "net"}, TypeError, "model: str"),
        ({"same_rng": True}, ValueError, "same_rng: True needs model="),
        ({"lr": 0.1}, TypeError, "lr: given with an optimizer instance"),
        ({"base": torch.optim.SGD}, TypeError, "base: given with an optimizer instance"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SAM(sgd(small_net().parameters()), **options)


def test_what_is_no_base_is_refused() -> None:
    params = list(small_net().parameters())
    with pytest.raises(TypeError, match="base: missing"):
        SAM(params, rho=0.1)
    with pytest.raises(TypeError, match="base: missing"):
        SAM(torch.optim.SGD)
    with pytest.raises(ValueError, match="empty parameter list"):
        SAM([], torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match="two names of one argument"):
        SAM(params, torch.optim.SGD, base_optimizer=torch.optim.SGD)
    with pytest.raises(TypeError, match="base: SAM is a wrapper itself"):
        SAM(SAM(sgd(params)))
    with pytest.raises(TypeError, match="base: LBFGS evaluates its closure"):
        SAM(torch.optim.LBFGS(params))
    with pytest.raises(TypeError, match="base: made dict"):
        SAM(params, dict.fromkeys)
    with pytest.raises(TypeError, match="base: SGD"):
        SAM(params, sgd(params))


def test_an_optimizer_is_wrapped_once() -> None:
    base = sgd(small_net().parameters())
    SAM(base)
    with pytest.raises(ValueError, match="Wrap an optimizer once"):
        SAM(base)


def test_radii_of_groups_are_checked() -> None:
    a, b = params_of([1.0], [1.0])
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['sam_rho'\]: -1.0"):
        SAM(sgd([{"params": [a]}, {"params": [b], "sam_rho": -1.0}]))
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['rho'\]"):
        SAM(sgd([{"params": [a], "rho": 0.1}, {"params": [b]}]))
    opt = SAM(sgd([{"params": [a]}]))
    with pytest.raises(ValueError, match=r"sam_rho: -1\.0"):
        opt.add_param_group({"params": [b], "sam_rho": -1.0})
    assert len(opt.param_groups) == 1
    opt.param_groups[0]["sam_rho"] = -1.0
    give_grads([a], [1.0])
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['sam_rho'\]: -1.0"):
        opt.ascend()
    assert a.item() == 1.0


def test_a_sparse_gradient_is_refused_before_anything_moves() -> None:
    dense, embedding = nn.Linear(2, 2), nn.Embedding(4, 2, sparse=True)
    named = [{"params": list(dense.named_parameters())}, {"params": [("table", embedding.weight)]}]
    opt = SAM(torch.optim.SGD(named, lr=0.1), rho=0.1)
    before = [*weights(dense), *weights(embedding)]
    dense(embedding(torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(RuntimeError, match=r"param_groups\[1\]\['params'\]\[0\] \(table\) .*sparse"):
        opt.ascend()
    assert same_bits([*dense.parameters(), *embedding.parameters()], before)
    opt.param_groups[1]["sam_rho"] = 0.0
    with opt.perturb():
        assert same_bits(embedding.parameters(), before[2:])
        assert not same_bits(dense.parameters(), before[:2])
        dense(embedding(torch.tensor([1, 2]))).sum().backward()
    opt.step()
    assert not same_bits(embedding.parameters(), before[2:])


def test_group_keys_collide_with_no_optimizer_of_torch() -> None:
    ours = {"sam_rho", "sam_adaptive", "sam_eta", "sam_step", "sam_seed", "sam_ascents"}
    checked = 0
    for cls in torch_optimizers():
        matrix = nn.Parameter(torch.ones(2, 2))
        base = build(cls, [matrix])
        assert not ours & (base.defaults.keys() | base.param_groups[0].keys())
        if cls in wrappable_optimizers():
            opt = SAM(base, rho=0.2, rounding="stochastic")
            assert ours <= opt.param_groups[0].keys()
            assert opt.param_groups[0] is base.param_groups[0]
            checked += 1
    assert checked >= 12
