"""benchmarks/sam_step.py: run as a user runs it, on its smallest setting. Times are not judged here."""

from __future__ import annotations

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FLATMIN_ROWS = {"flatmin.SAM", "flatmin.SAM, plain base step", "flatmin.ops"}
PEER_ROWS = {"pytorch-optimizer SAM, foreach off", "pytorch-optimizer SAM, foreach on"}
STEP_LIMIT_ROWS = {"limit, plain stores", "limit, streaming stores"}
LIMIT_ROWS = STEP_LIMIT_ROWS | {"read", "copy, plain stores", "copy, streaming stores"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "sam_step.py"), *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The JSON and the printed table of one ``--quick`` run."""
    path = tmp_path_factory.mktemp("benchmark") / "quick.json"
    done = run("--quick", "--json", str(path))
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_quick_has_a_row_for_everything_installed(quick: tuple[dict[str, Any], str]) -> None:
    report, table = quick
    rows = report["shapes"]["mnist"]["rows"]
    expected = FLATMIN_ROWS | {"textbook eager SAM", "flatmin.SAM, calls alone"}
    if find_spec("pytorch_optimizer"):
        expected |= PEER_ROWS
    if shutil.which("cc"):
        expected |= LIMIT_ROWS
    assert set(rows) == expected
    assert all(name in table for name in expected)


def test_quick_values(quick: tuple[dict[str, Any], str]) -> None:
    report, _ = quick
    assert list(report["shapes"]) == ["mnist"]
    mnist = report["shapes"]["mnist"]
    assert (mnist["tensors"], mnist["parameters"], mnist["compile_seconds"]) == (8, 1_199_882, None)
    rows = mnist["rows"]
    reference = rows["flatmin.SAM"]["median_ms"]
    for row in rows.values():
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["median_ms"] <= high
        assert row["ratio"] == pytest.approx(row["median_ms"] / reference)
    ten_streams = 10 * 4 * mnist["parameters"]
    assert rows["flatmin.SAM"]["gb_per_s"] == pytest.approx(ten_streams / reference / 1e6)


def test_quick_counts_memory(quick: tuple[dict[str, Any], str]) -> None:
    """One copy is SAM's least; the textbook holds a product of the largest tensor (98 % of this net) beside it."""
    report, _ = quick
    rows = report["shapes"]["mnist"]["rows"]
    for name in FLATMIN_ROWS:
        assert rows[name]["extra_copies"] == pytest.approx(1.0, abs=0.01)
    assert rows["textbook eager SAM"]["extra_copies"] == pytest.approx(1.98, abs=0.01)
    assert all(rows[name]["extra_copies"] is None for name in LIMIT_ROWS & set(rows))


def test_quick_names_its_environment(quick: tuple[dict[str, Any], str]) -> None:
    import torch

    environment = quick[0]["environment"]
    assert environment["torch"] == torch.__version__
    assert (environment["threads"], environment["rounds"]) == (2, 3)
    assert environment["cpu"]
    assert (environment["pytorch_optimizer"] is None) == (find_spec("pytorch_optimizer") is None)


def test_quick_reports_targets(quick: tuple[dict[str, Any], str]) -> None:
    """The set in memory is the only target that MNIST has, and it holds on any machine."""
    (target,) = quick[0]["shapes"]["mnist"]["targets"]
    assert target["what"] == "extra copies of the parameters"
    assert target["met"] is (target["measured"] <= target["required"])
    assert target["met"]


def test_targets_say_what_the_machine_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The faster limit and the calls: 5 ms."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sam_step

    times = {"flatmin.SAM": [8.0], "textbook eager SAM": [12.0], "limit, plain stores": [5.0]}
    times |= {"limit, streaming stores": [4.0], "flatmin.SAM, calls alone": [1.0]}
    speed, over, _ = sam_step._targets("resnet50", times, {"flatmin.SAM": 1.0})
    assert (speed["measured"], speed["bound"], speed["met"]) == (1.5, 2.4, False)
    assert (over["measured"], over["bound"], over["met"]) == (2.0, 1.25, False)


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("mnist", 8, 1_199_882),
        ("efficientnet_b0", 213, 5_288_548),
        ("resnet50", 161, 25_557_032),
        ("matrices", 4, 67_108_864),
        ("overhead", 213, 213),
    ],
)
def test_shapes_are_those_of_the_networks(name: str, tensors: int, elements: int) -> None:
    shapes = runpy.run_path(str(BENCHMARKS / "shapes.py"))["SHAPE_SETS"][name]()
    assert len(shapes) == tensors
    assert sum(math.prod(shape) for shape in shapes) == elements


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("--rounds", "0"), "--rounds"), (("--threads", "0"), "--threads"), (("--shapes", "alexnet"), "alexnet")],
)
def test_bad_arguments_are_named(arguments: tuple[str, ...], named: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert named in done.stderr


# ---- on a GPU ----


def test_without_a_gpu_the_message_says_so() -> None:
    done = run("--device", "cuda", "--quick", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "--device cuda: torch" in done.stderr
    assert "finds no GPU" in done.stderr


@pytest.mark.cuda
def test_quick_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "quick.json"
    done = run("--device", "cuda", "--quick", "--json", str(path))
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    rows = report["shapes"]["mnist"]["rows"]
    assert set(rows) >= FLATMIN_ROWS | {"textbook eager SAM", "torch._foreach_ by hand", "copy of 1 GiB by torch"}
    assert all(row["median_ms"] > 0 and row["host_ms"] > 0 for row in rows.values())
    assert report["environment"]["gpu"] in done.stdout
    for name in FLATMIN_ROWS:
        assert rows[name]["extra_copies"] == pytest.approx(1.0, abs=0.02)
