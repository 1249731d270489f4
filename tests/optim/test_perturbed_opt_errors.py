"""What PerturbedOPT refuses: numbers that are not finite, arguments that cannot be used. No weight moves by them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin import SAM, PerturbedOPT
from flatmin.optim.perturbed_opt._nonfinite import NonFiniteFlag
from models import (
    batches,
    build,
    distance,
    give_grads,
    params_of,
    same_bits,
    set_grads,
    sgd,
    small_net,
    torch_optimizers,
    weights,
    wrappable_optimizers,
)
from popt_reference import WAYS, momentum_sgd, noisy_net, run

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- what is not finite ----


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("lipschitz", ["max", "element", 0.0])
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_a_gradient_that_is_not_finite_is_an_error(bad: float, lipschitz: str | float, way) -> None:
    net, opt = noisy_net(lipschitz=lipschitz)
    data = batches(4)
    run(net, opt, data[:2])
    handle = net[0].weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), bad))
    with pytest.raises(RuntimeError, match=r"the curvature of param_groups\[0\]\['params'\]\[0\] is not finite"):
        for batch in data[2:]:
            way(net, opt, batch)
    handle.remove()
    assert not opt._set.perturbed
    # only what the base itself made of the gradient
    assert all(bool(p.isfinite().all()) for p in list(net.parameters())[1:])
    assert bool(net[0].weight[0].isfinite().all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_a_curvature_that_is_not_finite_moves_no_weight(bad: float, way) -> None:
    """As a callable gives it, or a checkpoint holds it."""
    net, data = small_net(), batches(4)

    def curvature(params: list[Tensor]) -> list[Tensor]:
        return [torch.full_like(p, bad if opt._set.steps == 1 else 1.0) for p in params]

    opt = PerturbedOPT(momentum_sgd(net), curvature=curvature, curvature_interval=1)
    with pytest.raises(RuntimeError, match="is not finite"):
        run(net, opt, data, way)
    assert opt._set.steps <= 2
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    net, opt = noisy_net()
    run(net, opt, data[:2])
    opt._set.states[net[2].bias].curvature[1] = bad
    before, called = weights(net), []
    for action in (opt.ascend, lambda: opt.step(lambda: called.append(1))):
        with pytest.raises(RuntimeError, match=r"the curvature of param_groups\[0\]\['params'\]\[3\] is not finite"):
            action()
        assert same_bits(net.parameters(), before)
        assert not opt._set.perturbed
    assert not called


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["curvature", "lipschitz", "rho"])
def test_a_checkpoint_that_is_not_finite_moves_no_weight(where: str, bad: float) -> None:
    options: dict[str, Any] = {"lipschitz": "element" if where == "lipschitz" else "max"}
    net, opt = noisy_net(**options)
    run(net, opt, batches(3))
    state = copy.deepcopy(opt.state_dict())
    (state["noise"]["rho"] if where == "rho" else state["noise"]["state"][2][where].view(-1)[1]).fill_(bad)
    net, opt = noisy_net(**options)
    before = weights(net)
    opt.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"is not finite|must not be negative"):
        opt.ascend()
    assert same_bits(weights(net), before)
    assert not opt._set.perturbed


def test_the_alarm_waits_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        arrived = False

        def query(self) -> bool:
            return self.arrived

        def synchronize(self) -> None:
            self.arrived = True

    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    flag, event = NonFiniteFlag(), Event()
    flag._pending += [(event, torch.tensor(0.0)), (event, torch.tensor(2.0))]
    assert not flag.poll(wait=True)  # a capture forbids to ask
    capturing = False
    assert not flag.poll()
    assert flag.poll(wait=True)
    assert not flag.poll()
    flag._pending.append((event, torch.tensor(True)))
    assert flag.poll()
    flag.record(torch.tensor(math.nan))
    assert flag.poll()


# ---- arguments ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"distribution": "gauss"},
            ValueError,
            "distribution: 'gauss' given; give one of 'uniform', 'truncated_normal', 'normal'",
        ),
        ({"curvature": "diagonal"}, ValueError, "curvature: 'diagonal' given; .* or a callable"),
        ({"gamma": -0.1}, ValueError, "gamma: -0.1"),
        ({"eps": math.nan}, ValueError, "eps: nan"),
        ({"scale": "1"}, TypeError, "scale: '1'"),
        ({"scale": math.inf}, ValueError, "scale: inf"),
        ({"beta1": 1.0}, ValueError, "beta1: 1.0 given; give a float from 0 to below 1"),
        ({"beta2": -0.5}, ValueError, "beta2: -0.5"),
        ({"lipschitz": "largest"}, ValueError, "lipschitz: 'largest' given; .* or a float >= 0"),
        ({"lipschitz": -1.0}, ValueError, "lipschitz: -1.0"),
        ({"min_step": -1.0}, ValueError, "min_step: -1.0"),
        ({"schedule": "cosine"}, ValueError, "schedule: 'cosine' given; give 'log' or None or a callable"),
        ({"samples": 0}, ValueError, "samples: 0"),
        ({"sizing": "layer"}, ValueError, "sizing: 'layer'"),
        ({"sizing": "filter", "gamma": 0.2}, ValueError, "gamma: 0.2 given, but only sizing='curvature' reads it"),
        ({"sizing": "tensor", "curvature": "gnb"}, ValueError, "curvature: 'gnb' given, but only sizing='curvature'"),
        ({"model": "net"}, TypeError, "model: str"),
        ({"sync": "global"}, ValueError, "sync: 'global' given; .* or a torch.distributed process group"),
        ({"generator": 3}, TypeError, "generator: 3"),
        ({"curvature_interval": 0}, ValueError, "curvature_interval: 0"),
        ({"start": -1}, ValueError, "start: -1"),
        ({"lr": 0.1}, TypeError, "lr: given with an optimizer instance; they belong to PerturbedOPT"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PerturbedOPT(sgd(small_net().parameters()), **options)


def test_what_is_no_base_is_refused() -> None:
    params = list(small_net().parameters())
    with pytest.raises(TypeError, match=r"base: missing.*PerturbedOPT\(torch.optim.SGD"):
        PerturbedOPT(params)
    with pytest.raises(TypeError, match="base: SAM is a wrapper itself"):
        PerturbedOPT(SAM(sgd(params)))
    base = sgd(small_net().parameters())
    PerturbedOPT(base)
    with pytest.raises(ValueError, match="Wrap an optimizer once"):
        PerturbedOPT(base)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['popt_gamma'\]: -1.0"):
        PerturbedOPT(sgd([{"params": params, "popt_gamma": -1.0}]))
    opt = PerturbedOPT(params, torch.optim.Adam, lr=0.5, gamma=0.2)
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["popt_gamma"]) == (0.5, 0.2)
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    weight.grad = torch.ones_like(weight)
    with pytest.raises(TypeError, match=r"shape \(2,\) is complex"):
        PerturbedOPT(sgd([weight])).step()


def test_what_estimators_are_given_is_checked() -> None:
    (weight,) = params_of([1.0, 2.0])
    give_grads([weight], [1.0, 1.0])
    for estimates, message in (
        ([], "curvature: gave 0 tensors for 1 parameters"),
        (torch.ones(1), "curvature: gave Tensor for 1 parameters"),
        ([torch.ones(3)], r"curvature: gave shape \(3,\) for a parameter of shape \(2,\)"),
    ):
        with pytest.raises(TypeError, match=message):
            PerturbedOPT(sgd([weight]), curvature=lambda params, e=estimates: e).step()
    for curvature, value, message in (
        ("gnb", torch.ones(3), r"closure: gave shape \(3,\), but curvature='gnb' needs logits"),
        ("gnb", None, "closure: gave NoneType"),
        ("hutchinson", torch.ones(3), r"closure: gave shape \(3,\), but curvature='hutchinson' needs the loss"),
    ):
        with pytest.raises(TypeError, match=message):
            PerturbedOPT(sgd([weight]), curvature=curvature).update_curvature(lambda v=value: v)
    with pytest.raises(RuntimeError, match=r"update_curvature\(\): it is for .*, not 'squared_gradient'"):
        PerturbedOPT(sgd([weight])).update_curvature(lambda: weight.sum())


def test_a_missing_double_backward_names_the_way_out() -> None:
    torch.manual_seed(0)
    qkv = nn.Linear(4, 12)
    opt = PerturbedOPT(sgd(qkv.parameters()), curvature="hutchinson")

    def closure() -> Tensor:
        q, k, v = qkv(torch.ones(1, 1, 5, 4)).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v).square().mean()

    with pytest.raises(RuntimeError, match=r"differentiated twice.*curvature='gnb'.*SDPBackend.MATH.*torch says"):
        opt.update_curvature(closure)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert opt.update_curvature(closure)


def test_group_keys_collide_with_no_optimizer_of_torch() -> None:
    ours = {"popt_gamma", "popt_eps", "popt_scale"}
    for cls in torch_optimizers():
        base = build(cls, [nn.Parameter(torch.ones(2, 2))])
        assert not ours & (base.defaults.keys() | base.param_groups[0].keys())
        if cls in wrappable_optimizers():
            assert ours <= PerturbedOPT(base).param_groups[0].keys()


@pytest.mark.parametrize("cls", wrappable_optimizers(), ids=lambda c: c.__name__)
def test_every_optimizer_trains_under_noise(cls: type[torch.optim.Optimizer]) -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    opt = PerturbedOPT(build(cls, [weight]), gamma=0.5)
    seen = []
    for _ in range(3):
        before = weight.detach().clone()
        with opt.perturb():
            seen.append(distance([weight.detach()], [before]))
            set_grads([weight])
        assert same_bits([weight], [before])
        opt.step()
    assert seen[0] == 0.0 and min(seen[1:]) > 0.01
