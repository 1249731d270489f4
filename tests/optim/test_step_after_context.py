"""The step after the context has restored the weights: one pass too, from the weights as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from flatmin import SAM, PerturbedOPT, ops
from flatmin.optim import Lion
from models import backward, batches, distance, same_bits, small_net, step_closure, step_context, weights

BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "adam, amsgrad": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "lion": lambda params: Lion(params, lr=0.01),
}


@pytest.mark.parametrize("base", BASES)
def test_it_is_the_step_of_the_closure_path_to_the_bit(base: str) -> None:
    nets = [small_net(), small_net()]
    for net, step in zip(nets, (step_context, step_closure), strict=True):
        opt = SAM(BASES[base](net.parameters()), rho=0.1)
        for batch in batches(4):
            step(net, opt, batch)
    assert same_bits(weights(nets[0]), weights(nets[1]))


def calls_of(monkeypatch: pytest.MonkeyPatch, base: torch.optim.Optimizer) -> list[int]:
    """How often the base's own step runs, as an unpatched base would have it."""
    called: list[int] = []
    own = type(base).step

    def step(self: Any, *args: Any) -> Any:
        called.append(1)
        return own(self, *args)

    monkeypatch.setattr(type(base), "step", step)
    return called


@pytest.mark.parametrize("base", BASES)
def test_the_base_does_not_run(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_net()
    opt = SAM(BASES[base](net.parameters()), rho=0.1)
    called = calls_of(monkeypatch, opt.base)
    for batch in batches(3):
        step_context(net, opt, batch)
    assert not called


@pytest.mark.parametrize("flag", ["foreach", "maximize"])
def test_a_group_that_asks_for_an_implementation_gets_it(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_net()
    opt = SAM(torch.optim.SGD(net.parameters(), lr=0.1, **{flag: True}), rho=0.1)
    called = calls_of(monkeypatch, opt.base)
    step_context(net, opt, batches(1)[0])
    assert len(called) == (flag != "maximize")  # which the pass knows


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"rho": 0.1, "start": 100}])
@pytest.mark.parametrize("base", BASES)
def test_a_step_without_ascent_is_the_bare_optimizers_to_the_bit(base: str, options: dict[str, Any]) -> None:
    net, twin = small_net(), small_net()
    opt, bare = SAM(BASES[base](net.parameters()), **options), BASES[base](twin.parameters())
    for batch in batches(4):
        step_context(net, opt, batch)
        bare.zero_grad()
        backward(twin, batch)
        bare.step()
    assert same_bits(weights(net), weights(twin))


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_what_the_loop_does_to_weights_and_gradients_in_between_counts(base: str) -> None:
    """Weights that were clipped, also past autograd, and gradients that were scaled after the context."""
    net, twin = small_net(), small_net()
    opt = SAM(BASES[base](net.parameters()), rho=0.1)
    plain = SAM(BASES[base](twin.parameters()), rho=0.1)
    plain.base.register_step_pre_hook(lambda *_: None)  # so that torch's own step runs
    for batch in batches(3):
        for module, each in ((net, opt), (twin, plain)):
            each.zero_grad()
            backward(module, batch)
            with each.perturb():
                backward(module, batch)
            for p in module.parameters():
                p.data.clamp_(-0.3, 0.3)
                assert p.grad is not None
                p.grad.mul_(0.5)
            each.step()
    assert distance(weights(net), weights(twin)) < 1e-6


def test_frozen_sparse_and_converted_parameters_take_torchs_step(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, table = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 2))
    opt = SAM(torch.optim.SGD([{"params": [dense]}, {"params": [table], "sam_rho": 0.0}], lr=0.1), rho=0.1)
    called = calls_of(monkeypatch, opt.base)
    for _ in range(2):
        opt.zero_grad()
        for _ in range(2):
            loss = (dense**2).sum() + nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum()
            if not opt._in_second_pass:
                loss.backward()
                opt.ascend()
                opt.zero_grad()
            else:
                loss.backward()
        opt.restore()
        opt.step()
    assert len(called) == 2
    torch.testing.assert_close(table[1], torch.full((2,), 0.8))


def test_no_backup_is_allocated_where_nothing_moves() -> None:
    net = small_net()
    opt = SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.0)
    step_context(net, opt, batches(1)[0])
    assert all(bucket._backup is None for bucket in opt._set.known_buckets())


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_perturbed_opt_learns_the_same_curvature_after_the_context(base: str) -> None:
    nets = [small_net(), small_net()]
    learned = []
    for net, in_context in zip(nets, (True, False), strict=True):
        opt = PerturbedOPT(BASES[base](net.parameters()), generator=torch.Generator().manual_seed(3))
        for batch in batches(4):
            opt.zero_grad()
            if in_context:
                with opt.perturb():
                    backward(net, batch)
                opt.step()
            else:
                opt.step(lambda net=net, batch=batch: backward(net, batch))
        learned.append([state.curvature for state in opt._set.states.values()])
    assert same_bits(weights(nets[0]), weights(nets[1]))
    assert same_bits(*learned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_empty_backup_starts_from_the_weights(dtype: torch.dtype) -> None:
    """The operators themselves, strided and in channels_last too."""

    def made() -> list[torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        shapes = [(5000,), (33, 65), (4, 3, 5, 5), (), (0,)]
        tensors = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
        tensors[1] = tensors[1].t().contiguous().t()
        tensors[2] = tensors[2].to(memory_format=torch.channels_last)
        return tensors

    by_backup, as_they_are = made(), made()
    grads, buffers = [t * 0.5 for t in made()], [[t * 0.25 for t in made()] for _ in range(2)]
    backup = ops.backup_like(by_backup)
    ops.save_(by_backup, backup)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    ops.restore_sgd_(by_backup, grads, buffers[0], backup, **options)
    ops.restore_sgd_(as_they_are, grads, buffers[1], backup[:0], **options)
    assert same_bits(by_backup, as_they_are)
    assert same_bits(*buffers)
