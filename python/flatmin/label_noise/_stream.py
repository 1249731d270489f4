"""Where the random numbers of a noise come from: a seed and counters, no state of torch's generators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import get_worker_info

from .. import ops
from .._checks import check_int

__all__ = ["Stream"]

#: Streams above those of the ranks, of which there are fewer than 2^15: draws by index, and a data set's fixed ones.
_INDEXED, _CHOICE, _TARGET = 2**16 - 1, 2**16 - 2, 2**16 - 3
_GOLDEN = 0x9E3779B97F4A7C15


def _check_word(name: str, value: Any, bits: int) -> None:
    check_int(name, value, 0)
    if value >= 2**bits:
        raise ValueError(f"{name}: {value} given; give an integer below 2^{bits}")


class Stream:
    """What each call of a noise draws from.

    Without an index a call has the number of the calls before it, so each is fresh; each rank of a process group has
    draws of its own, and so has each worker of a DataLoader (by the seed that torch gives it, anew for each epoch).
    With an index a draw is a function of the seed, of the epoch and of the sample's number alone.

    Args:
        generator: to draw the seed from, None for torch's default one, as a DataLoader does.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: {generator!r} given; give a torch.Generator, or None for torch's default one")
        device = "cpu" if generator is None else generator.device
        self.seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
        self.step = 0
        # in shared memory: workers that live on (persistent_workers) see what set_epoch writes in their parent
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        _check_word("epoch", epoch, 32)
        self._epoch.fill_(int(epoch))

    def key(self, indexed: bool, device: torch.device) -> Tensor:
        """The key of a call, which counts."""
        if indexed:
            return ops.random_key(self.seed, self.epoch, _INDEXED, device)
        seed, rank, worker = self.seed, 0, get_worker_info()
        if worker is not None:
            seed = (seed + _GOLDEN * worker.seed) % 2**64
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank = torch.distributed.get_rank()
        key = ops.random_key(seed, self.step % 2**32, rank, device)
        self.step += 1
        return key

    def choice_key(self) -> Tensor:
        """Which samples of a data set are corrupted: one answer for each seed."""
        return ops.random_key(self.seed, 0, _CHOICE)

    def target_key(self) -> Tensor:
        """What becomes of them."""
        return ops.random_key(self.seed, 0, _TARGET)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "step": self.step, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(f"state_dict: {state!r} given; give what state_dict() of a noise returned")
        missing = {"seed", "step", "epoch"} - state.keys()
        if missing:
            raise ValueError(f"state_dict: {sorted(missing)} missing; give what state_dict() of a noise returned")
        for name, bits in (("seed", 64), ("step", 64), ("epoch", 32)):
            _check_word(f"state_dict: {name}", state[name], bits)
        self.seed, self.step = int(state["seed"]), int(state["step"])
        self.set_epoch(state["epoch"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # a copy's too, for the workers of its own loader
