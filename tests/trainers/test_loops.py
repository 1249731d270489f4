"""timm, skorch, ignite, fastai: each recipe is SAM."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from plain_sam import difference, losses_of, moved, plain_sam, value

Load = Callable[[str], ModuleType]


def decayed(net: nn.Module) -> Callable[[Any], torch.optim.Optimizer]:
    """SGD with Nesterov's momentum and weight decay of matrices alone, as timm builds it."""

    def build(params: Any) -> torch.optim.Optimizer:
        params = list(params)
        groups = [
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
            {"params": [p for p in params if p.dim() > 1], "weight_decay": 1e-4},
        ]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    return build


@pytest.mark.requires("timm")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_timm_loop_is_sam(recipe: Load, dtype: torch.dtype) -> None:
    loop, toy = recipe("timm_loop"), recipe("_toy")
    net, data = toy.net(), toy.batches(20)
    start = copy.deepcopy(net)
    ema = loop.train(net, data, dtype=dtype)
    steps = losses_of(data, autocast=dtype)
    expected = plain_sam(start, steps, decayed(net), clip=1.0, dtype=torch.float32)
    assert moved(net, start) > 0.1
    # the scale keeps gradients that float16 rounds to nothing; in bfloat16 it changes no bit of the ratio
    assert difference(net, expected) < (1e-5 if dtype == torch.bfloat16 else 2e-3)
    assert 0 < difference(ema.module, net) < moved(net, start)


@pytest.mark.requires("timm")
def test_an_overflow_in_the_timm_loop_steps_nothing(recipe: Load) -> None:
    loop, toy = recipe("timm_loop"), recipe("_toy")
    net, data = toy.net(), toy.batches(2)
    start = copy.deepcopy(net)
    loop.train(net, [(x * 1e30, y) for x, y in data], dtype=torch.float16)
    assert difference(net, start) == 0.0


@pytest.mark.requires("skorch")
def test_skorch_is_sam_with_the_clean_loss_in_its_history(recipe: Load) -> None:
    skorch, toy = recipe("skorch_net"), recipe("_toy")
    net, data = toy.net(), toy.batches(20)
    start = copy.deepcopy(net)
    model = skorch.train(net, data)
    steps = losses_of(data)
    assert moved(model.module_, start) > 0.1
    assert difference(model.module_, plain_sam(start, steps)) < 1e-6
    assert model.history[0]["batches"][0]["train_loss"] == pytest.approx(value(steps[0][0], start), rel=1e-6)


@pytest.mark.requires("skorch")
def test_a_radius_of_a_live_skorch_net_is_reached_or_refused(recipe: Load) -> None:
    skorch, toy = recipe("skorch_net"), recipe("_toy")
    data = toy.batches(4)
    model = skorch.train(toy.net(), data)
    model.set_params(optimizer__sam_rho=0.2)
    assert [group["sam_rho"] for group in model.optimizer_.param_groups] == [0.2]
    model.set_params(optimizer__rho=0.3)
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['rho'\]: nobody would read it"):
        model.partial_fit(x, y)


@pytest.mark.requires("ignite")
def test_ignite_is_sam_and_gives_the_clean_loss(recipe: Load) -> None:
    engine, toy = recipe("ignite_engine"), recipe("_toy")
    net, data = toy.net(), toy.batches(20)
    start = copy.deepcopy(net)
    losses = engine.train(net, data)
    steps = losses_of(data)
    assert moved(net, start) > 0.1 and difference(net, plain_sam(start, steps)) < 1e-6
    assert losses[0] == pytest.approx(value(steps[0][0], start), rel=1e-6)


@pytest.mark.requires("fastai")
def test_the_fastai_callback_is_sam(recipe: Load) -> None:
    callback, toy = recipe("fastai_callback"), recipe("_toy")
    net, data = toy.net(), toy.batches(20)
    start = copy.deepcopy(net)
    callback.train(net, data)
    assert moved(net, start) > 0.1 and difference(net, plain_sam(start, losses_of(data))) < 1e-6
