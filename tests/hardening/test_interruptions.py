"""An exception at any line of a step leaves the weights at their bits of before it, or of after it.

Python shows Ctrl-C, and torch a lack of memory, wherever it happens to be: so each of both is raised at each line in
turn, in the test's own functions, in flatmin, in torch and in the standard library. `make soak` does so at every line;
here it is every line of flatmin and some of the others, and fewer for a lack of memory.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import flatmin
from interruptions import Interrupted, lines_of

X = torch.linspace(-1.0, 1.0, 15).view(5, 3)


class Net(nn.Module):
    """Few lines of torch's own, which all take their turn: two parameters, and a buffer as BatchNorm has them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight + self.bias
        self.mean.lerp_(y.detach().mean(0), 0.1)
        return y.tanh()


def gradient(net: nn.Module) -> torch.Tensor:
    loss = net(X).square().mean()
    loss.backward()
    return loss


def by_context(net: nn.Module, opt: Any) -> None:
    opt.zero_grad()
    gradient(net)
    with opt.perturb():
        gradient(net)
    opt.step()


def by_closure(net: nn.Module, opt: Any) -> None:
    def closure() -> torch.Tensor:
        opt.zero_grad()
        return gradient(net)

    opt.step(closure)


OPTIMIZERS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Any]] = {
    "SAM": lambda net, base: flatmin.SAM(base, rho=0.5, model=net),
    "GSAM": lambda net, base: flatmin.GSAM(base, rho=0.5),
    "PerturbedOPT": lambda net, base: flatmin.PerturbedOPT(base, gamma=0.5, scale=0.5),
}


def third_step(kind: str, way: Callable[[nn.Module, Any], None]) -> tuple[nn.Module, Any, Callable[[], None]]:
    """A model and its optimizer after two steps, which have made all buffers, and the third one."""
    torch.manual_seed(0)
    net = Net()
    opt = OPTIMIZERS[kind](net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    for _ in range(2):
        way(net, opt)
    return net, opt, lambda: way(net, opt)


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.skipif(sys.gettrace() is not None, reason="a debugger or a coverage tool traces lines by itself")
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("way", [by_context, by_closure], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_at_every_line_of_a_step(
    kind: str, way: Callable[[nn.Module, Any], None], error: type[BaseException], restore_threads: None
) -> None:
    torch.set_num_threads(1)
    net, _, step = third_step(kind, way)
    before, lines = weights(net), lines_of(step)
    after = weights(net)
    assert len(lines) > 100 and not equal(before, after)
    every = "FLATMIN_SOAK" in os.environ
    stride = 1 if every or error is KeyboardInterrupt else 31  # nothing asks which of the two it is
    numbers = [n for n, file in enumerate(lines) if every or "flatmin" in Path(file).parts or n % 7 == 0][::stride]
    moved, kept = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps without an ascent, of which some warn before they are interrupted
        for number in numbers:
            net, opt, step = third_step(kind, way)
            interrupted = Interrupted(error, number)
            try:
                with interrupted:
                    step()
            except error:
                pass
            torch.set_grad_enabled(True)  # torch's own contexts leave it off, interrupted where they end
            found = weights(net)
            kept += equal(found, before)
            if opt._set.perturbed or not (equal(found, before) or equal(found, after)):
                moved.append(interrupted.where)
    assert not moved
    assert kept > 0
