"""Whole trajectories of PerturbedOPT: POPT-1 itself, fused against plain, several draws, sources of the curvature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin import PerturbedOPT, ops
from flatmin.optim import Lion, _fused
from models import (
    backward,
    batches,
    build,
    closure_of,
    distance,
    loss_of,
    params_of,
    same_bits,
    sgd,
    small_net,
    train_bare,
    weights,
)
from popt_reference import (
    MIXED,
    WAYS,
    Popt1,
    curvatures,
    in_closure,
    momentum_sgd,
    noisy_net,
    run,
    seeds,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- the trajectory ----


@pytest.mark.parametrize(
    ("distribution", "base", "lipschitz", "log"),
    [
        ("uniform", "sgd", "max", False),
        ("uniform", "adam", "element", True),
        ("truncated_normal", "sgd", "element", True),
        ("truncated_normal", "adam", "max", False),
        ("normal", "sgd", 0.5, True),
    ],
)
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_the_trajectory_is_popt_1(distribution: str, base: str, lipschitz: str | float, log: bool, way) -> None:
    data = batches(8, torch.float64) * 3
    ours, theirs = small_net(torch.float64), small_net(torch.float64)
    optimizer = (
        torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        if base == "sgd"
        else torch.optim.Adam(ours.parameters(), lr=0.01)
    )
    generator = torch.Generator().manual_seed(7)
    options = {
        "distribution": distribution,
        "lipschitz": lipschitz,
        "schedule": "log" if log else None,
        "generator": generator,
    }
    opt = PerturbedOPT(optimizer, **options, **MIXED)
    popt = Popt1(theirs, next(seeds()), base, distribution, lipschitz, log)
    for n, batch in enumerate(data):
        popt.epoch = opt.epoch = 1 + n // 8
        way(ours, opt, batch)
        popt.step(batch)
    # 24 steps, each with a rounding error of 1e-12 in the size of the noise (see MIXED)
    assert distance(weights(ours), weights(theirs)) < 1e-10
    assert distance(curvatures(opt), popt.h) < 1e-10
    assert min(popt.capped) < 0.9 and max(popt.capped) > 0.1
    assert distance(weights(ours), weights(small_net(torch.float64))) > 0.01


def record_fused(patch: pytest.MonkeyPatch, allowed: bool) -> list[bool]:
    used: list[bool] = []
    fused_step = _fused.restore_and_step

    def spy(*args: Any) -> bool:
        used.append(allowed and fused_step(*args))
        return used[-1]

    patch.setattr(_fused, "restore_and_step", spy)
    return used


FUSED = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "dampening": 0.1, "maximize": True}),
    (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.01}),
    (Lion, {"lr": 0.001, "weight_decay": 0.1}),
]


@pytest.mark.parametrize(("cls", "options"), FUSED, ids=str)
@pytest.mark.parametrize("lipschitz", ["max", "element"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-11)], ids=str)
def test_the_fused_step_is_the_plain_one(cls, options, lipschitz, dtype, bound, monkeypatch) -> None:
    results = []
    for allowed in (True, False):
        net = small_net(dtype)
        groups = [{"params": net[0].parameters()}, {"params": net[2:].parameters(), "popt_gamma": 0.1}]
        generator = torch.Generator().manual_seed(7)
        opt = PerturbedOPT(cls(groups, **options), lipschitz=lipschitz, generator=generator, **MIXED)
        with monkeypatch.context() as patch:
            used = record_fused(patch, allowed)
            run(net, opt, batches(6, dtype), in_closure)
        assert used == [allowed] * 5  # not the first, which restores nothing
        results.append((weights(net), curvatures(opt)))
    assert distance(results[0][0], results[1][0]) < bound
    assert distance(results[0][1], results[1][1]) < bound


def test_a_fused_base_that_takes_no_curvature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would step, and the curvature would never be learned: an error at its first step instead."""

    def restore_without(params, grads, buffers, backup, lr, *, momentum, dampening, weight_decay, nesterov, maximize):
        raise AssertionError("the step was taken")

    net = small_net()
    opt = PerturbedOPT(torch.optim.SGD(net.parameters(), lr=0.1), **MIXED)
    run(net, opt, batches(2), in_closure)
    monkeypatch.setattr(ops, "restore_sgd_", restore_without)
    with pytest.raises(TypeError, match="unexpected keyword argument 'curvatures'"):
        run(net, opt, batches(1), in_closure)


def test_what_is_fused_and_what_is_left_to_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(cls: type[torch.optim.Optimizer] = torch.optim.SGD, prepare=lambda base: None, **options: Any) -> bool:
        net = small_net()
        base = build(cls, net.parameters())
        prepare(base)
        opt = PerturbedOPT(base, **(MIXED | options))
        with monkeypatch.context() as patch:
            used = record_fused(patch, allowed=True)
            run(net, opt, batches(2), in_closure)
        return used[-1]

    assert fused()
    assert fused(torch.optim.AdamW)
    assert not fused(torch.optim.Adadelta)
    assert not fused(prepare=lambda base: base.register_step_pre_hook(lambda *_: None))
    assert fused(curvature=lambda params: [torch.ones_like(p) for p in params])  # with SAM's operator


@pytest.mark.parametrize("off", [{"scale": 0.0}, {"gamma": 0.0, "eps": 0.0}], ids=str)
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adadelta], ids=lambda c: c.__name__)
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_without_noise_it_is_the_bare_optimizer_bit_for_bit(off: dict[str, float], cls, way) -> None:
    a, b = small_net(), small_net()
    run(a, PerturbedOPT(build(cls, a.parameters()), **off), batches(6), way)
    train_bare(b, build(cls, b.parameters()), batches(6))
    assert same_bits(a.parameters(), b.parameters())


def test_a_step_without_noise_has_no_quotient() -> None:
    """The copy of the weights that an earlier ascent left is not where this step began."""
    net, opt = noisy_net()
    data = batches(4)
    run(net, opt, data[:3])
    rho, h = opt.state_dict()["noise"]["rho"].clone(), curvatures(opt)
    backward(net, data[3])
    opt.step()
    assert float(rho) > 0.0
    assert torch.equal(opt.state_dict()["noise"]["rho"], rho)
    assert distance(curvatures(opt), h) > 0.0


# ---- several draws ----


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_draws_average_the_gradients_of_as_many_noises(base: str) -> None:
    data = batches(5, torch.float64)
    results = []
    for by_hand in (True, False):
        net = small_net(torch.float64)
        optimizer = momentum_sgd(net) if base == "sgd" else torch.optim.Adam(net.parameters(), lr=0.01)
        opt = PerturbedOPT(optimizer, samples=3, generator=torch.Generator().manual_seed(7), **MIXED)
        for batch in data:
            if not by_hand:
                loss = opt.step(closure_of(net, opt, batch))
                continue
            count = 3 if opt.active else 1
            losses, grads = [], []
            for _ in range(count):
                opt.zero_grad()
                with opt.perturb():
                    losses.append(float(backward(net, batch).detach()))
                grads.append([p.grad for p in net.parameters()])
            for p, parts in zip(net.parameters(), zip(*grads, strict=True), strict=True):
                p.grad = sum(parts) / count
            opt.step()
            mean = sum(losses) / count
        results.append(weights(net))
    assert len(set(losses)) == 3
    assert float(loss) == pytest.approx(mean, rel=1e-12)
    assert distance(*results) < 1e-11


def test_contexts_add_gradients_and_draw_anew() -> None:
    net, opt = noisy_net(torch.float64)
    (batch,) = batches(1, torch.float64)
    run(net, opt, [batch])
    opt.zero_grad()
    parts = []
    for _ in range(2):
        with opt.perturb():
            parts.append(torch.autograd.grad(loss_of(net, batch), list(net.parameters())))
    opt.load_state_dict(opt.state_dict() | {"noise": opt.state_dict()["noise"] | {"draws": 0}})
    for _ in range(2):
        with opt.perturb():
            backward(net, batch)
    assert distance(parts[0], parts[1]) > 1e-3
    assert distance([p.grad for p in net.parameters()], [a + b for a, b in zip(*parts, strict=True)]) < 1e-15


# ---- what the curvature is averaged from ----


def quadratic() -> tuple[nn.Parameter, Tensor]:
    """A weight and a matrix ``A``: the Hessian of ``w A w / 2``."""
    g = torch.Generator().manual_seed(3)
    a = torch.randn(5, 5, generator=g, dtype=torch.float64)
    return nn.Parameter(torch.randn(5, generator=g, dtype=torch.float64)), a + a.T


def test_hutchinson_averages_probed_products() -> None:
    weight, a = quadratic()
    generator = torch.Generator().manual_seed(7)
    opt = PerturbedOPT(sgd([weight]), curvature="hutchinson", curvature_interval=2, beta1=0.9, generator=generator)
    h, updates, made = torch.zeros(5, dtype=torch.float64), 0, []
    held = weight.grad = torch.ones_like(weight)
    for step in range(4):
        made.append([opt.update_curvature(lambda: 0.5 * weight @ a @ weight) for _ in range(2)])
        assert weight.grad is held
        if step % 2 == 0:
            v = torch.empty(5, dtype=torch.float64)
            ops.probe_([v], ops.random_key(opt._set.seed, updates, 2**15))
            assert set(v.tolist()) == {-1.0, 1.0}
            h, updates = 0.9 * h + 0.1 * v * (a @ v), updates + 1
        assert distance(curvatures(opt), [h]) < 1e-14
        with opt.perturb():
            pass
        opt.step()
    assert made == [[True, False], [False, False]] * 2


def test_hutchinson_of_parameters_that_the_loss_is_linear_in_or_without() -> None:
    a, b, c = params_of([2.0], [3.0], [4.0])
    opt = PerturbedOPT(sgd([a, b, c]), curvature="hutchinson", beta1=0.0)
    assert opt.update_curvature(lambda: (a**3).sum() + b.sum())
    assert [t.item() for t in curvatures(opt)] == [12.0, 0.0]
    assert sorted(opt.state_dict()["noise"]["state"]) == [0, 1]


def test_gnb_squares_the_gradient_for_labels_of_the_models_own() -> None:
    net, (inputs, _) = small_net(torch.float64), batches(1, torch.float64)[0]
    opt = PerturbedOPT(sgd(net.parameters()), curvature="gnb", beta1=0.0)
    state = torch.get_rng_state()
    assert opt.update_curvature(lambda: net(inputs))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())
    uniform = torch.empty(8, 3)
    ops.probe_([uniform], ops.random_key(opt._set.seed, 0, 2**15), distribution="uniform")
    logits = net(inputs)
    labels = (logits.detach().float() - (-(0.5 * uniform + 0.5).log()).log()).argmax(1)
    grads = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), list(net.parameters()))
    assert distance(curvatures(opt), [8 * g * g for g in grads]) < 1e-14


def test_gnb_labels_follow_the_softmax() -> None:
    weight = nn.Parameter(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    opt = PerturbedOPT(sgd([weight]), curvature="gnb", beta1=0.0)
    n = 20000
    opt.update_curvature(lambda: weight.expand(n, 3))
    p = weight.detach().softmax(0)
    # the gradient is softmax - share of each label: n g^2 / (p (1 - p)) is about chi^2 of one degree each
    assert float((curvatures(opt)[0] / (p * (1 - p))).max()) < 16.0


@pytest.mark.parametrize("lipschitz", ["max", "element"])
def test_a_callable_is_asked_for_its_estimates(lipschitz: str) -> None:
    weight, a = quadratic()
    asked: list[list[Tensor]] = []

    def curvature(params: list[Tensor]) -> list[Tensor]:
        asked.append([p.detach().clone() for p in params])
        return [p.detach() ** 2 for p in params]

    opt = PerturbedOPT(
        sgd([weight]), curvature=curvature, curvature_interval=3, beta1=0.5, beta2=0.25, lipschitz=lipschitz
    )
    points = []
    for _ in range(7):
        opt.zero_grad()
        with opt.perturb():
            (0.5 * weight @ a @ weight).backward()
        opt.step()
        points.append(weight.detach().clone())
    assert same_bits([w for (w,) in asked], points[::3])  # after steps 0, 3 and 6, at the weights that they reached
    h, rho, last = torch.zeros_like(points[0]), torch.zeros_like(points[0]), None
    for t, w in enumerate(points[::3]):
        old = h / (1 - 0.5**t) if t else None
        h = 0.5 * h + 0.5 * w * w
        if last is not None:
            q = (h / (1 - 0.5 ** (t + 1)) - old).abs() / (w - last).abs()
            rho = 0.25 * rho + 0.75 * (q if lipschitz == "element" else q.max())
        last = w
    noise = opt.state_dict()["noise"]
    assert distance([noise["state"][0]["curvature"]], [h]) < 1e-14
    ours = noise["rho"].expand(5) if lipschitz == "max" else noise["state"][0]["lipschitz"]
    assert float(((ours - rho) / rho).abs().max()) < 1e-12
