"""PerturbedOPT's own behaviour: where the weights are at every moment, what moves, how far, and what is refused."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin import PerturbedOPT
from models import (
    backward,
    batches,
    distance,
    give_grads,
    params_of,
    same_bits,
    set_grads,
    sgd,
    small_net,
    train_bare,
    weights,
)
from popt_reference import (
    MIXED,
    WAYS,
    draws_of,
    in_closure,
    in_context,
    momentum_sgd,
    noisy_net,
    run,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- how far ----


def test_the_first_step_is_without_noise() -> None:
    net, opt = noisy_net()
    bare_net = small_net()
    bare = momentum_sgd(bare_net)
    assert not opt.active
    for n, batch in enumerate(batches(2)):
        opt.zero_grad()
        before = weights(net)
        with opt.perturb():
            assert same_bits(net.parameters(), before) == (n == 0)
            backward(net, batch)
        opt.step()
        train_bare(bare_net, bare, [batch])
        assert same_bits(net.parameters(), bare_net.parameters()) == (n == 0)
    assert opt.active


@pytest.mark.parametrize("distribution", ["uniform", "truncated_normal"])
def test_no_weight_moves_by_more_than_its_neighbourhood(distribution: str) -> None:
    net, opt = noisy_net(torch.float64, distribution=distribution)
    largest = 0.0
    for batch in batches(12, torch.float64):
        opt.zero_grad()
        before = weights(net)
        with opt.perturb():
            for p, w in zip(net.parameters(), before, strict=True):
                share = (p.detach() - w).abs() / (MIXED["gamma"] * w.abs() + MIXED["eps"])
                largest = max(largest, float(share.max()))
            backward(net, batch)
        opt.step()
    assert 0.9 < largest <= 1.0 + 1e-12  # w + u and its difference from w are rounded


# ---- the weights come back ----


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_bit_comes_back(dtype: torch.dtype, layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 2, 5), (7, 1, 1, 3)]
    params = [
        nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).to(memory_format=layout))
        for s in shapes
    ]
    opt = PerturbedOPT(sgd(params), gamma=1.0)
    set_grads(params)
    opt.step()
    before, addresses = [p.detach().clone() for p in params], [p.data_ptr() for p in params]
    seen = []
    for _ in range(20):
        opt.ascend()
        seen.append([p.detach().clone() for p in params])
        opt.restore()
        assert same_bits(params, before)
    assert [p.data_ptr() for p in params] == addresses
    assert not any(same_bits(a, b) for a, b in itertools.combinations([before, *seen], 2))
    entry = opt.state_dict()["noise"]["state"][0]
    assert entry["curvature"].dtype == torch.promote_types(dtype, torch.float32)
    assert entry["curvature"].stride() == params[0].stride()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_any_exception_inside_restores(error: type[BaseException]) -> None:
    net, opt = noisy_net()
    data = batches(2)
    run(net, opt, data[:1])
    before = weights(net)
    with pytest.raises(error), opt.perturb():
        assert not same_bits(net.parameters(), before)
        raise error
    assert same_bits(net.parameters(), before)

    def closure() -> Tensor:
        assert not same_bits(net.parameters(), before)
        raise error

    with pytest.raises(error):
        opt.step(closure)
    assert same_bits(net.parameters(), before)


def test_nested_perturbations_and_checkpoints_under_noise_are_refused() -> None:
    net, opt = noisy_net()
    run(net, opt, batches(1))
    state, before = opt.state_dict(), weights(net)
    actions: dict[str, Callable[[], Any]] = {
        "ascend": opt.ascend,
        "step": lambda: opt.step(lambda: 0.0),
        "state_dict": opt.state_dict,
        "load_state_dict": lambda: opt.load_state_dict(state),
    }
    with opt.perturb():
        moved = weights(net)
        for name, action in actions.items():
            with pytest.raises(RuntimeError, match=rf"{name}\(.*\): the weights are perturbed"):
                action()
        with pytest.raises(RuntimeError, match="the weights are perturbed"):
            opt.perturb().__enter__()
        assert same_bits(net.parameters(), moved)
    assert same_bits(net.parameters(), before)


def test_step_restores_weights_that_an_ascent_left_perturbed() -> None:
    results = []
    for halves in (True, False):
        net, opt = noisy_net(torch.float64)
        for batch in batches(4, torch.float64):
            opt.zero_grad()
            with opt.perturb() if not halves else opt.ascend() or torch.enable_grad():
                backward(net, batch)
            opt.step()
        results.append(weights(net))
    assert distance(*results) < 1e-12  # the one is fused, the other is not


@pytest.mark.parametrize("lipschitz", ["max", "element"])
def test_weights_that_change_type_between_steps(lipschitz: str) -> None:
    net, opt = noisy_net(torch.float64, lipschitz=lipschitz)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float64):
        net.to(dtype)
        for batch in batches(2, dtype):
            before = weights(net)
            in_context(net, opt, batch)
            assert distance(weights(net), before) > 0.0
    entry = opt.state_dict()["noise"]["state"][0]
    assert entry["updates"] == 8 and entry["curvature"].dtype == torch.float64


# ---- which parameters, which gradients ----


def test_parameters_without_gradient_frozen_and_tied_ones() -> None:
    frozen, unused, tied, usual = params_of([1.0], [2.0], [3.0], [4.0])
    frozen.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of the duplicate
        opt = PerturbedOPT(sgd([frozen, unused, tied, tied, usual]), gamma=0.5)
    for _ in range(2):
        give_grads([tied, usual], [1.0], [1.0])
        with opt.perturb():
            pass
        opt.step()
    before = [p.item() for p in (frozen, unused, tied, usual)]
    with opt.perturb():
        moved = [p.item() for p in (frozen, unused, tied, usual)]
    assert [a != b for a, b in zip(moved, before, strict=True)] == [False, False, True, True]
    assert [p.item() for p in (frozen, unused, tied, usual)] == before
    assert before[:2] == [1.0, 2.0]
    assert sorted(opt.state_dict()["noise"]["state"]) == [2, 4]  # numbered as torch numbers a tied parameter


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_each_parameter_counts_its_own_updates(way) -> None:
    """One without gradient for some steps has the bias correction of its own updates, and no noise before the first."""
    a, b = params_of([1.0, -2.0], [0.5])
    opt = PerturbedOPT(sgd([a, b]), gamma=0.1, beta1=0.9, lipschitz=0.0, scale=1e-3)

    def closure(grads: tuple[float, float | None], seen: list[bool]) -> float:
        seen.append(b.item() != before)
        a.grad = torch.full_like(a, grads[0])
        b.grad = None if grads[1] is None else torch.full_like(b, grads[1])
        return 0.0

    moved: list[bool] = []
    for grads in [(1.0, None), (2.0, None), (1.0, 3.0), (1.0, None), (1.0, 5.0), (1.0, 5.0)]:
        before = b.item()
        if way is in_closure:
            opt.step(lambda g=grads: closure(g, moved))
        else:
            with opt.perturb():
                closure(grads, moved)
            opt.step()
    assert moved == [False, False, False, True, True, True]
    state = opt.state_dict()["noise"]["state"]
    assert [state[i]["updates"] for i in (0, 1)] == [6, 3]
    h = 0.0
    for g in (3.0, 5.0, 5.0):
        h = 0.9 * h + 0.1 * g * g
    assert state[1]["curvature"].item() == pytest.approx(h, rel=1e-14)
    before = b.item()
    with opt.perturb():
        # far from the cap of 0.05: sigma = scale / sqrt(hhat), times the draw of b, alone in the second bucket
        seed, draw = opt._set.seed, 5
        sigma = 1e-3 / math.sqrt(h / (1 - 0.9**3))
        expected = sigma * float(draws_of(b, seed, draw, 0, stream=1))
        assert b.item() - before == pytest.approx(expected, rel=1e-9)


def test_no_gradient_at_all_is_a_legal_step() -> None:
    net, opt = noisy_net()
    before = weights(net)
    assert opt.step() is None
    run(net, opt, batches(1))
    opt.zero_grad()
    after = weights(net)
    with opt.perturb():
        pass
    opt.step()
    assert not same_bits(after, before)
    assert opt.state_dict()["noise"]["state"][0]["updates"] == 1


def test_a_sparse_gradient_is_refused_before_anything_moves() -> None:
    dense, embedding = nn.Linear(2, 2), nn.Embedding(4, 2, sparse=True)
    named = [{"params": list(dense.named_parameters())}, {"params": [("table", embedding.weight)]}]
    opt = PerturbedOPT(torch.optim.SGD(named, lr=0.1))
    before = [*weights(dense), *weights(embedding)]
    dense(embedding(torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(RuntimeError, match=r"param_groups\[1\]\['params'\]\[0\] \(table\) .*sparse.*popt_scale=0"):
        opt.step()
    assert same_bits([*dense.parameters(), *embedding.parameters()], before)
    opt.param_groups[1]["popt_scale"] = 0.0
    opt.step()
    assert not same_bits(embedding.parameters(), before[2:])


# ---- schedule, groups, statistics ----


def test_the_noise_follows_the_schedule() -> None:
    (weight,) = params_of([1.0] * 500)
    give_grads([weight], [1e-6] * 500)  # so flat that the noise is its neighbourhood
    for schedule, factors in (("log", [1.0, 1 / math.log(math.e + 1), 1 / math.log(math.e + 2)]),
                              (lambda epoch: 2.0**-epoch, [0.5, 0.25, 0.125]), (None, [1.0] * 3)):  # fmt: skip
        opt = PerturbedOPT(sgd([weight]), gamma=0.2, eps=0.0, schedule=schedule)
        opt.step()
        for n, factor in enumerate(factors):
            assert opt.epoch == n + 1
            with opt.perturb():
                pass
            assert float(opt.noise_stats.mean_sigma) == pytest.approx(0.2 * factor, rel=1e-3)
            opt.next_epoch()
    opt.epoch = 1
    with pytest.raises(ValueError, match="epoch: 0"):
        opt.epoch = 0
    bad = PerturbedOPT(sgd([weight]), schedule=lambda epoch: math.nan)
    bad.step()
    with pytest.raises(ValueError, match="schedule: gave nan for epoch 1"):
        bad.ascend()


def test_groups_have_sizes_of_their_own() -> None:
    a, b, c = params_of([1.0] * 8, [1.0] * 8, [1.0] * 8)
    groups = [{"params": [a]}, {"params": [b], "popt_gamma": 0.5}, {"params": [c], "popt_scale": 0.0}]
    opt = PerturbedOPT(sgd(groups), gamma=0.1, eps=0.0)
    give_grads([a, b, c], [1e-6] * 8, [1e-6] * 8, [1e-6] * 8)
    opt.step()
    before = weights(nn.ParameterList([a, b, c]))
    with opt.perturb():
        u = [(p.detach() - w).abs().max().item() for p, w in zip((a, b, c), before, strict=True)]
    assert 0.05 < u[0] <= 0.1 < u[1] <= 0.5 and u[2] == 0.0
    opt.param_groups[1]["popt_gamma"] = -1.0
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['popt_gamma'\]: -1.0"):
        opt.ascend()
    assert same_bits([a, b, c], before)


def test_start_leaves_the_first_steps_without_noise_but_not_without_curvature() -> None:
    net, opt = noisy_net(start=3)
    seen = []
    for batch in batches(5):
        seen.append(opt.active)
        in_context(net, opt, batch)
    assert seen == [False, False, False, True, True]
    assert opt.state_dict()["noise"]["state"][0]["updates"] == 5


def test_stats_say_how_much_noise_there_was() -> None:
    net, opt = noisy_net(torch.float64)
    assert opt.noise_stats is None
    run(net, opt, batches(4, torch.float64))
    sigma, capped = 0.0, 0
    opt.zero_grad()
    noise = opt.state_dict()["noise"]
    with opt.perturb():
        stats = opt.noise_stats
    for p, entry in zip(net.parameters(), noise["state"].values(), strict=True):
        n = MIXED["gamma"] * p.detach().abs() + MIXED["eps"]
        c = entry["curvature"] / (1 - 0.9**4) + noise["rho"] * n
        size = torch.minimum(MIXED["scale"] / c.sqrt(), n)
        sigma, capped = sigma + float(size.sum()), capped + int((size == n).sum())
    count = sum(p.numel() for p in net.parameters())
    assert float(stats.mean_sigma) == pytest.approx(sigma / count, rel=1e-12)
    assert float(stats.capped_fraction) == capped / count
    assert float(stats.invalid) == 0.0


# ---- noise without curvature ----


@pytest.mark.parametrize("sizing", ["filter", "tensor", "isotropic", "magnitude"])
@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_other_sizes_of_noise(sizing: str, distribution: str) -> None:
    generator = torch.Generator().manual_seed(7)
    net = small_net(torch.float64)
    opt = PerturbedOPT(
        momentum_sgd(net), sizing=sizing, distribution=distribution, scale=0.1, schedule="log", generator=generator
    )
    opt.next_epoch()
    before = weights(net)
    assert opt.active  # at once: there is no curvature to wait for
    with opt.perturb():
        for i, (p, w) in enumerate(zip(net.parameters(), before, strict=True)):
            size = {
                "isotropic": torch.ones_like(w),
                "magnitude": w.abs(),
                "tensor": (w**2).mean().sqrt(),
                "filter": (w**2).sum(tuple(range(1, w.dim())) if w.dim() > 1 else None, keepdim=w.dim() > 1).sqrt(),
            }[sizing]
            sigma = 0.1 / math.log(math.e + 1) * size
            expected = w + sigma * draws_of(w, opt._set.seed, 0, i, distribution)
            assert distance([p.detach()], [expected]) < 1e-14
    assert same_bits(net.parameters(), before)
    run(net, opt, batches(2, torch.float64), in_closure)
    assert opt.state_dict()["noise"]["state"] == {}
    assert set(opt.param_groups[0]) & {"popt_scale", "popt_gamma", "popt_eps"} == {"popt_scale"}


def test_noise_of_16_bit_filters() -> None:
    weight = nn.Parameter(torch.ones(4, 64, dtype=torch.bfloat16))
    opt = PerturbedOPT(sgd([weight]), sizing="filter", scale=0.1)
    with opt.perturb():
        assert 0.6 < float((weight.detach() - 1.0).abs().max()) <= 0.81
    assert bool((weight == 1.0).all())
