"""Optimizers and models of other packages within SAM: opacus, PEFT, torchao, schedule-free, Muon; old loops."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatmin import SAM
from plain_sam import difference, losses_of, moved, plain_sam

Load = Callable[[str], ModuleType]


# ---- opacus ----


def clipped_mean(net: nn.Module, x: Tensor, y: Tensor, clip: float) -> list[Tensor]:
    """The gradient of DP-SGD without its noise: mean over examples of gradients cut to a norm of ``clip``."""
    params = list(net.parameters())
    total = [torch.zeros_like(p) for p in params]
    for i in range(len(x)):
        grads = torch.autograd.grad(F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), params)
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        for t, g in zip(total, grads, strict=True):
            t += g * min(1.0, clip / float(norm)) / len(x)
    return total


@pytest.mark.requires("opacus")
@pytest.mark.filterwarnings("ignore")
def test_the_private_recipe_perturbs_by_the_last_private_gradient(recipe: Load) -> None:
    private, toy = recipe("opacus_private"), recipe("_toy")
    net, data = toy.net(), toy.batches(8)
    start = copy.deepcopy(net)
    private.train(net, data, noise=0.0, clip=0.5)
    expected = copy.deepcopy(start).double()
    params, last = list(expected.parameters()), None
    momentum = [torch.zeros_like(p) for p in params]
    for x, y in data:
        kept = [p.detach().clone() for p in params]
        if last is not None:
            norm = torch.sqrt(sum((g**2).sum() for g in last))
            with torch.no_grad():
                for p, g in zip(params, last, strict=True):
                    p += 0.05 * g / norm
        last = clipped_mean(expected, x.double(), y, 0.5)
        with torch.no_grad():
            for p, before, m, g in zip(params, kept, momentum, last, strict=True):
                p.copy_(before - 0.1 * m.mul_(0.9).add_(g))
    assert moved(net, start) > 0.05
    assert difference(net, expected) < 1e-5


@pytest.mark.requires("opacus")
@pytest.mark.filterwarnings("ignore")
def test_samples_of_the_first_pass_stay_out_of_the_second(recipe: Load) -> None:
    """``grad_sample`` once kept both passes. (Two passes are not private: see the recipe.)"""
    from opacus import PrivacyEngine

    toy = recipe("_toy")
    net, data = toy.net(), toy.batches(6)
    start = copy.deepcopy(net)
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    model, base, loader = PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=1e6,  # clips nothing, so that plain SAM is what comes out
        poisson_sampling=False,
    )
    opt = SAM(base, rho=0.05)
    for x, y in loader:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with opt.perturb():
            F.cross_entropy(model(x), y).backward()
        opt.step()
    assert moved(net, start) > 0.05 and difference(net, plain_sam(start, losses_of(data))) < 1e-5


# ---- PEFT ----


@pytest.mark.requires("peft")
@pytest.mark.filterwarnings("ignore")
def test_lora_perturbs_and_trains_the_adapters_alone(recipe: Load) -> None:
    lora, toy = recipe("peft_lora"), recipe("_toy")
    from peft import LoraConfig, get_peft_model

    data = toy.batches(15)
    torch.manual_seed(0)
    model = lora.train(toy.net(), data)
    torch.manual_seed(0)
    start = get_peft_model(toy.net(), LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
    expected = plain_sam(start, losses_of(data), lambda params: torch.optim.AdamW(params, lr=0.01))
    assert moved(model, start) > 0.01
    assert difference(model, expected) < 1e-5
    frozen = [p for name, p in model.named_parameters() if "lora" not in name]
    assert frozen and all(torch.equal(p, q) for p, q in zip(frozen, toy.net().parameters(), strict=True))


# ---- bases of other packages ----


def wide_net(seed: int = 0) -> nn.Sequential:
    """Large enough for torchao, which keeps the averages of less than 4096 elements in 32 bits."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return net


@pytest.mark.requires("torchao")
@pytest.mark.filterwarnings("ignore")
def test_eight_bit_adamw(recipe: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    bases, toy = recipe("other_bases"), recipe("_toy")
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: function
    )  # the same arithmetic, without a minute of gcc
    net, data, built = wide_net(), toy.batches(10), []

    def base(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        built.append(AdamW8bit(params, lr=0.01))
        return built[-1]

    monkeypatch.setattr("torchao.optim.AdamW8bit", lambda params, lr: base(params))
    bases.eight_bit(net, data)
    assert any(isinstance(value, OptimState8bit) for state in built[0].state.values() for value in state.values())
    expected = plain_sam(wide_net(), losses_of(data), lambda params: AdamW8bit(params, lr=0.01), dtype=None)
    assert moved(net, wide_net()) > 0.05
    # a rounding difference of the ascent may fall on the other side of a step of the 8-bit code
    assert difference(net, expected) < 1e-3


@pytest.mark.requires("schedulefree")
def test_a_schedule_free_base_ends_at_its_averaged_weights(recipe: Load) -> None:
    from schedulefree import AdamWScheduleFree

    bases, toy = recipe("other_bases"), recipe("_toy")
    net, data, built = toy.net(), toy.batches(15), []
    bases.schedule_free(net, data)

    def base(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        built.append(AdamWScheduleFree(params, lr=0.01))
        built[0].train()
        return built[0]

    expected = plain_sam(toy.net(), losses_of(data), base)
    unaveraged = copy.deepcopy(expected)
    built[0].eval()
    assert moved(net, toy.net()) > 0.01 and difference(net, expected) < 1e-5
    assert difference(unaveraged, expected) > 1e-3


def test_muon_as_base(recipe: Load) -> None:
    bases, toy = recipe("other_bases"), recipe("_toy")
    net, data = toy.net(), toy.batches(10)
    bases.muon(net, data)
    expected = toy.net().double()
    matrices = [p for p in expected.parameters() if p.dim() == 2]
    others = [p for p in expected.parameters() if p.dim() != 2]
    first, second = torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)
    for x, y in data:
        kept = [p.detach().clone() for p in matrices]
        grads = torch.autograd.grad(F.cross_entropy(expected(x.double()), y), matrices)
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        with torch.no_grad():
            for p, g in zip(matrices, grads, strict=True):
                p += 0.05 * g / norm
        expected.zero_grad()
        F.cross_entropy(expected(x.double()), y).backward()
        with torch.no_grad():
            for p, before in zip(matrices, kept, strict=True):
                p.copy_(before)
        first.step()
        second.step()
    assert moved(net, toy.net()) > 0.05
    assert difference(net, expected) < 5e-3  # Muon orthogonalises in bfloat16


# ---- loops that were written for other implementations ----


def test_the_closure_style_of_davda54_has_the_right_weights_and_three_forwards(recipe: Load) -> None:
    """``backward`` by hand, then ``step(closure)``: the closure runs twice, so that the pass by hand is for nothing."""
    toy = recipe("_toy")
    net, data = toy.net(), toy.batches(10)
    opt, forwards = SAM(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), rho=0.05), []
    net.register_forward_hook(lambda *_: forwards.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in data:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                opt.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                return loss

            loss: Any = F.cross_entropy(net(x), y)
            loss.backward()
            opt.step(closure)
            opt.zero_grad()
    assert len(forwards) == 3 * len(data)
    assert difference(net, plain_sam(toy.net(), losses_of(data))) < 1e-6
