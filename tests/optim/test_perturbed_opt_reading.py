"""What PerturbedOPT lets a user read: curvature and noise of each weight, numbers by layer, draws to be made again."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin import PerturbedOPT, ops
from models import batches, same_bits, sgd, small_net, weights
from popt_reference import MIXED, in_closure, momentum_sgd, noisy_net, run


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10, as docs/random.md has it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        m0, m1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [m1 >> 32 ^ c[1] ^ k[0], m1 & 0xFFFFFFFF, m0 >> 32 ^ c[3] ^ k[1], m0 & 0xFFFFFFFF]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return c


def uniform(draw: Any, element: int) -> float:
    """The number of an element on (-1, 1), in Python alone."""
    quad = element // 4
    counter = [quad & 0xFFFFFFFF, (quad >> 32) ^ (draw.stream << 16), draw.position, draw.draw]
    word = philox(counter, [draw.seed & 0xFFFFFFFF, draw.seed >> 32])[element % 4]
    return ((word >> 9) + 0.5) * 2.0**-22 - 1.0


# ---- draws ----


def two_groups(net: nn.Module) -> list[dict[str, Any]]:
    params = list(net.parameters())
    return [{"params": params[:2]}, {"params": params[2:]}]


@pytest.mark.parametrize("grouped", [False, True])
def test_noise_is_drawn_again_bit_for_bit_from_the_pages_layout(grouped: bool) -> None:
    net, data = small_net(), batches(3)
    opt = PerturbedOPT(
        sgd(two_groups(net) if grouped else net.parameters()),
        sizing="isotropic",
        scale=0.125,
        generator=torch.Generator().manual_seed(2**40 + 1),
    )
    run(net, opt, data)
    before = weights(net)
    opt.ascend()
    for p, w in zip(net.parameters(), before, strict=True):
        draw = opt.draw_of(p)
        assert draw is not None
        assert (draw.seed, draw.draw) == (opt._set.seed, 3)
        xi = torch.tensor([uniform(draw, i) for i in range(w.numel())]).view(w.shape)
        assert torch.equal(p.detach(), w + 0.125 * xi)
    assert len(set(map(opt.draw_of, net.parameters()))) == len(before)
    opt.restore()


def redrawn(opt: PerturbedOPT, net: nn.Module) -> list[Tensor]:
    """The perturbed weights of the last ascent, made by the operators from what can be read."""
    moved = weights(net)
    for p, w in zip(net.parameters(), moved, strict=True):
        draw, state = opt.draw_of(p), opt._set.states[p]
        assert draw is not None
        tensors = [w.new_empty(0)] * draw.position + [w]
        key = ops.random_key(draw.seed, draw.draw, draw.stream)
        ops.scaled_noise_(
            tensors,
            ops.backup_like(tensors),
            key,
            distribution="truncated_normal",
            curvatures=[t.new_empty(0) for t in tensors[:-1]] + [state.curvature],
            curvature_scale=state.correction.scale,
            lipschitz=opt.curvature_of(p).lipschitz.double(),
            gamma=MIXED["gamma"],
            eps=MIXED["eps"],
            scale=MIXED["scale"],
        )
    return moved


@pytest.mark.parametrize("resumed", [False, True])
def test_noise_by_curvature_is_drawn_again_bit_for_bit(resumed: bool) -> None:
    net, opt = noisy_net(torch.float64, distribution="truncated_normal")
    data = batches(4, torch.float64)
    run(net, opt, data[:3])
    if resumed:
        state = copy.deepcopy((net.state_dict(), opt.state_dict()))
        net, opt = noisy_net(torch.float64, distribution="truncated_normal")
        net.load_state_dict(state[0])
        opt.load_state_dict(state[1])
        assert opt.draw_of(next(net.parameters())) is None
    before = weights(net)
    opt.ascend()
    moved = weights(net)
    opt.restore()
    assert same_bits(weights(net), before)
    assert same_bits(redrawn(opt, net), moved)


def test_the_draw_is_that_of_the_last_ascent() -> None:
    net, opt = noisy_net(samples=3)
    p = net[0].weight
    assert opt.draw_of(p) is None
    run(net, opt, batches(2), in_closure)  # the first step has no noise
    assert opt.draw_of(p)[1:] == (2, 0, 0)
    opt.ascend()
    assert opt.draw_of(p)[1:] == (3, 0, 0)
    opt.restore()
    opt.step(lambda: None)  # the loop's own gradient: the draw of this empty closure is taken back
    assert opt.draw_of(p) is None


def test_what_did_not_move_has_no_draw() -> None:
    net = small_net()
    first, second = two_groups(net)
    opt = PerturbedOPT(sgd([first | {"popt_scale": 0.0}, second]), sizing="isotropic", scale=0.1)
    opt.ascend()
    opt.restore()
    assert opt.draw_of(first["params"][0]) is None
    assert opt.draw_of(second["params"][1])[2:] == (0, 1)


# ---- curvature and sizes ----


@pytest.mark.parametrize("lipschitz", ["max", "element", 2.0])
@pytest.mark.parametrize("log", [False, True])
def test_the_size_of_the_noise_is_what_moves_the_weights(lipschitz: Any, log: bool) -> None:
    """``w + sigma xi``, with xi drawn again, is where the next ascent goes; and hhat is what the squares average to."""
    net, opt = noisy_net(torch.float64, lipschitz=lipschitz, schedule="log" if log else None)
    squares: list[list[Tensor]] = []
    opt.base.register_step_pre_hook(lambda *_: squares.append([p.grad.square() for p in net.parameters()]))
    for batch in batches(3, torch.float64):
        run(net, opt, [batch])
        opt.next_epoch()
    found = [opt.curvature_of(p) for p in net.parameters()]
    beta, before = MIXED["beta1"], weights(net)
    for each, *own in zip(found, *squares, strict=True):
        mean = sum(beta ** (2 - i) * (1.0 - beta) * g for i, g in enumerate(own)) / (1.0 - beta**3)
        torch.testing.assert_close(each.curvature, mean, rtol=1e-12, atol=1e-15)
        assert each.updates == 3
    opt.ascend()
    for p, w, each in zip(net.parameters(), before, found, strict=True):
        draw = opt.draw_of(p)
        xi = torch.tensor([uniform(draw, i) for i in range(w.numel())], dtype=torch.float64).view(w.shape)
        torch.testing.assert_close(p.detach(), w + each.sigma * xi, rtol=0.0, atol=1e-13)
        assert bool((each.sigma <= each.neighbourhood).all())
        factor = 1.0 / math.log(math.e - 1.0 + 4) if log else 1.0
        expected = factor * (MIXED["gamma"] * w.abs() + MIXED["eps"])
        torch.testing.assert_close(each.neighbourhood, expected, rtol=1e-12, atol=0.0)
        assert each.lipschitz.dim() == (w.dim() if lipschitz == "element" else 0)
    assert any(bool((each.sigma < each.neighbourhood).any()) for each in found)
    opt.restore()


@pytest.mark.parametrize("sizing", ["isotropic", "magnitude", "filter", "tensor"])
def test_sizes_that_need_no_curvature(sizing: str) -> None:
    net = small_net(torch.float64)
    opt = PerturbedOPT(momentum_sgd(net), sizing=sizing, scale=0.1, schedule="log")
    opt.epoch = 3
    found = [opt.curvature_of(p) for p in net.parameters()]
    assert all(each.curvature is None and each.lipschitz is None and each.updates == 0 for each in found)
    before = weights(net)
    opt.ascend()
    for p, w, each in zip(net.parameters(), before, found, strict=True):
        xi = torch.tensor([uniform(opt.draw_of(p), i) for i in range(w.numel())], dtype=torch.float64).view(w.shape)
        torch.testing.assert_close(p.detach(), w + each.sigma * xi, rtol=0.0, atol=1e-13)
    opt.restore()


def test_before_the_first_curvature_there_is_no_noise() -> None:
    net = small_net()
    opt = PerturbedOPT(sgd(two_groups(net)))
    opt.param_groups[1]["popt_gamma"] = opt.param_groups[1]["popt_eps"] = 0.0
    each = opt.curvature_of(net[0].weight)
    assert each.curvature is None
    assert float(each.lipschitz) == float(each.sigma.abs().max()) == each.updates == 0.0
    run(net, opt, batches(2))
    assert float(opt.curvature_of(net[0].weight).sigma.min()) > 0.0
    assert float(opt.curvature_of(net[5].weight).sigma.max()) == 0.0  # a group without noise


def test_a_curvature_that_is_not_finite_has_no_noise() -> None:
    net, opt = noisy_net()
    run(net, opt, batches(2))
    opt._set.states[net[0].bias].curvature.copy_(torch.tensor([math.nan, math.inf, -math.inf, 0.0]))
    sigma = opt.curvature_of(net[0].bias).sigma
    assert sigma[:3].tolist() == [0.0, 0.0, 0.0]
    assert float(sigma[3]) > 0.0


def test_reading_changes_nothing() -> None:
    results = []
    for reads in (False, True):
        net, opt = noisy_net(lipschitz="element")
        for batch in batches(4):
            run(net, opt, [batch])
            if reads:
                opt.layer_stats()
                for p in net.parameters():
                    for t in opt.curvature_of(p):
                        if isinstance(t, Tensor):
                            t.fill_(7.0)
                    opt.draw_of(p)
        results.append(weights(net))
    assert same_bits(*results)


def test_sixteen_bit_weights_are_read_in_float32() -> None:
    net, opt = noisy_net(torch.bfloat16)
    run(net, opt, batches(2, torch.bfloat16))
    each = opt.curvature_of(net[0].weight)
    assert {t.dtype for t in (each.curvature, each.neighbourhood, each.sigma)} == {torch.float32}


# ---- by layer ----


def test_numbers_by_layer_add_up_to_those_of_the_ascent() -> None:
    net, opt = noisy_net(torch.float64)
    run(net, opt, batches(3, torch.float64))
    rows = opt.layer_stats(net)
    assert [row.name for row in rows] == [name for name, _ in net.named_parameters()]
    opt.ascend()
    stats, total = opt.noise_stats, sum(row.elements for row in rows)
    opt.restore()
    assert sum(row.mean_sigma * row.elements for row in rows) / total == pytest.approx(float(stats.mean_sigma))
    assert sum(row.capped_fraction * row.elements for row in rows) / total == pytest.approx(
        float(stats.capped_fraction)
    )
    for row, p in zip(rows, net.parameters(), strict=True):
        each = opt.curvature_of(p)
        assert (row.elements, row.updates) == (p.numel(), 3)
        assert row.mean_curvature == pytest.approx(float(each.curvature.mean()))
        assert row.max_curvature == pytest.approx(float(each.curvature.max()))
        assert row.relative_sigma == pytest.approx(float(each.sigma.norm() / p.detach().norm()))


def test_layers_have_the_names_that_are_known() -> None:
    net = small_net()
    named = PerturbedOPT(sgd(net.named_parameters()))
    assert [row.name for row in named.layer_stats()] == [name for name, _ in net.named_parameters()]
    rows = PerturbedOPT(sgd([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(0))])).layer_stats()
    assert [row.name for row in rows] == ["param_groups[0]['params'][0]", "param_groups[0]['params'][1]"]
    assert [row.mean_sigma for row in rows] == [0.0, 0.0]
    assert all(math.isnan(row.mean_curvature) and math.isnan(row.relative_sigma) for row in rows)


# ---- what cannot be read ----


def test_what_cannot_be_read_is_refused() -> None:
    net, opt = noisy_net()
    stranger = nn.Parameter(torch.ones(2))
    for read in (opt.curvature_of, opt.draw_of):
        with pytest.raises(ValueError, match=r"p: a tensor of shape \(2,\) given, which is no parameter"):
            read(stranger)
        with pytest.raises(ValueError, match="p: str given"):
            read("weight")
    run(net, opt, batches(2))
    with opt.perturb():
        for refused in (lambda: opt.curvature_of(net[0].weight), opt.layer_stats):
            with pytest.raises(RuntimeError, match="the weights are perturbed"):
                refused()
        assert opt.draw_of(net[0].weight) is not None
