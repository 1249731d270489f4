"""Loops of users that went wrong, most of them in silence: each with the weights or the error that is right."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin import GSAM, SAM, PerturbedOPT
from models import (
    backward,
    batches,
    closure_of,
    distance,
    loss_of,
    same_bits,
    sgd,
    small_net,
    step_closure,
    step_context,
    step_davda54,
    step_halves,
    weights,
    weights_after,
)

WAYS = [step_context, step_closure, step_davda54, step_halves]


# ---- how gradients are cleared between the passes ----


class PerSample(torch.optim.SGD):
    """As the optimizers of opacus: what backward hooks collect counts, and ``zero_grad`` alone clears it."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, lr=lr)
        self.collected: dict[Tensor, Tensor] = {}
        for p in self.param_groups[0]["params"]:
            p.register_post_accumulate_grad_hook(self._collect)

    def _collect(self, p: Tensor) -> None:
        assert p.grad is not None
        self.collected[p] = self.collected.get(p, 0) + p.grad.clone()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.collected.clear()

    def step(self, closure: Any = None) -> None:
        for p, grad in self.collected.items():
            p.grad = grad
        super().step()


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_gradients_are_cleared_by_the_base(way: Callable[..., None]) -> None:
    net = small_net()
    opt = SAM(PerSample(net.parameters(), lr=0.1), rho=0.1)
    for batch in batches(3):
        if way is step_davda54:
            opt.zero_grad()
        way(net, opt, batch)
    assert distance(weights(net), weights_after(3)) < 1e-7


@pytest.mark.parametrize("says_so", [True, False], ids=["zero_grad(False)", "by hand"])
def test_views_of_a_flat_buffer_stay_the_gradients(says_so: bool) -> None:
    """A loop that keeps its gradients in one buffer and scales that: the tensors are filled, not replaced."""
    net = small_net()
    params = list(net.parameters())
    flat = torch.zeros(sum(p.numel() for p in params))
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = part.view_as(p)
    opt, twin = SAM(sgd(params), rho=0.1), small_net()
    other = SAM(sgd(twin.parameters()), rho=0.1)
    for batch in batches(5):
        if says_so:
            opt.zero_grad(set_to_none=False)
        else:
            flat.zero_()
        backward(net, batch)
        with opt.perturb():
            backward(net, batch)
        flat.mul_(0.5)
        opt.step()
        other.zero_grad()
        backward(twin, batch)
        with other.perturb():
            backward(twin, batch)
        for p in twin.parameters():
            assert p.grad is not None
            p.grad.mul_(0.5)
        other.step()
    assert same_bits(weights(net), weights(twin))


# ---- what a second pass must not leave in the model ----


def norm_net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"start": 100}, {"interval": 3}, {"rho": 0.1}], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_statistics_count_one_pass_of_every_step(options: dict[str, Any], way: Callable[..., None]) -> None:
    net = norm_net()
    opt = SAM(sgd(net.parameters()), model=net, **({"rho": 0.1} | options))
    for batch in batches(6):
        way(net, opt, batch)
    assert int(net[2].num_batches_tracked) == 6


class Observer(nn.Module):
    """Widens a range as those of quantization: a buffer in place, one by replacing it, one not in checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(math.inf))
        self.register_buffer("high", torch.tensor(-math.inf))
        self.register_buffer("calls", torch.tensor(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.low.copy_(torch.minimum(self.low, x.detach().min()))
        self.high = torch.maximum(self.high, x.detach().max())
        self.calls += 1
        return x


def test_every_buffer_that_the_second_pass_writes_is_put_back() -> None:
    results = []
    for rho in (0.0, 5.0):
        torch.manual_seed(0)
        spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(36, 8))
        net = nn.Sequential(nn.Flatten(), spectral, Observer(), nn.Linear(8, 3))
        opt = SAM(sgd(net.parameters()), rho=rho, model=net)
        (batch,) = batches(1)
        step_context(net, opt, batch)
        results.append([b.clone() for b in net.buffers()])
        assert int(net[2].calls) == 1
    assert same_bits(*results)


def test_exempt_buffers_are_left_to_both_passes() -> None:
    net = nn.Sequential(nn.Flatten(), Observer(), nn.Linear(36, 3))
    opt = SAM(sgd(net.parameters()), rho=5.0, model=net, exempt_buffers=["*.calls"])
    step_context(net, opt, batches(1)[0])
    assert int(net[1].calls) == 2
    with pytest.raises(TypeError, match="exempt_buffers: 'calls' given; give a list"):
        SAM(sgd(net.parameters()), model=net, exempt_buffers="calls")


def test_a_graph_that_holds_an_untouched_buffer_survives_the_pass() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.BatchNorm1d(3).eval())
    opt, (batch,) = SAM(sgd(net.parameters()), rho=0.1, model=net), batches(1)
    backward(net, batch)
    x = torch.ones(3, requires_grad=True)
    held = (x * net[2].running_var).sum()
    with opt.perturb():
        backward(net, batch)
    held.backward()
    assert x.grad is not None


def test_same_rng_says_when_it_saw_no_first_pass() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(36, 3))
    opt = SAM(sgd(net.parameters()), rho=0.1, model=net, same_rng=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in batches(3):
            opt.zero_grad()
            nn.functional.cross_entropy(net[2](net[1](net[0](x))), y).backward()
            with opt.perturb():
                nn.functional.cross_entropy(net[2](net[1](net[0](x))), y).backward()
            opt.step()
    assert [str(w.message)[:62] for w in caught] == [
        "same_rng: the first pass did not call the module given as model="[:62]
    ]


# ---- what goes wrong after the passes ----


@pytest.mark.parametrize("result", [lambda x: (x, 1.0), lambda x: {"loss": x, "n": 2, "name": "a"}, lambda x: [x, x]])
def test_draws_average_whatever_a_closure_returns(result: Callable[[Tensor], Any]) -> None:
    net, data = small_net(), batches(3)
    opt = PerturbedOPT(sgd(net.parameters()), sizing="isotropic", scale=0.1, samples=2)
    for batch in data:
        before = weights(net)
        seen: list[Tensor] = []

        def closure(batch: Any = batch, seen: list[Tensor] = seen) -> Any:
            opt.zero_grad()
            seen.append(backward(net, batch).detach())
            return result(seen[-1])

        found = opt.step(closure)
        mean = torch.stack(seen).mean(0)
        expected = result(mean)
        assert type(found) is type(expected)
        flat, wanted = (list(x.values()) if isinstance(x, dict) else list(x) for x in (found, expected))
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(flat, wanted, strict=True))
        assert not opt._set.perturbed
        assert distance(before, weights(net)) < 1.0


@pytest.mark.parametrize("place", ["accumulate", "mean_result"])
def test_weights_come_back_when_the_averaging_fails(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatmin.optim.perturbed_opt import perturbed_opt

    def fails(*args: Any) -> None:
        raise MemoryError

    net, (batch,) = small_net(), batches(1)
    opt, before = PerturbedOPT(sgd(net.parameters()), sizing="isotropic", scale=0.1, samples=2), weights(net)
    monkeypatch.setattr(perturbed_opt, place, fails)
    with pytest.raises(MemoryError):
        opt.step(closure_of(net, opt, batch))
    assert same_bits(weights(net), before)
    assert not opt._set.perturbed


def test_weights_come_back_when_the_base_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls, options in ((SAM, {"rho": 0.1}), (PerturbedOPT, {"sizing": "isotropic", "scale": 0.1})):
        net, (batch,) = small_net(), batches(1)
        opt, before = cls(torch.optim.RMSprop(net.parameters()), **options), weights(net)  # type: ignore[arg-type]
        monkeypatch.setattr(opt.base, "step", lambda *a: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            opt.step(closure_of(net, opt, batch))
        assert same_bits(weights(net), before)


# ---- methods of the base, mixed precision, estimators ----


class Averaging(torch.optim.SGD):
    """As schedule-free optimizers: other weights for evaluation."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, lr=0.1)
        self.mode = "train"

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


@pytest.mark.parametrize("wrap", [SAM, PerturbedOPT])
def test_what_only_the_base_has_is_reached(wrap: Callable[..., Any]) -> None:
    opt = wrap(Averaging([nn.Parameter(torch.ones(2))]))
    assert hasattr(opt, "train")
    opt.eval()
    assert opt.base.mode == opt.mode == "eval"
    with pytest.raises(AttributeError, match="nor its base 'Averaging' has an attribute 'swap'"):
        _ = opt.swap
    with pytest.raises(AttributeError):
        _ = opt._private


def scaled_step(order: str, scaler: Any, net: nn.Module, opt: Any, batch: Any, clip: bool = False) -> None:
    """A step with a GradScaler that unscales before the second pass, after it, or nowhere."""
    opt.zero_grad()
    scaler.scale(loss_of(net, batch)).backward()
    if order == "before":
        scaler.unscale_(opt)
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    with opt.perturb():
        scaler.scale(loss_of(net, batch)).backward()
    if order == "after":
        scaler.unscale_(opt)
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), 1e3)
    scaler.step(opt)
    scaler.update()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("wrap", [SAM, GSAM, PerturbedOPT], ids=lambda wrap: wrap.__name__)
def test_unscaling_before_the_second_pass_is_refused(wrap: Callable[..., Any], clip: bool) -> None:
    """Of PerturbedOPT, too, whose passes add up: an unperturbed micro-batch, and one under noise."""
    net, (batch,) = small_net(), batches(1)
    options = {"sizing": "isotropic", "scale": 0.1} if wrap is PerturbedOPT else {"rho": 0.1}
    opt, before = wrap(sgd(net.parameters()), **options), weights(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with pytest.raises(RuntimeError, match=r"scaler.unscale_\(\) ran before the perturbed pass and not after it"):
        scaled_step("before", scaler, net, opt, batch, clip)
    assert same_bits(weights(net), before)


@pytest.mark.parametrize("order", ["after", "nowhere"])
def test_the_other_orders_are_sams_step(order: str) -> None:
    net = small_net()
    opt, scaler = SAM(sgd(net.parameters()), rho=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for batch in batches(3):
        scaled_step(order, scaler, net, opt, batch, clip=True)
    assert distance(weights(net), weights_after(3)) < 1e-6


def test_an_unscaled_second_loss_steps_without_the_scaler() -> None:
    net, (batch,) = small_net(), batches(1)
    opt, scaler = SAM(sgd(net.parameters()), rho=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(loss_of(net, batch)).backward()
    scaler.unscale_(opt)
    with opt.perturb():
        backward(net, batch)
    opt.step()
    assert distance(weights(net), weights_after(1)) < 1e-6


@pytest.mark.parametrize(
    ("curvature", "advice"),
    [
        ("gnb", "call opt.update_curvature"),
        ("hutchinson", "call opt.update_curvature"),
        (lambda params: [None] * len(params), "the function has returned None"),
    ],
)
def test_an_estimator_that_is_never_fed_says_so_once(curvature: Any, advice: str) -> None:
    net = small_net()
    opt = PerturbedOPT(sgd(net.parameters()), curvature=curvature)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches(5):
            opt.step(closure_of(net, opt, batch))
    (warning,) = [w for w in caught if "without noise" in str(w.message)]
    assert advice in str(warning.message)


def test_a_checkpoint_can_be_made_from_a_mapping() -> None:
    """Accelerate rebuilds every state dict as ``type(state)({...})``."""
    net, twin, data = small_net(), small_net(), batches(3)
    opt = PerturbedOPT(sgd(net.parameters(), momentum=0.9))
    for batch in data:
        opt.step(closure_of(net, opt, batch))
    state = opt.state_dict()
    rebuilt = type(state)({key: copy.deepcopy(state[key]) for key in state})
    other = PerturbedOPT(sgd(twin.parameters(), momentum=0.9))
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(rebuilt)
    for batch in data:
        opt.step(closure_of(net, opt, batch))
        other.step(closure_of(twin, other, batch))
    assert same_bits(weights(net), weights(twin))
