"""Where a run happens: the device, and the processes that torchrun started."""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from _common.errors import UsageError


class Place(NamedTuple):
    """Device, rank and number of processes, and how many processes load images for each."""

    device: torch.device
    rank: int
    world: int
    workers: int

    @property
    def speaks(self) -> bool:
        """Whether this process prints, draws and writes files."""
        return self.rank == 0

    @property
    def bar(self) -> dict[str, Any]:
        """Options of tqdm: a terminal gets a smooth bar, a log file a line every ten seconds."""
        every, delay = (0.2, 0.0) if sys.stderr.isatty() else (10.0, 10.0)
        return {"mininterval": every, "delay": delay, "disable": not self.speaks}


def open_place(device: str, workers: int) -> Place:
    """The place of this process; joins the others where torchrun started several."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = str(found or "cpu")
    try:
        made = torch.device(device)
        if made.type == "cuda" and made.index is None:
            made = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(made)
        torch.zeros(1, device=made)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: cannot be used ({str(error).splitlines()[0]})") from error
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if made.type == "cuda" else "gloo")
    return Place(made, rank, world, workers)


def close_place(place: Place) -> None:
    """Leave the other processes."""
    if place.world > 1 and dist.is_initialized():
        dist.destroy_process_group()
