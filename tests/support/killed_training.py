"""A short training that is killed and resumed, by the recipe of docs/hardening.md."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flatmin

_PAGE = Path(__file__).resolve().parents[2] / "docs/hardening.md"

STEPS, SAVE_EVERY = 60, 4


def _recipe() -> dict[str, Any]:
    """The functions of the page itself."""
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", _PAGE.read_text(), re.DOTALL)[0], names)
    return names


RECIPE = _recipe()


def _sam(params: Any, model: nn.Module) -> torch.optim.Optimizer:
    return flatmin.SAM(torch.optim.SGD(params, lr=0.1, momentum=0.9), rho=0.1, model=model, interval=2)


def _gsam(params: Any, model: nn.Module) -> torch.optim.Optimizer:
    return flatmin.GSAM(torch.optim.AdamW(params, lr=0.01), rho=0.1, model=model)


def _perturbed(params: Any, model: nn.Module) -> torch.optim.Optimizer:
    return flatmin.PerturbedOPT(torch.optim.SGD(params, lr=0.1, momentum=0.9), gamma=0.1, scale=0.05, model=model)


OPTIMIZERS: dict[str, Callable[[Any, nn.Module], Any]] = {"SAM": _sam, "GSAM": _gsam, "PerturbedOPT": _perturbed}


def train(kind: str, path: Path, after_step: Callable[[], object] = lambda: None) -> None:
    """Train to the end from the checkpoint at ``path``, if there is one, and leave the last one there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    opt = OPTIMIZERS[kind](model.parameters(), model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
    for step in range(RECIPE["resume"](path, model, opt, scheduler), STEPS):
        rows = torch.randint(0, 64, (16,))

        def gradient(rows: Tensor = rows) -> None:
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()

        opt.zero_grad()
        if kind != "PerturbedOPT":
            gradient()
        else:
            with torch.no_grad():  # BatchNorm's statistics, which do not count under noise
                model(x[rows])
        with opt.perturb():
            gradient()
        opt.step()
        scheduler.step()
        if (step + 1) % SAVE_EVERY == 0:
            RECIPE["save_checkpoint"](path, RECIPE["everything"](model, opt, scheduler, step + 1))
        after_step()


def train_in_child(kind: str, path: Path, kill: tuple[int, float] | None = None) -> int:
    """Train in a forked process, which is killed so many steps and seconds after its start if it lives that long.

    Returns:
        0, or what ended it: the negative number of a signal.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read)
            train(kind, path, lambda: os.write(write, b"."))
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    if kill is not None:
        steps, seconds = kill
        while steps > 0 and (seen := os.read(read, steps)):
            steps -= len(seen)
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)  # one that has ended is still there to be waited for
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(read)
    return ended
