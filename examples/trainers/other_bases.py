"""Optimizers of other packages as base: the README's loop around each.

Whatever an optimizer has beyond torch's methods is reached through the wrapper: ``opt.train()`` and ``opt.eval()`` of
the schedule-free ones.
"""

from __future__ import annotations

import _toy
import torch
import torch.nn.functional as F
from torch import nn

import flatmin


def steps(net: nn.Module, opt: flatmin.SAM, data: list[_toy.Batch]) -> None:
    for x, y in data:
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        with opt.perturb():
            F.cross_entropy(net(x), y).backward()
        opt.step()


def schedule_free(net: nn.Module, data: list[_toy.Batch]) -> None:
    from schedulefree import AdamWScheduleFree

    opt = flatmin.SAM(AdamWScheduleFree(net.parameters(), lr=0.01), rho=0.05)
    opt.train()  # the weights that gradients are taken at
    steps(net, opt, data)
    opt.eval()  # the averaged weights, to evaluate and to save


def eight_bit(net: nn.Module, data: list[_toy.Batch]) -> None:
    """Adam's averages in 8 bits; weights and perturbation keep their type."""
    from torchao.optim import AdamW8bit

    steps(net, flatmin.SAM(AdamW8bit(net.parameters(), lr=0.01), rho=0.05), data)


def muon(net: nn.Module, data: list[_toy.Batch]) -> None:
    """Muon takes matrices, AdamW the rest: two wrappers. One norm over both needs ``perturb()`` of one optimizer."""
    matrices = [p for p in net.parameters() if p.dim() == 2]
    others = [p for p in net.parameters() if p.dim() != 2]
    first = flatmin.SAM(torch.optim.Muon(matrices, lr=0.02), rho=0.05)
    second = flatmin.SAM(torch.optim.AdamW(others, lr=0.01), rho=0.0)  # not perturbed: the radius is the matrices'
    for x, y in data:
        first.zero_grad()
        second.zero_grad()
        F.cross_entropy(net(x), y).backward()
        with first.perturb(), second.perturb():
            F.cross_entropy(net(x), y).backward()
        first.step()
        second.step()


if __name__ == "__main__":
    for train in (muon, schedule_free, eight_bit):
        print(train.__name__, end=": ")
        _toy.show(train)
