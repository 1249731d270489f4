"""Recipes under torchrun: two processes on gloo, and a checkpoint that another number of them loads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import flatmin
from plain_sam import difference, losses_of, plain_sam

Load = Callable[[str], ModuleType]
RECIPES = Path(__file__).parents[2] / "examples" / "trainers"


def torchrun(processes: int, name: str, *arguments: Any) -> None:
    """Run a recipe in so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    path = str(Path(flatmin.__file__).parents[1])
    done = subprocess.run(
        [*command, str(RECIPES / name), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def as_net(recipe: Load, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    net = recipe("_toy").net()
    net.load_state_dict(state)
    return net


@pytest.mark.parametrize("per_rank", [False, True], ids=["one perturbation", "one per rank"])
def test_ddp(recipe: Load, tmp_path: Path, per_rank: bool) -> None:
    toy = recipe("_toy")
    torchrun(2, "ddp.py", "--steps", 10, "--out", tmp_path / "weights.pt", *(["--per-rank"] if per_rank else []))
    first, second = torch.load(tmp_path / "weights.pt")
    assert all(torch.equal(first[name], second[name]) for name in first)
    halves = [(x.chunk(2)[i], y.chunk(2)[i]) for x, y in toy.batches(10) for i in range(2)]
    expected = plain_sam(toy.net(), losses_of(halves, 2), per_loss=per_rank)
    other = plain_sam(toy.net(), losses_of(halves, 2), per_loss=not per_rank)
    assert difference(as_net(recipe, first), expected) < 1e-6
    assert difference(expected, other) > 1e-4


def test_fsdp2_and_a_checkpoint_for_another_number_of_ranks(recipe: Load, tmp_path: Path) -> None:
    toy, folder = recipe("_toy"), tmp_path / "checkpoint"
    torchrun(2, "fsdp2.py", "--steps", 6, "--save", folder, "--out", tmp_path / "six.pt")
    torchrun(1, "fsdp2.py", "--steps", 6, "--skip", 6, "--load", folder, "--out", tmp_path / "twelve.pt")

    def adamw(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=0.01)

    for steps, name in ((6, "six.pt"), (12, "twelve.pt")):
        expected = plain_sam(toy.net(), losses_of(toy.batches(steps)), adamw)
        assert difference(as_net(recipe, torch.load(tmp_path / name)), expected) < 1e-5
