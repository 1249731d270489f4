"""What sam_step.py compares: builders of one SAM step for flatmin and its peers, and the machine's own limits."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import flatmin
from flatmin import ops

Step = Callable[[], object]
Builder = Callable[[list[Tensor]], Step]

RHO, LR, MOMENTUM, EPS = 0.05, 1e-4, 0.9, 1e-12
GROUP = 64  # limits.c takes this many elements at a time

FLATMIN, PLAIN, OPS = "flatmin.SAM", "flatmin.SAM, plain base step", "flatmin.ops"
CONTEXT = "flatmin.SAM, step after the context"
GROUPS = "flatmin.SAM, a group per tensor"
TEXTBOOK, COMPILED = "textbook eager SAM", "torch.compile'd SAM"
FOREACH = "torch._foreach_ by hand"
PEERS = {"pytorch-optimizer SAM, foreach off": False, "pytorch-optimizer SAM, foreach on": True}
CALLS, CONTEXT_CALLS = "flatmin.SAM, calls alone", "flatmin.SAM, calls alone, step after the context"
LIMITS = {"limit, plain stores": False, "limit, streaming stores": True}
READ, COPIES = "read", {"copy, plain stores": False, "copy, streaming stores": True}


#: What a step with SGD reads and writes of all its elements, in passes over them: docs/traffic.md derives it. Of other
#: rows it has no number.
STREAMS = {FLATMIN: 10, CONTEXT: 12, GROUPS: 10, PLAIN: 15, OPS: 10, TEXTBOOK: 18, FOREACH: 18, COMPILED: 10}


class Base(NamedTuple):
    """An optimizer under SAM."""

    make: partial[torch.optim.Optimizer]
    averages: int  # that it keeps of each parameter, in copies of it
    context_required: float  # the step after the context over the closure path, at most

    @property
    def streams(self) -> dict[str, int]:
        """As STREAMS, of the rows that read and write every average once."""
        more = 2 * (self.averages - SGD.averages)
        return STREAMS if more == 0 else {row: STREAMS[row] + more for row in (FLATMIN, CONTEXT, GROUPS)}


SGD = Base(partial(torch.optim.SGD, lr=LR, momentum=MOMENTUM), 1, 1.25)
BASES = {
    "sgd": SGD,
    "adam": Base(partial(torch.optim.Adam, lr=LR), 2, 1.2),
    "adamw": Base(partial(torch.optim.AdamW, lr=LR), 2, 1.2),
}


# ---- builders: each makes one step of its kind over parameters that carry a gradient ----


def _grads(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def flatmin_parts(params: list[Tensor], base: Base = SGD) -> Sequence[Step]:
    """As a user has it: the ascent; restore and step in one pass."""
    optimizer = flatmin.SAM(base.make(params), rho=RHO)
    return optimizer.ascend, optimizer.step


def context_parts(params: list[Tensor], base: Base = SGD) -> Sequence[Step]:
    """The README's loop: the context restores the weights, and the step starts from there."""
    optimizer = flatmin.SAM(base.make(params), rho=RHO)
    return optimizer.ascend, optimizer.restore, optimizer.step


def group_parts(params: list[Tensor], base: Base = SGD) -> Sequence[Step]:
    """As layer-wise rates make them: no two are equal, and the weights agree with those of the other rows."""
    groups = [{"params": [p], "lr": LR * (1 + 1e-9 * i)} for i, p in enumerate(params)]
    optimizer = flatmin.SAM(base.make(groups), rho=RHO)
    return optimizer.ascend, optimizer.step


def plain_parts(params: list[Tensor], base: Base = SGD) -> Sequence[Step]:
    """What every base optimizer without a fused form gets."""
    plain = base.make(params)
    optimizer = flatmin.SAM(plain, rho=RHO)
    return optimizer.ascend, optimizer.restore, plain.step


def in_turn(parts: Callable[[list[Tensor], Base], Sequence[Step]], base: Base = SGD) -> Builder:
    def build(params: list[Tensor]) -> Step:
        calls = parts(params, base)

        def step() -> None:
            for call in calls:
                call()

        return step

    return build


def flatmin_ops(params: list[Tensor]) -> Step:
    """The operators alone: the difference from ``flatmin.SAM`` is the optimizer's own Python."""
    grads, buffers = _grads(params), [torch.zeros_like(p) for p in params]
    backup = ops.backup_like(params)

    def step() -> None:
        ops.sam_norm_ascend_(params, grads, backup, RHO, eps=EPS)
        ops.restore_sgd_(params, grads, buffers, backup, LR, momentum=MOMENTUM)

    return step


def textbook(params: list[Tensor], base: Base) -> Step:
    """Tensor by tensor, as the widespread SAM classes do it, and torch's optimizer with its defaults."""
    plain = base.make(params)

    @torch.no_grad()
    def step() -> None:
        grads = _grads(params)
        scale = RHO / (torch.stack([g.norm() for g in grads]).norm() + EPS)
        old = [p.clone() for p in params]
        for p, g in zip(params, grads, strict=True):
            p.add_(g * scale)
        for p, o in zip(params, old, strict=True):
            p.copy_(o)
        plain.step()

    return step


def peer(params: list[Tensor], base: Base, foreach: bool) -> Step:
    from pytorch_optimizer import SAM

    optimizer = SAM(params, base.make.func, rho=RHO, foreach=foreach, **base.make.keywords)

    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return step


def foreach(params: list[Tensor]) -> Step:
    """As few passes as torch's multi-tensor operators allow, 18 streams, over buffers that are kept."""
    weights, grads = [p.detach() for p in params], _grads(params)
    buffers, old = [torch.zeros_like(w) for w in weights], [torch.empty_like(w) for w in weights]

    @torch.no_grad()
    def step() -> None:
        scale = RHO / (torch.stack(torch._foreach_norm(grads)).norm() + EPS)
        torch._foreach_copy_(old, weights)
        torch._foreach_add_(weights, torch._foreach_mul(grads, scale))
        torch._foreach_copy_(weights, old)
        torch._foreach_mul_(buffers, MOMENTUM)
        torch._foreach_add_(buffers, grads)
        torch._foreach_add_(weights, buffers, alpha=-LR)

    return step


@torch.compile(fullgraph=True, dynamic=False)
def compiled_ascend(params: list[Tensor], grads: list[Tensor], old: list[Tensor]) -> None:
    scale = RHO / (torch.stack([g.norm() for g in grads]).norm() + EPS)
    for p, g, o in zip(params, grads, old, strict=True):
        o.copy_(p)
        p.add_(g * scale)


@torch.compile(fullgraph=True, dynamic=False)
def compiled_descend(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], old: list[Tensor]) -> None:
    for p, g, b, o in zip(params, grads, buffers, old, strict=True):
        b.mul_(MOMENTUM).add_(g)
        p.copy_(o - LR * b)


def compiled(params: list[Tensor]) -> Step:
    """Two graphs, as a backward lies between, over a backup that is kept.

    That is the kinder form: a fresh clone pays for page faults, 133 ms against 95 ms on the 268 MB of ``matrices``.
    """
    weights, grads = [p.detach() for p in params], _grads(params)
    buffers, old = [torch.zeros_like(w) for w in weights], [torch.empty_like(w) for w in weights]

    @torch.no_grad()
    def step() -> None:
        compiled_ascend(weights, grads, old)
        compiled_descend(weights, grads, buffers, old)

    return step


def builders(base: Base, with_compile: bool, with_foreach: bool = False) -> dict[str, Builder]:
    """The rows by name, flatmin first. ``with_foreach`` for a GPU: on a CPU the multi-tensor operators are loops.

    What is written out for SGD is left out for others.
    """
    rows: dict[str, Builder] = {
        FLATMIN: in_turn(flatmin_parts, base),
        CONTEXT: in_turn(context_parts, base),
        GROUPS: in_turn(group_parts, base),
        PLAIN: in_turn(plain_parts, base),
    }
    if base is SGD:
        rows[OPS] = flatmin_ops
    rows[TEXTBOOK] = partial(textbook, base=base)
    if importlib.util.find_spec("pytorch_optimizer"):
        rows |= {name: partial(peer, base=base, foreach=foreach) for name, foreach in PEERS.items()}
    if with_foreach and base is SGD:
        rows[FOREACH] = foreach
    if with_compile and base is SGD:
        rows[COMPILED] = compiled
    return rows


# ---- the machine's limits ----


def compile_limits(folder: Path) -> ctypes.CDLL | None:
    """limits.c as a library, or None without a C compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    source, library = Path(__file__).with_name("limits.c"), folder / "limits.so"
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def limit_steps(library: ctypes.CDLL, elements: int, threads: int) -> dict[str, Step]:
    """The limit rows by name, over four flat arrays of ``elements`` each."""
    count = math.ceil(elements / GROUP) * GROUP
    p, g, buf, old = (torch.rand(count) for _ in range(4))
    size, team = ctypes.c_int64(count), ctypes.c_int(threads)

    def call(name: str, arrays: tuple[Tensor, ...], *flags: ctypes.c_bool) -> Step:
        function = getattr(library, name)

        def step() -> None:
            function(*(ctypes.c_void_p(array.data_ptr()) for array in arrays), size, *flags, team)

        return step

    steps = {READ: call("limit_read", (g,))}
    steps |= {name: call("limit_copy", (old, g), ctypes.c_bool(on)) for name, on in COPIES.items()}
    return steps | {name: call("limit_step", (p, g, buf, old), ctypes.c_bool(on)) for name, on in LIMITS.items()}
