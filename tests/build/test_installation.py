"""``python -m flatmin``: what it says of the installation, and a self-test that finds a broken operator."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import flatmin
from flatmin import _installation, _selftest
from flatmin.ops import _library


def run_module(*code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m flatmin``, or a program instead of it."""
    command = [sys.executable, *(("-c", *code) if code else ("-m", "flatmin"))]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | environment)


def test_the_report_ends_with_ok() -> None:
    done = run_module(FM_ISA="base")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"flatmin {flatmin.__version__} in ")
    assert lines[1].startswith(f"torch {torch.__version__}, ")
    assert lines[2].startswith("CPU kernels: base (any processor); this processor runs base (any processor)")
    assert ("AVX2" in lines[2]) == (torch.ops.flatmin.best_isa() >= 3)
    tested = [line.split()[1] for line in lines if line.startswith("  cpu")]
    assert tested == list(_library.OPERATORS)
    assert lines[-1] == "ok"


def test_a_broken_operator_is_named_and_ends_with_status_one() -> None:
    done = run_module(
        "import runpy\n"
        "from flatmin.ops import _library\n"
        "whole = _library.OPERATORS['restore_']\n"
        "def broken(params, backup):\n"
        "    whole(params, backup)\n"
        "    params[-1].mul_(2)\n"
        "broken._schema = whole._schema\n"
        "_library.OPERATORS['restore_'] = broken\n"
        "runpy.run_module('flatmin', run_name='__main__')"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "failed: restore_ on cpu"
    assert "  cpu  restore_                 FAILED, float32, no options: 300 of 300 elements" in done.stdout


class Broken:
    """An operator that does its work and then moves one element of the last tensor that it writes or returns."""

    def __init__(self, operator: Any) -> None:
        self.operator, self._schema = operator, operator._schema

    def __call__(self, *given: Any) -> Tensor | None:
        result: Tensor | None = self.operator(*given)
        last = result
        if last is None or not last.numel():
            written = [
                [value] if isinstance(value, Tensor) else value
                for argument, value in zip(self._schema.arguments, given, strict=True)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            last = next(lists for lists in reversed(written) if lists and lists[-1].numel() > 1)[-1]
        # in place in memory order: views of an image in channels_last have no flat view
        element = last.as_strided((last.numel(),), (1,))[last.numel() // 2]
        element.copy_(element * 1.02 + 0.02 if last.is_floating_point() else element ^ 1)
        return result


@pytest.mark.parametrize("name", _library.OPERATORS)
def test_one_wrong_element_is_found(name: str) -> None:
    (result,) = _selftest.run(["cpu"], {name: Broken(_library.OPERATORS[name])})
    assert result.failure is not None
    assert "1 of " in result.failure


def test_an_argument_without_a_value_fails_by_name() -> None:
    schema = torch._C.parse_schema("flatmin::new_(Tensor(a!)[] params, float novelty) -> ()")
    (result,) = _selftest.run(["cpu"], {"new_": SimpleNamespace(_schema=schema)})
    assert result.failure is not None
    assert "no value for its argument 'novelty'" in result.failure


# ---- why there are no CUDA kernels ----


def no_image(_: object) -> None:
    raise RuntimeError("flatmin: CUDA launch failed: no kernel image is available for execution on the device")


REASONS: dict[str, tuple[str | None, Callable[[pytest.MonkeyPatch], None]]] = {
    "torch": ("was built without CUDA", lambda patch: patch.setattr(torch.version, "cuda", None)),
    "build": (
        "no nvcc was there, or no GPU to compile for",
        lambda patch: patch.setattr(_installation, "CUDA_LIBRARY", _installation.CUDA_LIBRARY / "missing"),
    ),
    "loader": ("does not load into torch", lambda patch: patch.setattr(torch.ops, "flatmin", SimpleNamespace())),
    "no driver": ("no NVIDIA driver", lambda patch: patch.setattr(_installation, "_driver_version", lambda: None)),
    "old driver": (
        "driver is too old: it is of CUDA 12.4,",
        lambda patch: patch.setattr(_installation, "_driver_version", lambda: 12040),
    ),
    "no GPU": ("torch finds no GPU", lambda patch: patch.setattr(torch.cuda, "is_available", lambda: False)),
    "architecture": (
        "not compiled for cuda:0 (Some GPU, sm_89)",
        lambda patch: patch.setattr(flatmin.ops, "norm", no_image),
    ),
    "none": (None, lambda patch: patch.setattr(flatmin.ops, "norm", lambda _: None)),
}


@pytest.mark.parametrize("case", REASONS)
def test_the_reason_for_no_cuda_kernels(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that seems to have all, but for one part."""
    loaded = case not in ("loader", "no driver", "old driver")
    real_ones = torch.ones
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_installation, "CUDA_LIBRARY", _installation.Path(__file__))
    monkeypatch.setattr(_library, "DEVICES", frozenset({"cpu", "cuda"} if loaded else {"cpu"}))
    monkeypatch.setattr(torch.ops, "flatmin", SimpleNamespace(cuda_ready=lambda: loaded))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch, "ones", lambda n, device: real_ones(n))
    wanted, spoil = REASONS[case]
    spoil(monkeypatch)
    reason = _installation.cuda_reason()
    assert (reason is None) == (wanted is None)
    assert wanted is None or wanted in reason
