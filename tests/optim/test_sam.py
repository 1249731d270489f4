"""SAM's own behaviour: where the weights are at every moment, what is perturbed, what is refused."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from flatmin import SAM
from models import (
    backward,
    batches,
    closure_of,
    distance,
    give_grads,
    loss_of,
    params_of,
    raw,
    same_bits,
    set_grads,
    sgd,
    small_net,
    step_context,
    train,
    train_bare,
    weights,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


# ---- the weights come back ----


@pytest.mark.filterwarnings("ignore:flatmin has no kernel for complex parameters")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thousand_rounds_leave_every_bit_in_place(dtype: torch.dtype, layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 2, 5), (7, 1, 1, 3)]
    params = [
        nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).to(memory_format=layout))
        for s in shapes
    ]
    set_grads(params)
    opt = SAM(sgd(params), rho=0.5)
    before = [p.detach().clone() for p in params]
    addresses = [p.data_ptr() for p in params]
    opt.ascend()
    assert not same_bits(params, before)
    opt.restore()
    for _ in range(1000):
        opt.ascend()
        opt.restore()
    assert same_bits(params, before)
    assert [p.data_ptr() for p in params] == addresses


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_inside_perturb_restores(error: type[BaseException]) -> None:
    net = small_net()
    opt = SAM(sgd(net.parameters()), rho=0.1)
    before = weights(net)
    backward(net, batches(1)[0])
    with pytest.raises(error), opt.perturb():
        assert not same_bits(net.parameters(), before)
        raise error
    assert same_bits(net.parameters(), before)


def test_exception_in_the_second_call_of_a_closure_restores() -> None:
    net, batch = small_net(), batches(1)[0]
    opt = SAM(sgd(net.parameters()), rho=0.1)
    before, calls = weights(net), []
    inner = closure_of(net, opt, batch)

    def closure() -> Tensor:
        calls.append(not same_bits(net.parameters(), before))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner()

    with pytest.raises(KeyboardInterrupt):
        opt.step(closure)
    assert calls == [False, True]
    assert same_bits(net.parameters(), before)


def test_nested_perturbations_are_refused_and_nothing_moves_twice() -> None:
    net, batch = small_net(), batches(1)[0]
    opt = SAM(sgd(net.parameters()), rho=0.1)
    before = weights(net)
    backward(net, batch)
    with opt.perturb():
        moved = weights(net)
        backward(net, batch)
        for action in (opt.ascend, lambda: opt.perturb().__enter__(), lambda: opt.step(lambda: 0.0)):
            with pytest.raises(RuntimeError, match="the weights are perturbed"):
                action()
        assert same_bits(net.parameters(), moved)
    assert same_bits(net.parameters(), before)


def test_step_restores_weights_that_an_ascent_left_perturbed() -> None:
    data = batches(3)
    a, b = small_net(), small_net()
    left, right = SAM(sgd(a.parameters()), rho=0.1), SAM(sgd(b.parameters()), rho=0.1)
    train(a, left, data)
    for batch in data:
        right.zero_grad()
        backward(b, batch)
        right.ascend()
        right.zero_grad()
        backward(b, batch)
        right.step()
    assert same_bits(a.parameters(), b.parameters())


def test_restore_at_rest_does_nothing() -> None:
    net = small_net()
    opt = SAM(sgd(net.parameters()), rho=0.1)
    backward(net, batches(1)[0])
    with opt.perturb():
        pass
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    moved_on = weights(net)
    opt.restore()
    assert same_bits(net.parameters(), moved_on)


def test_backward_through_weights_that_moved_is_an_error_not_a_wrong_gradient() -> None:
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    opt = SAM(sgd(layers.parameters()), rho=0.1)
    x = torch.ones(2, 3)
    layers(x).sum().backward()
    stale = layers(x).sum()
    opt.ascend()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    stale = layers(x).sum()
    opt.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


# ---- which parameters move, and how far ----


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_the_perturbation_has_norm_rho_over_all_groups(p: float) -> None:
    params = params_of([1.0, -0.5], [0.25], [[0.0, 2.0]])
    give_grads(params, [0.3, -0.4], [0.0], [[1.2, -1.2]])
    opt = SAM(sgd([{"params": params[:1]}, {"params": params[1:]}]), rho=0.05, p=p)
    before, grads = [q.detach().clone() for q in params], [q.grad for q in params]
    opt.ascend()
    e = torch.cat([(q.detach() - w).flatten() for q, w in zip(params, before, strict=True)])
    g = torch.cat([grad.flatten() for grad in grads])
    dual = torch.linalg.vector_norm(g, ord=math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1))
    # 1e-12 is eps, added to the norm
    assert float(torch.linalg.vector_norm(e, ord=p)) == pytest.approx(0.05, rel=1e-9)
    assert float(e @ g) == pytest.approx(0.05 * float(dual), rel=1e-9)
    assert float(opt.last_norm) == pytest.approx(float(dual), rel=1e-14)


def test_ties_over_groups_share_the_radius_of_the_1_norm() -> None:
    params = params_of([0.0, 0.0], [0.0])
    give_grads(params, [2.0, -1.0], [-2.0])
    opt = SAM(sgd([{"params": params[:1]}, {"params": params[1:]}]), rho=0.5, p=1.0)
    opt.ascend()
    assert params[0].tolist() == pytest.approx([0.25, 0.0], abs=1e-12)
    assert params[1].tolist() == pytest.approx([-0.25], abs=1e-12)


def test_the_norm_of_many_groups_does_not_overflow() -> None:
    params = params_of([0.0], [0.0])
    give_grads(params, [3e200], [4e200])
    opt = SAM(sgd([{"params": params[:1]}, {"params": params[1:]}]), rho=1.0)
    opt.ascend()
    assert float(opt.last_norm) == pytest.approx(5e200, rel=1e-14)
    assert [q.item() for q in params] == pytest.approx([0.6, 0.8], rel=1e-14)


def test_a_group_has_its_own_radius_and_scaling() -> None:
    params = params_of([[3.0, 0.0]], [1.0], [5.0])
    give_grads(params, [[1.0, 0.0]], [1.0], [100.0])
    groups = [
        {"params": params[:1], "sam_adaptive": "davda54"},
        {"params": params[1:2], "sam_rho": 0.2},
        {"params": params[2:], "sam_rho": 0.0},
    ]
    opt = SAM(sgd(groups), rho=0.1)
    opt.ascend()
    norm = math.hypot(3.0 * 1.0, 1.0)  # |w| g of the first group, g of the second; the third is not in it
    assert float(opt.last_norm) == pytest.approx(norm, rel=1e-14)
    assert params[0].flatten().tolist() == pytest.approx([3.0 + 0.1 * 9.0 / norm, 0.0], rel=1e-11)
    assert params[1].item() == pytest.approx(1.0 + 0.2 / norm, rel=1e-11)
    assert params[2].item() == 5.0


def test_eta_of_a_group_reaches_the_operator() -> None:
    params = params_of([[1.0, -0.5, 0.25, 0.0]])
    give_grads(params, [[0.3, -0.4, 0.0, 1.2]])
    opt = SAM(sgd(params), rho=0.5, adaptive=True, eta=0.01)
    opt.ascend()
    expected = [1.418678991, -0.642336903, 0.25, 0.000164171745]
    assert params[0].flatten().tolist() == pytest.approx(expected, abs=5e-10)


def test_frozen_unused_and_tied_parameters() -> None:
    frozen, unused, tied = params_of([1.0], [2.0], [3.0])
    frozen.grad, tied.grad = torch.ones_like(frozen), torch.full_like(tied, 7.0)
    frozen.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of the duplicate
        opt = SAM(sgd([frozen, unused, tied, tied]), rho=0.5)
    opt.ascend()
    assert (frozen.item(), unused.item()) == (1.0, 2.0)
    assert tied.item() == pytest.approx(3.5, rel=1e-12)
    assert float(opt.last_norm) == 7.0
    opt.restore()
    assert tied.item() == 3.0


def test_groups_without_parameters_or_gradients() -> None:
    params = params_of([1.0], [1.0])
    opt = SAM(sgd([{"params": []}, {"params": params}]), rho=0.5)
    with opt.perturb():  # no gradient at all
        assert params[0].item() == 1.0
    assert float(opt.last_norm) == 0.0
    opt.step()
    params[0].grad = torch.ones_like(params[0])
    with opt.perturb():
        assert [q.item() for q in params] == pytest.approx([1.5, 1.0])
        params[1].grad = torch.ones_like(params[1])  # the other one, in the second pass
    opt.step()
    assert [q.item() for q in params] == pytest.approx([1.0, 0.9])


@pytest.mark.parametrize("way", ["context", "halves"])
@pytest.mark.parametrize("lost", ["first", "all"])
def test_gradients_that_vanish_in_the_second_pass(lost: str, way: str) -> None:
    params = params_of([1.0], [2.0])
    opt = SAM(sgd(params, momentum=0.9), rho=0.5)
    give_grads(params, [1.0], [1.0])
    second = None if lost == "all" else torch.ones_like(params[1])
    if way == "context":
        with opt.perturb():
            params[1].grad = second
    else:
        opt.ascend()
        params[0].grad, params[1].grad = None, second
    opt.step()
    assert params[0].item() == 1.0
    assert params[1].item() == pytest.approx(2.0 if lost == "all" else 1.9)


@pytest.mark.parametrize("bad", [0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_zero_and_non_finite_gradients_move_nothing(bad: float, p: float, groups: int, dtype: torch.dtype) -> None:
    params = params_of([1.0, 2.0], [3.0], dtype=dtype)
    give_grads(params, [0.0, bad], [0.0 if bad == 0.0 else 1.0])
    split = [{"params": params}] if groups == 1 else [{"params": params[:1]}, {"params": params[1:]}]
    opt = SAM(sgd(split), rho=0.5, p=p)
    before = [q.detach().clone() for q in params]
    with opt.perturb():
        assert same_bits(params, before)
    assert same_bits(params, before)
    assert math.isfinite(float(opt.last_norm)) == (bad == 0.0)


def test_a_gradient_wider_than_its_weight() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    weight.grad = torch.tensor([1.0, 0.0, 0.0])
    opt = SAM(sgd([weight]), rho=0.5)
    with opt.perturb():
        assert weight.tolist() == [1.5, 1.0, 1.0]
    assert weight.tolist() == [1.0, 1.0, 1.0]


def test_weights_that_change_type_between_steps() -> None:
    net = small_net(torch.float64)
    opt = SAM(sgd(net.parameters()), rho=0.1)
    for dtype in (torch.float64, torch.float32, torch.float64):
        net.to(dtype)
        opt.zero_grad()
        before = weights(net)
        backward(net, batches(1, dtype)[0])
        with opt.perturb():
            assert distance(weights(net), before) > 0.0
        assert same_bits(net.parameters(), before)


def test_a_tensor_radius_is_read_at_every_ascent() -> None:
    (weight,) = params_of([1.0])
    rho = torch.tensor(0.5)
    opt = SAM(sgd([weight]), rho=rho)
    for value in (0.5, 0.25, 0.0):
        rho.fill_(value)
        give_grads([weight], [2.0])
        assert opt.active
        with opt.perturb():
            assert weight.item() == pytest.approx(1.0 + value, rel=1e-12)


def test_the_backup_is_kept_and_is_the_only_copy() -> None:
    net = small_net()
    opt = SAM(sgd(net.parameters()), rho=0.1)
    data = batches(3)
    step_context(net, opt, data[0])
    backup = opt._set.buckets[0].backup
    for batch in data[1:]:
        step_context(net, opt, batch)
    assert opt._set.buckets[0].backup is backup
    wanted = sum(-(-raw(p).numel() // 64) * 64 for p in net.parameters())
    assert backup.numel() == wanted


# ---- when SAM is active ----


def test_interval_and_start() -> None:
    net = small_net()
    opt = SAM(sgd(net.parameters()), rho=0.1, interval=3, start=2)
    seen, moved = [], []
    for batch in batches(9):
        seen.append(opt.active)
        opt.zero_grad()
        backward(net, batch)
        before = weights(net)
        with opt.perturb():
            moved.append(not same_bits(net.parameters(), before))
            assert all(p.grad is None for p in net.parameters())
            backward(net, batch)
        opt.step()
    assert seen == moved == [False, False, True, False, False, True, False, False, True]
    assert opt.param_groups[0]["sam_step"] == 9


def test_an_inactive_closure_runs_once() -> None:
    net, batch = small_net(), batches(1)[0]
    opt = SAM(sgd(net.parameters()), rho=0.0)
    inner, calls = closure_of(net, opt, batch), []
    loss = opt.step(lambda: (calls.append(1), inner())[1])
    assert not opt.active
    assert len(calls) == 1
    assert torch.equal(loss, loss_of(small_net(), batch))


def test_the_closure_path_returns_the_clean_loss() -> None:
    net, batch = small_net(), batches(1)[0]
    opt = SAM(sgd(net.parameters()), rho=0.5)
    clean = loss_of(net, batch).item()
    losses = []
    inner = closure_of(net, opt, batch)

    def closure() -> Tensor:
        losses.append(inner())
        return losses[-1]

    assert opt.step(closure) is losses[0]
    assert losses[0].item() == clean
    assert losses[1].item() > clean


def test_two_steps_without_ascent_warn_once() -> None:
    net, data = small_net(), batches(5)
    opt = SAM(sgd(net.parameters()), rho=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n, batch in enumerate(data):
            opt.zero_grad()
            backward(net, batch)
            opt.step()
            assert len(caught) == min(n, 1)
    assert "Compute the gradient again within `with opt.perturb():`" in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_no_warning_where_plain_steps_are_meant() -> None:
    net, data = small_net(), batches(6)
    train_bare(net, SAM(sgd(net.parameters()), rho=0.0), data)
    opt = SAM(sgd(net.parameters()), rho=0.1)
    for _ in range(3):
        opt.zero_grad()
        opt.step()  # without gradients
    train(net, opt, data)
    sparse = SAM(sgd(net.parameters()), rho=0.1, interval=4)
    for batch in data:
        if sparse.active:
            step_context(net, sparse, batch)
        else:
            train_bare(net, sparse, [batch])
    assert sparse.param_groups[0]["sam_step"] == 6
