"""What sam_step.py compares: builders of one SAM step for flatmin and its peers, and the machine's own limits."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

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
CALLS = "flatmin.SAM, calls alone"
LIMITS = {"limit, plain stores": False, "limit, streaming stores": True}
READ, COPIES = "read", {"copy, plain stores": False, "copy, streaming stores": True}


#: What a step reads and writes of all its elements, in passes over them: docs/traffic.md derives it. Of other rows it
#: has no number.
STREAMS = {FLATMIN: 10, CONTEXT: 12, GROUPS: 10, PLAIN: 15, OPS: 10, TEXTBOOK: 18, FOREACH: 18, COMPILED: 10}


# ---- builders: each makes one step of its kind over parameters that carry a gradient ----


def _base(params: list[Tensor]) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=LR, momentum=MOMENTUM)


def _grads(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def flatmin_halves(params: list[Tensor]) -> tuple[Step, Step]:
    """As a user has it: the ascent; restore and SGD step in one pass."""
    optimizer = flatmin.SAM(_base(params), rho=RHO)
    return optimizer.ascend, optimizer.step


def flatmin_fused(params: list[Tensor]) -> Step:
    ascend, descend = flatmin_halves(params)

    def step() -> None:
        ascend()
        descend()

    return step


def flatmin_context(params: list[Tensor]) -> Step:
    """The README's loop: the context restores the weights, and the step starts from there."""
    optimizer = flatmin.SAM(_base(params), rho=RHO)

    def step() -> None:
        optimizer.ascend()
        optimizer.restore()
        optimizer.step()

    return step


def flatmin_groups(params: list[Tensor]) -> Step:
    """As layer-wise rates make them: no two are equal, and the weights agree with those of the other rows."""
    groups = [{"params": [p], "lr": LR * (1 + 1e-9 * i)} for i, p in enumerate(params)]
    optimizer = flatmin.SAM(torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM), rho=RHO)

    def step() -> None:
        optimizer.ascend()
        optimizer.step()

    return step


def flatmin_plain(params: list[Tensor]) -> Step:
    """What every base optimizer without a fused form gets."""
    base = _base(params)
    optimizer = flatmin.SAM(base, rho=RHO)

    def step() -> None:
        optimizer.ascend()
        optimizer.restore()
        base.step()

    return step


def flatmin_ops(params: list[Tensor]) -> Step:
    """The operators alone: the difference from ``flatmin_fused`` is the optimizer's own Python."""
    grads, buffers = _grads(params), [torch.zeros_like(p) for p in params]
    backup = ops.backup_like(params)

    def step() -> None:
        ops.sam_norm_ascend_(params, grads, backup, RHO, eps=EPS)
        ops.restore_sgd_(params, grads, buffers, backup, LR, momentum=MOMENTUM)

    return step


def textbook(params: list[Tensor]) -> Step:
    """Tensor by tensor, as the widespread SAM classes do it, and ``torch.optim.SGD`` with its defaults."""
    base = _base(params)

    @torch.no_grad()
    def step() -> None:
        grads = _grads(params)
        scale = RHO / (torch.stack([g.norm() for g in grads]).norm() + EPS)
        old = [p.clone() for p in params]
        for p, g in zip(params, grads, strict=True):
            p.add_(g * scale)
        for p, o in zip(params, old, strict=True):
            p.copy_(o)
        base.step()

    return step


def peer(params: list[Tensor], foreach: bool) -> Step:
    from pytorch_optimizer import SAM

    optimizer = SAM(params, torch.optim.SGD, rho=RHO, foreach=foreach, lr=LR, momentum=MOMENTUM)

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


def builders(with_compile: bool, with_foreach: bool = False) -> dict[str, Builder]:
    """The rows by name, flatmin first. ``with_foreach`` for a GPU: on a CPU the multi-tensor operators are loops."""
    rows: dict[str, Builder] = {
        FLATMIN: flatmin_fused,
        CONTEXT: flatmin_context,
        GROUPS: flatmin_groups,
        PLAIN: flatmin_plain,
        OPS: flatmin_ops,
        TEXTBOOK: textbook,
    }
    if importlib.util.find_spec("pytorch_optimizer"):
        rows |= {name: functools.partial(peer, foreach=foreach) for name, foreach in PEERS.items()}
    if with_foreach:
        rows[FOREACH] = foreach
    if with_compile:
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
