"""A training that is killed at random moments goes on from its last checkpoint to the bits of one that was not."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from killed_training import OPTIMIZERS, SAVE_EVERY, STEPS, train, train_in_child

#: In all, over the optimizers; `make soak` has 200.
KILLS = int(os.environ.get("FLATMIN_KILLS", "20"))


def same(a: Any, b: Any) -> bool:
    """Equal in every bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_killed_training_ends_with_the_same_bits(kind: str, tmp_path: Path, restore_threads: None) -> None:
    torch.set_num_threads(1)  # what is forked from several threads cannot train
    begin = time.monotonic()
    train(kind, tmp_path / "whole")
    step_s = (time.monotonic() - begin) / STEPS
    whole = torch.load(tmp_path / "whole", weights_only=True)
    assert whole["step"] == STEPS
    rng, kills, resumed, run = random.Random(kind), 0, 0, tmp_path / "killed"
    wanted = -(-KILLS // len(OPTIMIZERS))
    while kills < wanted:
        resumes = run.exists()
        moment = rng.randrange(STEPS // 3), rng.uniform(0, SAVE_EVERY * step_s)
        ended = train_in_child(kind, run, moment)
        assert ended in (0, -signal.SIGKILL)
        kills += ended != 0
        resumed += resumes and ended != 0
        if ended == 0 or kills == wanted:
            assert train_in_child(kind, run) == 0
            assert same(torch.load(run, weights_only=True), whole)
            run.unlink()
    assert resumed > 0  # some were killed after their first checkpoint, or nothing was shown
