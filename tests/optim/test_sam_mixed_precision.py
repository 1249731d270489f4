"""SAM in mixed precision: GradScaler, clipping between unscaling and step, autocast."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

from flatmin import SAM
from models import (
    Batch,
    backward,
    batches,
    distance,
    loss_of,
    same_bits,
    small_net,
    train,
    weights,
)


def momentum_sgd(net: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, **options)


# ---- mixed precision ----


def scaled_step(
    net: nn.Module, opt: SAM, batch: Batch, scaler: torch.amp.GradScaler, poison: str, restore: bool
) -> None:
    """A step with GradScaler, with an infinite gradient in one of the passes, restored before scaler.step or not."""
    opt.zero_grad()
    scaler.scale(loss_of(net, batch)).backward()
    if poison == "first":
        next(net.parameters()).grad.view(-1)[0] = torch.inf
    opt.ascend()
    opt.zero_grad()
    scaler.scale(loss_of(net, batch)).backward()
    if poison == "second":
        next(net.parameters()).grad.view(-1)[0] = torch.inf
    if restore:
        opt.restore()
    scaler.step(opt)
    scaler.update()


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("fused_base", [True, False])
@pytest.mark.parametrize("poison", ["none", "first", "second"])
def test_grad_scaler(poison: str, fused_base: bool, restore: bool) -> None:
    net, data = small_net(), batches(3)
    opt = SAM(momentum_sgd(net, fused=fused_base), rho=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert opt._step_supports_amp_scaling == fused_base
    before = weights(net)
    scaled_step(net, opt, data[0], scaler, poison, restore)
    assert not hasattr(opt, "grad_scale")
    assert not hasattr(opt, "found_inf")
    if poison == "second":
        assert same_bits(net.parameters(), before)
        assert scaler.get_scale() == 512.0
        return
    plain = small_net()
    bare = SAM(momentum_sgd(plain, fused=fused_base), rho=0.1 if poison == "none" else 0.0)
    train(plain, bare, data[:1])
    assert scaler.get_scale() == 1024.0
    # a power of two scales exactly; the fused kernels of torch unscale in another place, which rounds differently
    assert distance(weights(net), weights(plain)) <= (1e-7 if fused_base else 0.0)


@pytest.mark.parametrize("fused_base", [True, False])
def test_only_a_base_that_scales_is_given_the_scale(fused_base: bool) -> None:
    net = small_net()
    opt = SAM(momentum_sgd(net, fused=fused_base), rho=0.1)
    seen = []
    opt.base.register_step_pre_hook(lambda base, *_: seen.append(float(getattr(base, "grad_scale", 0.0))))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_step(net, opt, batches(1)[0], scaler, poison="none", restore=False)
    assert seen == [1024.0 if fused_base else 0.0]


@pytest.mark.parametrize("scale", [2.0**-12, 2.0**16])
def test_the_ascent_does_not_see_the_loss_scale(scale: float) -> None:
    results = []
    for factor in (1.0, scale):
        net = small_net()
        opt = SAM(momentum_sgd(net), rho=0.1, eps=0.0)
        (factor * loss_of(net, batches(1)[0])).backward()
        opt.ascend()
        results.append(weights(net))
    assert same_bits(*results)


def test_unscale_and_clip_after_the_second_pass() -> None:
    results = []
    for scale in (1.0, 1024.0):
        net = small_net()
        opt = SAM(momentum_sgd(net), rho=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for batch in batches(4):
            opt.zero_grad()
            scaler.scale(loss_of(net, batch)).backward()
            with opt.perturb():
                scaler.scale(loss_of(net, batch)).backward()
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            scaler.step(opt)
            scaler.update()
        results.append(weights(net))
    assert distance(*results) < 1e-6
    assert distance(results[0], weights(small_net())) < 4 * 0.1 * 0.1 * 3.5  # four clipped steps with momentum 0.9


def test_backward_with_a_scaler() -> None:
    net, batch = small_net(), batches(1)[0]
    opt = SAM(momentum_sgd(net), rho=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = opt.backward(lambda: loss_of(net, batch), scaler=scaler)
    scaler.step(opt)
    plain = small_net()
    train(plain, SAM(momentum_sgd(plain), rho=0.1), [batch])
    assert loss.item() == loss_of(small_net(), batch).item()
    assert same_bits(net.parameters(), plain.parameters())


def test_one_autocast_block_around_both_passes() -> None:
    """autocast keeps 16-bit copies of the weights until its outermost block ends: those of ``w`` are wrong at
    ``w + e``, and those of ``w + e`` are wrong afterwards."""

    def mixed() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    results = []
    for outermost in (mixed, contextlib.nullcontext):
        net, batch = small_net(), batches(1)[0]
        opt = SAM(momentum_sgd(net), rho=0.5)
        with outermost():
            with mixed():
                backward(net, batch)
            with opt.perturb(), mixed():
                backward(net, batch)
            with mixed():
                after = loss_of(net, batch).detach()
        results.append([after, *(p.grad for p in net.parameters())])
    assert same_bits(*results)
