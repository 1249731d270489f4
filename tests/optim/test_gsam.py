"""GSAM against its golden trajectories, its identities and the decomposition in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import q4
from flatmin import GSAM, SAM
from models import (
    Batch,
    backward,
    batches,
    same_bits,
    sgd,
    small_net,
    step_closure,
    step_context,
    step_davda54,
    step_halves,
    train,
    weights,
)

WAYS = [step_context, step_closure, step_davda54, step_halves]


@pytest.mark.parametrize(
    ("minimize", "expected"),
    [
        ("perturbed", (0.1821496169, -0.508309004, 0.412908981, 0.2341419938)),
        ("loss", (0.3170207428, -0.5082296908, 0.3981683424, 0.2212747078)),
    ],
)
def test_golden_trajectory(minimize: str, expected: tuple[float, ...]) -> None:
    found = q4.trajectory(lambda params: GSAM(q4.sgd(params), rho=0.1, alpha=0.4, minimize=minimize))
    torch.testing.assert_close(found, q4.golden(*expected), rtol=0, atol=2e-10)


def test_alpha_0_is_sam_to_the_bit() -> None:
    data, nets = batches(4), [small_net(), small_net()]
    train(nets[0], GSAM(sgd(nets[0].parameters(), momentum=0.9), rho=0.1, alpha=0.0), data)
    train(nets[1], SAM(sgd(nets[1].parameters(), momentum=0.9), rho=0.1), data)
    assert same_bits(weights(nets[0]), weights(nets[1]))


def test_alpha_0_of_the_other_decomposition_is_the_base_to_the_bit() -> None:
    data, nets = batches(4), [small_net(), small_net()]
    train(nets[0], GSAM(sgd(nets[0].parameters()), rho=0.1, alpha=0.0, minimize="loss"), data)
    bare = sgd(nets[1].parameters())
    for batch in data:
        bare.zero_grad()
        backward(nets[1], batch)
        bare.step()
    assert same_bits(weights(nets[0]), weights(nets[1]))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("minimize", ["perturbed", "loss"])
def test_every_way_of_stepping_is_the_decomposition(way: Callable[..., None], minimize: str) -> None:
    """One step from the same weights, with the gradients and the combination written out in plain torch."""
    net, twin, (batch,) = small_net(torch.float64), small_net(torch.float64), batches(1, torch.float64)
    way(net, GSAM(sgd(net.parameters()), rho=0.1, alpha=0.7, minimize=minimize), batch)
    by_hand(twin, batch, minimize)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def by_hand(net: nn.Module, batch: Batch, minimize: str, rho: float = 0.1, alpha: float = 0.7, lr: float = 0.1) -> None:
    params = list(net.parameters())
    backward(net, batch)
    first = [p.grad for p in params]
    norm = torch.cat([g.flatten() for g in first]).norm()
    with torch.no_grad():
        for p, g in zip(params, first, strict=True):
            p.add_(rho * g / norm)
            p.grad = None
    backward(net, batch)
    with torch.no_grad():
        for p, g in zip(params, first, strict=True):
            p.sub_(rho * g / norm)
        g1, g2 = (torch.cat([g.flatten() for g in gs]) for gs in (first, [p.grad for p in params]))
        if minimize == "perturbed":
            total = g2 - alpha * (g1 - g1 @ g2 / (g2 @ g2) * g2)
            assert abs(float((total - g2) @ g2)) < 1e-15
        else:
            total = g1 + alpha * (g2 - g1 @ g2 / (g1 @ g1) * g1)
        for p, part in zip(params, total.split([p.numel() for p in params]), strict=True):
            p.sub_(lr * part.view_as(p))


def test_parallel_gradients_leave_the_second() -> None:
    """On a quadratic with one curvature g2 is parallel to g1, and GSAM is SAM."""
    p, q = (nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)) for _ in range(2))
    for opt, w in ((GSAM(sgd([p]), rho=0.1, alpha=0.9), p), (SAM(sgd([q]), rho=0.1), q)):
        for _ in range(3):
            opt.zero_grad()
            (w @ w).backward()
            with opt.perturb():
                (w @ w).backward()
            opt.step()
    torch.testing.assert_close(p, q, rtol=1e-14, atol=0)


def test_the_radius_follows_the_learning_rate_of_each_group() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = GSAM(
        torch.optim.SGD([{"params": params[:1]}, {"params": params[1:], "gsam_rho_min": 0.0}], lr=0.1),
        rho=0.6,
        rho_min=0.1,
        lr_max=0.1,
        lr_min=0.02,
    )
    assert [opt.radius(group) for group in opt.param_groups] == [0.6, 0.6]
    for group in opt.param_groups:
        group["lr"] = 0.06
    assert [opt.radius(group) for group in opt.param_groups] == pytest.approx([0.35, 0.3])
    for group in opt.param_groups:
        group["lr"] = 0.02
    assert [opt.radius(group) for group in opt.param_groups] == pytest.approx([0.1, 0.0])
    constant = GSAM(sgd(params), rho=0.6, rho_min=0.1, lr_max=0.1, lr_min=0.1)
    assert constant.radius(constant.param_groups[0]) == 0.6


def test_a_parameter_without_second_gradient_takes_no_part() -> None:
    used, lost = (nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64)) for _ in range(2))
    opt = GSAM(sgd([used, lost]), rho=0.1)
    ((used**3).sum() + (lost**2).sum()).backward()
    with opt.perturb():
        (used**3).sum().backward()
    opt.step()
    assert torch.equal(lost, torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert not torch.equal(used, lost)


@pytest.mark.parametrize("way", [step_context, step_closure])
def test_an_exception_in_the_second_pass_combines_nothing(way: Callable[..., None], monkeypatch: Any) -> None:
    net, (batch,) = small_net(), batches(1)
    opt, before, calls = GSAM(sgd(net.parameters()), rho=0.1), weights(net), []
    monkeypatch.setattr(opt, "combine", lambda first, second: calls.append(1))

    def fails(module: nn.Module, args: Any) -> None:
        if not same_bits(weights(net), before):
            raise KeyboardInterrupt

    handle = net.register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        way(net, opt, batch)
    handle.remove()
    assert same_bits(weights(net), before)
    assert not calls
    way(net, opt, batch)
    assert calls == [1]


def test_accumulated_micro_batches_are_combined_one_by_one() -> None:
    net, twin, data = small_net(torch.float64), small_net(torch.float64), batches(2, torch.float64)
    opt = GSAM(sgd(net.parameters()), rho=0.1, alpha=0.7)
    opt.backward(lambda i: nn.functional.cross_entropy(net(data[i][0]), data[i][1]), m=2)
    opt.step()
    moved = []
    for batch in data:
        net_i = small_net(torch.float64)
        by_hand(net_i, batch, "perturbed", lr=0.05)
        moved.append([p - w for p, w in zip(weights(net_i), weights(twin), strict=True)])
    for p, w, a, b in zip(weights(net), weights(twin), *moved, strict=True):
        torch.testing.assert_close(p, w + a + b, rtol=1e-12, atol=1e-14)


def test_gradients_are_combined_before_they_are_unscaled() -> None:
    """A scaler of 2^10: the same step as without, and an order that mixes two scales is refused."""
    nets, (batch,) = [small_net() for _ in range(3)], batches(1)
    step_context(nets[0], GSAM(sgd(nets[0].parameters()), rho=0.1), batch)
    for net, unscale in ((nets[1], False), (nets[2], True)):
        opt, scaler = GSAM(sgd(net.parameters()), rho=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(loss_of_batch(net, batch)).backward()
        with opt.perturb():
            scaler.scale(loss_of_batch(net, batch)).backward()
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        for p, q in zip(net.parameters(), nets[0].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    net, scaler = small_net(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt, before = GSAM(sgd(net.parameters()), rho=0.1), weights(net)
    scaler.scale(loss_of_batch(net, batch)).backward()
    opt.ascend()
    opt.zero_grad()
    scaler.scale(loss_of_batch(net, batch)).backward()
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="two scales"):
        scaler.step(opt)
    assert same_bits(weights(net), before)


def loss_of_batch(net: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = nn.functional.cross_entropy(net(batch[0]), batch[1])
    return loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha: -1.0 given; give a finite float >= 0"),
        ({"alpha": "x"}, "alpha: 'x' given; give a float"),
        ({"minimize": "gap"}, "minimize: 'gap' given; give one of 'perturbed', 'loss'"),
        ({"rho_min": 0.1}, "lr_max: missing"),
        ({"rho_min": 0.1, "lr_max": 0.1, "lr_min": 0.2}, "lr_max: 0.1 given, below lr_min"),
        ({"rho_min": -0.1, "lr_max": 0.1}, "rho_min: -0.1 given"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        GSAM(sgd([nn.Parameter(torch.ones(2))]), rho=0.1, **options)


def test_one_ascent_per_rank_is_refused() -> None:
    net, (batch,) = small_net(), batches(1)
    opt = GSAM(sgd(net.parameters()), rho=0.1)
    with pytest.raises(ValueError, match="no_sync: GSAM steps with both gradients"):
        opt.backward(lambda: loss_of_batch(net, batch), no_sync=torch.no_grad)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_first_gradient_is_kept_however_the_loop_clears(set_to_none: bool) -> None:
    results = []
    for clears in (True, set_to_none):
        net = small_net()
        opt = GSAM(sgd(net.parameters()), rho=0.1, alpha=0.7)
        for batch in batches(3):
            opt.zero_grad(set_to_none=clears)
            backward(net, batch)
            with opt.perturb():
                backward(net, batch)
            opt.step()
        results.append(weights(net))
    assert same_bits(*results)


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_weights_and_buffers_come_back_when_a_method_fails(
    way: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a relative of SAM does between the passes."""
    net, (batch,) = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), batches(1)
    opt, before = GSAM(sgd(net.parameters()), rho=0.1, model=net), weights(net)

    def fails(*gradients: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(opt, "combine", fails)
    with pytest.raises(MemoryError):
        way(net, opt, batch)
    opt.restore()  # of the ways that leave it to the loop
    assert same_bits(weights(net), before)
    assert int(net[2].num_batches_tracked) == 1
    assert not opt._set.perturbed
