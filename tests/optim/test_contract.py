"""What every wrapper must do so that torch and its trainers take it for an ordinary optimizer: one row a wrapper.

A new wrapper gets a row in WRAPPERS and nothing else here. What is its own is tested in a file of its own.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin import GSAM, SAM, PerturbedOPT
from models import Batch, backward, batches, closure_of, loss_of, same_bits, small_net, weights

Wrap = Callable[[torch.optim.Optimizer], Any]

WRAPPERS: dict[str, Wrap] = {
    "SAM": lambda base: SAM(base, rho=0.1),
    "ASAM": lambda base: SAM(base, rho=0.5, adaptive=True),
    "GSAM": lambda base: GSAM(base, rho=0.1, alpha=0.3),
    "GSAM of the loss": lambda base: GSAM(base, rho=0.1, minimize="loss"),
    "PerturbedOPT": lambda base: PerturbedOPT(base, generator=torch.Generator().manual_seed(7)),
    "PerturbedOPT, isotropic": lambda base: PerturbedOPT(
        base, sizing="isotropic", scale=0.01, generator=torch.Generator().manual_seed(7)
    ),
}

every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def momentum_sgd(params: Iterable[Any]) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def made(wrap: Wrap, seed: int = 0) -> tuple[nn.Sequential, Any]:
    net = small_net(seed=seed)
    return net, wrap(momentum_sgd(net.parameters()))


def by_closure(net: nn.Module, opt: Any, data: Iterable[Batch]) -> None:
    for batch in data:
        opt.step(closure_of(net, opt, batch))


def by_context(net: nn.Module, opt: Any, data: Iterable[Batch]) -> None:
    """The loop of either kind: a gradient before the context does no harm to the one that is taken in it."""
    for batch in data:
        opt.zero_grad()
        if isinstance(opt, SAM):
            backward(net, batch)
        with opt.perturb():
            backward(net, batch)
        opt.step()


@every_wrapper
def test_it_owns_nothing_that_the_base_owns(wrap: Wrap) -> None:
    net, opt = made(wrap)
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.param_groups is opt.base.param_groups
    assert opt.state is opt.base.state
    assert opt.defaults is opt.base.defaults
    opt.param_groups[0]["lr"] = 0.25
    assert opt.base.param_groups[0]["lr"] == 0.25
    assert [p for g in opt.param_groups for p in g["params"]] == list(net.parameters())


@every_wrapper
def test_context_and_closure_take_the_same_step(wrap: Wrap) -> None:
    results = []
    for way in (by_context, by_closure):
        net, opt = made(wrap)
        way(net, opt, batches(4))
        results.append(weights(net))
    assert same_bits(*results)


@every_wrapper
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(wrap: Wrap) -> None:
    data = batches(6)
    net, opt = made(wrap)
    by_closure(net, opt, data)
    first, first_opt = made(wrap)
    by_closure(first, first_opt, data[:3])
    file = io.BytesIO()
    torch.save({"net": first.state_dict(), "opt": first_opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, second_opt = made(wrap, seed=9)
    second.load_state_dict(saved["net"])
    second_opt.load_state_dict(saved["opt"])
    by_closure(second, second_opt, data[3:])
    assert same_bits(weights(net), weights(second))


@every_wrapper
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_by_itself(wrap: Wrap, copied: Callable[[Any], Any]) -> None:
    net, opt = made(wrap)
    by_closure(net, opt, batches(3))
    twin, twin_opt = copied((net, opt))
    for module, each in ((net, opt), (twin, twin_opt)):
        by_closure(module, each, batches(2, seed=5))
    assert same_bits(weights(net), weights(twin))
    assert not {id(p) for p in net.parameters()} & {id(p) for g in twin_opt.param_groups for p in g["params"]}


@every_wrapper
def test_a_scheduler_drives_the_learning_rate(wrap: Wrap) -> None:
    net, opt = made(wrap)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
    for batch in batches(3):
        opt.step(closure_of(net, opt, batch))
        scheduler.step()
    assert opt.base.param_groups[0]["lr"] == pytest.approx(0.1 / 8)


@every_wrapper
@pytest.mark.parametrize("way", [by_context, by_closure])
def test_hooks_of_the_wrapper_and_of_the_base_run_once_a_step(wrap: Wrap, way: Callable[..., None]) -> None:
    net, opt = made(wrap)
    calls: list[str] = []
    opt.register_step_pre_hook(lambda *_: calls.append("wrapper"))
    opt.base.register_step_post_hook(lambda *_: calls.append("base"))
    way(net, opt, batches(2))
    assert calls == ["wrapper", "base"] * 2


@every_wrapper
@pytest.mark.parametrize("way", ["context", "closure"])
def test_weights_come_back_after_an_exception(wrap: Wrap, way: str) -> None:
    net, opt = made(wrap)
    by_closure(net, opt, batches(2))  # so that every kind of noise has a size
    before, (batch,) = weights(net), batches(1)
    backward(net, batch)

    def fails() -> Tensor:
        loss = backward(net, batch)
        if not same_bits(weights(net), before):
            raise KeyboardInterrupt
        return loss

    def closure() -> Tensor:
        opt.zero_grad()
        return fails()

    with pytest.raises(KeyboardInterrupt):
        if way == "closure":
            opt.step(closure)
        else:
            with opt.perturb():
                fails()
    assert same_bits(weights(net), before)


@every_wrapper
def test_a_second_perturbation_and_a_checkpoint_under_one_are_refused(wrap: Wrap) -> None:
    net, opt = made(wrap)
    by_closure(net, opt, batches(2))
    backward(net, batches(1)[0])
    with opt.perturb():
        for action in (opt.ascend, opt.state_dict, lambda: opt.step(lambda: None)):
            with pytest.raises(RuntimeError, match="the weights are perturbed"):
                action()


@every_wrapper
def test_a_step_that_the_scaler_skips_changes_nothing(wrap: Wrap) -> None:
    net, opt = made(wrap)
    by_closure(net, opt, batches(2))
    scaler, (batch,) = torch.amp.GradScaler("cpu", init_scale=16.0), batches(1)
    before = weights(net)
    opt.zero_grad()
    scaler.scale(loss_of(net, batch)).backward()
    with opt.perturb():
        scaler.scale(loss_of(net, batch)).backward()
    next(net.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
    scaler.step(opt)
    scaler.update()
    assert same_bits(weights(net), before)
    assert scaler.get_scale() == 8.0


@every_wrapper
def test_a_group_can_be_added(wrap: Wrap) -> None:
    net = small_net()
    params = list(net.parameters())
    opt = wrap(momentum_sgd(params[:2]))
    (batch,) = batches(1)
    by_closure(net, opt, [batch])
    opt.add_param_group({"params": params[2:], "lr": 0.05})
    own = [key for key in opt.param_groups[0] if key.startswith(("sam_", "popt_", "gsam_"))]
    assert own
    assert all(key in opt.param_groups[1] for key in own)
    before = weights(net)
    by_closure(net, opt, [batch])
    assert all(not torch.equal(p, w) for p, w in zip(params, before, strict=True))


@every_wrapper
def test_wrapping_twice_is_refused(wrap: Wrap) -> None:
    _, opt = made(wrap)
    with pytest.raises(TypeError, match="is a wrapper itself"):
        wrap(opt)
    with pytest.raises(ValueError, match="already a default of SGD"):
        wrap(opt.base)
