"""Whole trajectories: against an independent SAM, against the bare optimizer, fused against plain, resumed, summed."""

from __future__ import annotations

import copy
import functools
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from flatmin import SAM
from flatmin.optim import Lion, _fused
from models import (
    Batch,
    backward,
    batches,
    build,
    closure_of,
    distance,
    loss_of,
    same_bits,
    small_net,
    step_closure,
    step_context,
    step_davda54,
    step_halves,
    train,
    train_bare,
    trainable,
    weights,
    wrappable_optimizers,
)

SGD_WITH_MOMENTUM = functools.partial(torch.optim.SGD, momentum=0.9)
WAYS = [step_context, step_closure, step_davda54, step_halves]


# ---- an independent SAM ----


def eager_sam(net: nn.Module, data: list[Batch], rho: float, lr: float, momentum: float, decay: float) -> None:
    """SAM with SGD as the papers write it, sharing no code with the package."""
    params = list(net.parameters())
    velocity: list[Tensor | None] = [None] * len(params)
    for batch in data:
        first = torch.autograd.grad(loss_of(net, batch), params)
        length = math.sqrt(math.fsum(float((g * g).sum()) for g in first))
        old = weights(net)
        with torch.no_grad():
            for p, g in zip(params, first, strict=True):
                p += rho * g / (length + 1e-12)
        second = torch.autograd.grad(loss_of(net, batch), params)
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(params, second, strict=True)):
                p.copy_(old[i])
                g = g + decay * p
                velocity[i] = g if velocity[i] is None else momentum * velocity[i] + g
                p -= lr * velocity[i]


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_fifty_steps_follow_an_independent_sam(way) -> None:
    data = batches(10, torch.float64) * 5
    ours, theirs = small_net(torch.float64), small_net(torch.float64)
    start = weights(ours)
    opt = SAM(torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2), rho=0.1)
    train(ours, opt, data, way)
    eager_sam(theirs, data, rho=0.1, lr=0.1, momentum=0.9, decay=1e-2)
    assert distance(weights(ours), weights(theirs)) < 1e-10
    assert distance(weights(ours), start) > 0.1


def test_sam_reaches_other_weights_than_the_bare_optimizer() -> None:
    data = batches(10)
    a, b = small_net(), small_net()
    train(a, SAM(build(torch.optim.SGD, a.parameters()), rho=0.1), data)
    train_bare(b, build(torch.optim.SGD, b.parameters()), data)
    assert distance(weights(a), weights(b)) > 1e-3


# ---- radius 0 is the bare optimizer ----


@pytest.mark.parametrize("cls", wrappable_optimizers(), ids=lambda c: c.__name__)
@pytest.mark.parametrize("way", [step_context, step_closure], ids=lambda f: f.__name__)
def test_radius_zero_is_the_bare_optimizer_bit_for_bit(cls: type[torch.optim.Optimizer], way) -> None:
    data = batches(8)
    a, b = small_net(), small_net()
    opt = SAM(build(cls, trainable(cls, a)), rho=0.0)
    train(a, opt, data, way)
    train_bare(b, build(cls, trainable(cls, b)), data)
    assert same_bits(a.parameters(), b.parameters())


@pytest.mark.parametrize("cls", wrappable_optimizers(), ids=lambda c: c.__name__)
def test_every_optimizer_trains_alike_in_all_four_ways(cls: type[torch.optim.Optimizer]) -> None:
    data = batches(6, torch.float64)
    results = []
    for way in WAYS:
        net = small_net(torch.float64)
        train(net, SAM(build(cls, trainable(cls, net)), rho=0.1), data, way)
        results.append(weights(net))
    # 0 for what is not fused; Adam's fused form rounds differently from torch's
    bound = 1e-12 if cls in (torch.optim.Adam, torch.optim.AdamW) else 0.0
    assert max(distance(results[0], other) for other in results[1:]) <= bound


# ---- fused against restore and step ----


def record_fused_steps(patch: pytest.MonkeyPatch, allowed: bool) -> list[bool]:
    """A list that grows by one for each step: whether it was fused. Never, if not ``allowed``."""
    used: list[bool] = []
    fused_step = _fused.restore_and_step

    def spy(*args) -> bool:
        used.append(allowed and fused_step(*args))
        return used[-1]

    patch.setattr(_fused, "restore_and_step", spy)
    return used


def fused_and_plain(
    cls: type[torch.optim.Optimizer], options: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[Tensor], list[object], list[object]]:
    """Weights and states after five steps, with the fused operator and without. Fails if it was not used."""
    data = batches(5, dtype)
    results = []
    for allowed in (True, False):
        net = small_net(dtype)
        opt = SAM(cls(net.parameters(), **options), rho=0.1)
        with monkeypatch.context() as patch:
            used = record_fused_steps(patch, allowed)
            train(net, opt, data, step_closure)
        assert used == [allowed] * len(data)
        results.append((weights(net), [opt.state[p] for p in net.parameters() if p in opt.state]))
    (w1, s1), (w2, s2) = results
    return w1, w2, s1, s2


SGD_OPTIONS = [
    {"lr": 0.1, "momentum": m, "dampening": d, "weight_decay": wd, "nesterov": n, "maximize": mx}
    for m, d, wd, n, mx in itertools.product((0.0, 0.9), (0.0, 0.3), (0.0, 1e-2), (False, True), (False, True))
    if not n or (m > 0.0 and d == 0.0)
]


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fused_sgd_is_restore_and_step_bit_for_bit(
    options: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    w1, w2, s1, s2 = fused_and_plain(torch.optim.SGD, options, dtype, monkeypatch)
    assert same_bits(w1, w2)
    assert [list(state) for state in s1] == [list(state) for state in s2]
    assert same_bits(*([state["momentum_buffer"] for state in s if options["momentum"]] for s in (s1, s2)))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fused_lion_is_restore_and_step_bit_for_bit(
    maximize: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, object] = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "maximize": maximize}
    w1, w2, s1, s2 = fused_and_plain(Lion, options, dtype, monkeypatch)
    assert same_bits(w1, w2)
    assert [list(state) for state in s1] == [list(state) for state in s2] == [["exp_avg"]] * len(w1)
    assert same_bits(*([state["exp_avg"] for state in s] for s in (s1, s2)))


ADAM_OPTIONS = [
    {"lr": 0.01, "weight_decay": wd, "amsgrad": ams, "maximize": mx}
    for wd, ams, mx in itertools.product((0.0, 0.1), (False, True), (False, True))
]


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW], ids=lambda c: c.__name__)
@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_fused_adam_agrees_with_torch(
    cls: type[torch.optim.Optimizer],
    options: dict[str, object],
    dtype: torch.dtype,
    bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w1, w2, s1, s2 = fused_and_plain(cls, options, dtype, monkeypatch)
    for x, y in zip(w1, w2, strict=True):
        assert float((x - y).abs().max() / y.abs().max()) < bound
    assert [list(state) for state in s1] == [list(state) for state in s2]
    for x, y in zip(s1, s2, strict=True):
        assert float(x["step"]) == float(y["step"]) == 5.0
        assert x["exp_avg"].stride() == y["exp_avg"].stride()
        assert float((x["exp_avg"] - y["exp_avg"]).abs().max()) < 10 * bound * float(y["exp_avg"].abs().max())


def used_fused_step(opt: SAM, net: nn.Module, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> bool:
    with monkeypatch.context() as patch:
        used = record_fused_steps(patch, allowed=True)
        step_closure(net, opt, batch)
    return used == [True]


class _OwnSGD(torch.optim.SGD):
    pass


def test_what_is_fused_and_what_is_left_to_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batches(1)[0]

    def fused(cls: type[torch.optim.Optimizer] = torch.optim.SGD, prepare=lambda base: None, **options: object) -> bool:
        net = small_net()
        base = cls(net.parameters(), **({"lr": 0.1} | options))
        prepare(base)
        return used_fused_step(SAM(base, rho=0.1), net, batch, monkeypatch)

    assert fused()
    assert fused(torch.optim.Adam)
    assert fused(torch.optim.AdamW)
    assert fused(Lion)
    assert fused(prepare=lambda base: torch.optim.lr_scheduler.StepLR(base, 1))
    assert not fused(_OwnSGD)
    assert not fused(torch.optim.Adadelta)
    assert not fused(foreach=True)
    assert not fused(fused=True)
    assert not fused(lr=torch.tensor(0.1))
    assert not fused(prepare=lambda base: base.register_step_pre_hook(lambda *_: None))
    assert not fused(prepare=lambda base: base.register_step_post_hook(lambda *_: None))
    assert not fused(prepare=lambda base: setattr(base, "step", base.step))
    handle = register_optimizer_step_post_hook(lambda *_: None)
    assert not fused()
    handle.remove()
    assert fused()


def test_a_parameter_without_momentum_buffer_leaves_the_step_to_the_base() -> None:
    results = []
    for fused_first in (True, False):
        net, data = small_net(), batches(4)
        opt = SAM(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), rho=0.1)
        train(net, opt, data[:2], step_closure if fused_first else step_context)
        opt.state[net[0].weight].clear()
        train(net, opt, data[2:], step_closure)
        results.append(weights(net))
    assert same_bits(*results)


@pytest.mark.parametrize("make", [SGD_WITH_MOMENTUM, torch.optim.Adam], ids=["SGD", "Adam"])
def test_states_in_another_order_find_their_parameters(make) -> None:
    """As they come to lie where a parameter got its first gradient late."""
    results = []
    for reorder in (False, True):
        net, data = small_net(), batches(4)
        opt = SAM(make(net.parameters(), lr=0.1), rho=0.1)
        train(net, opt, data[:2], step_closure)
        if reorder:
            states = list(opt.state.items())
            opt.state.clear()
            opt.state.update(reversed(states))
        train(net, opt, data[2:], step_closure)
        results.append(weights(net))
    assert same_bits(*results)


def test_a_group_with_radius_zero_still_takes_its_step() -> None:
    results = []
    for way in (step_closure, step_context):
        net = small_net()
        groups = [{"params": net[0].parameters()}, {"params": net[2:].parameters(), "sam_rho": 0.0}]
        train(net, SAM(torch.optim.SGD(groups, lr=0.1, momentum=0.9), rho=0.1), batches(4), way)
        results.append(weights(net))
    assert same_bits(*results)
    assert distance(results[0], weights(small_net())) > 1e-2


def test_groups_with_their_own_rates_are_fused() -> None:
    results = []
    for way in (step_closure, step_context):
        net = small_net()
        groups = [{"params": net[0].parameters(), "lr": 0.3}, {"params": net[2:].parameters(), "momentum": 0.5}]
        train(net, SAM(torch.optim.SGD(groups, lr=0.1), rho=0.1), batches(4), way)
        results.append(weights(net))
    assert same_bits(*results)


# ---- resuming ----


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adadelta], ids=lambda c: c.__name__)
@pytest.mark.parametrize("way", [step_context, step_closure], ids=lambda f: f.__name__)
def test_a_resumed_run_is_the_same_to_the_last_bit(cls: type[torch.optim.Optimizer], way, tmp_path) -> None:
    def new() -> tuple[nn.Module, SAM]:
        net = small_net()
        options = {"momentum": 0.9} if cls is torch.optim.SGD else {}
        return net, SAM(build(cls, net.parameters(), **options), rho=0.1, interval=2)

    data = batches(9)
    net, opt = new()
    train(net, opt, data, way)
    first, first_opt = new()
    train(first, first_opt, data[:5], way)
    torch.save({"net": first.state_dict(), "opt": first_opt.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second, second_opt = new()
    second.load_state_dict(saved["net"])
    second_opt.load_state_dict(saved["opt"])
    train(second, second_opt, data[5:], way)
    assert same_bits(second.parameters(), net.parameters())


def test_stochastic_rounding_resumes_and_repeats() -> None:
    def new() -> tuple[nn.Module, SAM]:
        torch.manual_seed(7)
        net = small_net(torch.bfloat16)
        groups = [{"params": net[0].parameters()}, {"params": net[2:].parameters()}]
        return net, SAM(torch.optim.SGD(groups, lr=0.1), rho=1e-3, rounding="stochastic")

    data = batches(6, torch.bfloat16)
    net, opt = new()
    before = torch.get_rng_state()
    train(net, opt, data)
    assert torch.equal(torch.get_rng_state(), before)
    first, first_opt = new()
    train(first, first_opt, data[:3])
    second, second_opt = new()
    second.load_state_dict(first.state_dict())
    second_opt.load_state_dict(copy.deepcopy(first_opt.state_dict()))
    train(second, second_opt, data[3:])
    assert same_bits(second.parameters(), net.parameters())


def test_stochastic_rounding_draws_anew_at_every_ascent() -> None:
    torch.manual_seed(7)
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    opt = SAM(torch.optim.SGD([weight], lr=0.1), rho=0.05, rounding="stochastic")
    weight.grad = torch.ones_like(weight)
    moved = []
    for _ in range(8):
        opt.ascend()
        moved.append((weight != 1.0).nonzero().flatten())
        opt.restore()
    # e = 0.05 / 64 of a gap of 2^-7 between neighbours: a tenth of the weights moves, 410 +- 19 of 4096
    assert all(abs(len(m) - 4096 * 0.1) < 5 * 19.2 for m in moved)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(moved, 2))
    nearest = SAM(torch.optim.SGD([weight], lr=0.1), rho=0.05)
    nearest.ascend()
    assert not (weight != 1.0).any()


# ---- accumulation ----


def sam_gradients(net: nn.Module, data: list[Batch], rho: float) -> list[Tensor]:
    """Mean SAM gradient with one perturbation per batch, by perturb()."""
    opt = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=rho)
    grads = []
    for batch in data:
        opt.zero_grad()
        backward(net, batch)
        with opt.perturb():
            backward(net, batch)
        grads.append([p.grad for p in net.parameters()])
    opt.zero_grad()
    return [torch.stack(parts).mean(0) for parts in zip(*grads, strict=True)]


@pytest.mark.parametrize("m", [None, 1, 3])
def test_backward_adds_the_mean_sam_gradient(m: int | None) -> None:
    net, data = small_net(torch.float64), batches(m or 1, torch.float64)
    opt = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.1)
    before, expected = weights(net), sam_gradients(net, data, rho=0.1)
    held = [torch.full_like(p, 0.5) for p in net.parameters()]
    for p, grad in zip(net.parameters(), held, strict=True):
        p.grad = grad
    loss = opt.backward((lambda: loss_of(net, data[0])) if m is None else lambda i: loss_of(net, data[i]), m=m)
    assert distance([p.grad - 0.5 for p in net.parameters()], expected) < 1e-15
    assert all(p.grad is grad for p, grad in zip(net.parameters(), held, strict=True))
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(sum(loss_of(net, b).item() for b in data) / len(data), rel=1e-15)
    assert same_bits(net.parameters(), before)


def test_backward_where_sam_is_inactive_is_plain_accumulation() -> None:
    net, data = small_net(torch.float64), batches(2, torch.float64)
    opt = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.0)
    calls = []
    opt.backward(lambda i: (calls.append(i), loss_of(net, data[i]))[1], m=2)
    ours = [p.grad for p in net.parameters()]
    opt.zero_grad()
    backward(net, data[0])
    backward(net, data[1])
    assert calls == [0, 1]
    assert distance(ours, [p.grad / 2 for p in net.parameters()]) < 1e-15


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_backward_that_fails_leaves_gradients_and_weights(fails_at: int) -> None:
    net, data = small_net(), batches(2)
    opt = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.1)
    backward(net, data[0])
    before, held, calls = weights(net), [p.grad.clone() for p in net.parameters()], []

    def closure(i: int) -> Tensor:
        calls.append(i)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        return loss_of(net, data[i])

    with pytest.raises(KeyboardInterrupt):
        opt.backward(closure, m=2)
    assert same_bits(net.parameters(), before)
    assert same_bits([p.grad for p in net.parameters()], held)


def test_backward_enters_no_sync_for_the_first_pass_only() -> None:
    net, data, log = small_net(), batches(2), []

    class NoSync:
        def __enter__(self) -> None:
            log.append("enter")

        def __exit__(self, *_: object) -> None:
            log.append("exit")

    opt = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.1)
    opt.backward(lambda i: (log.append(i), loss_of(net, data[i]))[1], m=2, no_sync=NoSync)
    assert log == ["enter", 0, "exit", 0, "enter", 1, "exit", 1]


def test_m_of_backward_is_checked() -> None:
    opt = SAM(torch.optim.SGD(small_net().parameters(), lr=0.1))
    with pytest.raises(ValueError, match="m: 0"):
        opt.backward(lambda i: None, m=0)


def test_closures_may_run_under_no_grad() -> None:
    net, batch = small_net(), batches(1)[0]
    opt = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.1)
    with torch.no_grad():
        opt.step(closure_of(net, opt, batch))
        opt.backward(lambda: loss_of(net, batch))
    assert distance(weights(net), weights(small_net())) > 1e-3
