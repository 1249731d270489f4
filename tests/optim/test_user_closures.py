"""Closures of users and trainers: empty, after the context, that clear or do not: the right weights or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin import SAM, PerturbedOPT
from models import (
    backward,
    batches,
    same_bits,
    sgd,
    small_net,
    weights,
    weights_after,
)

# ---- closures of trainers ----


@pytest.mark.parametrize("samples", [1, 3])
def test_an_empty_closure_is_none(samples: int) -> None:
    """Lightning's manual optimization passes a closure that does nothing to every step."""
    nets = [small_net(), small_net()]
    for net, arguments in zip(nets, [(), (lambda: None,)], strict=True):
        opt = PerturbedOPT(sgd(net.parameters()), sizing="isotropic", scale=0.1, samples=samples, generator=seeded())
        for batch in batches(3):
            opt.zero_grad()
            with opt.perturb():
                backward(net, batch)
            opt.step(*arguments)
    assert same_bits(weights(nets[0]), weights(nets[1]))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("closure", [lambda: None, lambda: torch.tensor(1.0)])
def test_an_empty_closure_after_the_context_is_sams_step(closure: Callable[[], Any]) -> None:
    net = small_net()
    opt = SAM(sgd(net.parameters()), rho=0.1)
    for batch in batches(3):
        opt.zero_grad()
        backward(net, batch)
        with opt.perturb():
            backward(net, batch)
        opt.step(closure)
    assert same_bits(weights(net), weights_after(3))


@pytest.mark.parametrize("wrap", [SAM, PerturbedOPT])
def test_a_closure_after_the_context_may_clip(wrap: type[SAM | PerturbedOPT]) -> None:
    """Lightning's manual optimization clips in the closure: a write to the gradients, but no gradient."""
    nets = [small_net(), small_net()]
    for net, by_closure in zip(nets, [False, True], strict=True):
        noise = {"sizing": "isotropic", "scale": 0.1, "samples": 2, "generator": seeded()}
        opt = wrap(sgd(net.parameters()), **({"rho": 0.1} if wrap is SAM else noise))

        def clip(net: nn.Module = net) -> None:
            nn.utils.clip_grad_norm_(net.parameters(), 0.01)

        for batch in batches(3):
            opt.zero_grad()
            if wrap is SAM:
                backward(net, batch)
            with opt.perturb():
                backward(net, batch)
            if by_closure:
                opt.step(clip)
            else:
                clip()
                opt.step()
    assert same_bits(weights(nets[0]), weights(nets[1]))


def test_a_closure_that_adds_after_the_context_is_refused() -> None:
    net, data = small_net(), batches(2)
    opt = SAM(sgd(net.parameters()), rho=0.1)
    backward(net, data[0])
    with opt.perturb():
        backward(net, data[0])
    with pytest.raises(RuntimeError, match="added its gradient to one that was there"):
        opt.step(lambda: backward(net, data[1]))


def test_a_closure_that_adds_to_earlier_micro_batches_is_refused() -> None:
    net, data = small_net(), batches(2)
    opt, before = SAM(sgd(net.parameters()), rho=0.1), weights(net)
    backward(net, data[0])
    with pytest.raises(RuntimeError, match="added its gradient to one that was there"):
        opt.step(lambda: backward(net, data[1]))
    assert same_bits(weights(net), before)
    noise = PerturbedOPT(sgd(net.parameters()), sizing="isotropic", scale=0.1, samples=2)
    with pytest.raises(RuntimeError, match="added its gradient to one that was there"):
        noise.step(lambda: backward(net, data[1]))
    assert same_bits(weights(net), before)


@pytest.mark.parametrize("outside", ["None", "zeros"])
def test_a_closure_may_leave_the_clearing_to_the_loop(outside: str) -> None:
    net = small_net()
    opt = SAM(sgd(net.parameters()), rho=0.1)
    for batch in batches(3):
        opt.zero_grad(set_to_none=outside == "None")
        opt.step(lambda batch=batch: backward(net, batch))
    assert same_bits(weights(net), weights_after(3))


@pytest.mark.parametrize("clear", ["opt", "module to zeros", "by hand"])
def test_a_closure_may_clear_in_any_way(clear: str) -> None:
    net = small_net()
    opt = SAM(sgd(net.parameters()), rho=0.1)
    for batch in batches(3):

        def closure(batch: Any = batch) -> Tensor:
            if clear == "opt":
                opt.zero_grad(set_to_none=False)
            elif clear == "module to zeros":
                net.zero_grad(set_to_none=False)
            else:
                for p in net.parameters():
                    p.grad = None
            return backward(net, batch)

        opt.step(closure)
    assert same_bits(weights(net), weights_after(3))
