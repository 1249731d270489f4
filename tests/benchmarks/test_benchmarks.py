"""The benchmarks: run as a user runs them, on their smallest setting. Times are not judged here."""

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
FLATMIN_ROWS = {
    "flatmin.SAM",
    "flatmin.SAM, step after the context",
    "flatmin.SAM, a group per tensor",
    "flatmin.SAM, plain base step",
    "flatmin.ops",
}
CALLS_ROWS = {"flatmin.SAM, calls alone", "flatmin.SAM, calls alone, step after the context"}
PEER_ROWS = {"pytorch-optimizer SAM, foreach off", "pytorch-optimizer SAM, foreach on"}
STEP_LIMIT_ROWS = {"limit, plain stores", "limit, streaming stores"}
LIMIT_ROWS = STEP_LIMIT_ROWS | {"read", "copy, plain stores", "copy, streaming stores"}


def run(*arguments: str, script: str = "sam_step.py", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
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
    expected = FLATMIN_ROWS | CALLS_ROWS | {"textbook eager SAM"}
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
    """No peer is in them. The memory holds on any machine."""
    report, table = quick
    *over, after, memory = report["shapes"]["mnist"]["targets"]
    assert memory["what"] == "extra copies of the parameters"
    assert (memory["verdict"], memory["met"]) == ("met", True)
    assert memory["measured"] <= memory["required"]
    assert after["what"] == "after the context, times the closure path"
    assert (after["limit"] is not None) == bool(shutil.which("cc"))
    assert [each["what"] for each in over] == ["time over the limit and the calls"] * bool(shutil.which("cc"))
    assert "one run: no spread" in table


@pytest.fixture
def sam_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sam_step

    return sam_step


@pytest.mark.parametrize("base", ["sgd", "adam", "adamw"])
def test_rows_agree_on_the_weights_whatever_the_base(sam_step: Any, base: str) -> None:
    import torch

    shapes = [(3, 4), (5,)]
    values, grads = (sam_step.random_tensors(shapes, seed, torch.device("cpu")) for seed in (0, 1))
    weights = {}
    for row, build in sam_step.builders(sam_step.BASES[base], with_compile=False).items():
        weights[row] = sam_step.parameters(values, grads)
        step = build(weights[row])
        step()
        step()
    sam_step.check_agreement(weights)
    weights["flatmin.SAM"][0].data[0, 0] += 1e-4
    with pytest.raises(RuntimeError, match=r"flatmin\.SAM and textbook eager SAM disagree"):
        sam_step.check_agreement(weights)


def one_run(flatmin: list[float], **others: Any) -> dict[str, Any]:
    """A run in which the limit is 4 ms, the calls take 1 or, after the context, 2, and the textbook 12."""
    times = {"flatmin.SAM": flatmin, "textbook eager SAM": [12.0], "limit, plain stores": [5.0]}
    times |= {"limit, streaming stores": [4.0], "flatmin.SAM, step after the context": [9.0]}
    times |= {"flatmin.SAM, calls alone": [1.0], "flatmin.SAM, calls alone, step after the context": [2.0]}
    run = {"times": times, "extra": {"flatmin.SAM": 1.0}, "host": {}, "tensors": 3, "parameters": 1000}
    return run | {"compile_seconds": None} | others


def test_the_step_is_held_against_the_faster_limit_and_the_calls(sam_step: Any) -> None:
    over, _, memory = sam_step.figures("resnet50", sam_step.BASES["sgd"], one_run([8.0]))
    assert (over.measured, over.required) == (8.0 / 5.0, 1.10)
    assert (memory.measured, memory.required) == (1.0, 1.05)


def test_adam_moves_two_streams_more(sam_step: Any) -> None:
    over, after, _ = sam_step.figures("resnet50", sam_step.BASES["adamw"], one_run([8.0]))
    assert over.measured == pytest.approx(8.0 / (4.8 + 1.0))
    assert after.limit == pytest.approx((5.6 + 2.0) / (4.8 + 1.0))
    assert after.required == 1.2


def test_what_the_streams_and_the_calls_alone_exceed_is_beyond_the_machine(sam_step: Any) -> None:
    """12 streams take 4.8 ms and the calls 2; 10 streams take 4 and the calls 1."""
    runs = [sam_step.figures("resnet50", sam_step.BASES["sgd"], one_run([t])) for t in (6.0, 6.05)]
    assert runs[0][1].measured == 9.0 / 6.0
    assert runs[0][1].limit == pytest.approx(6.8 / 5.0)
    after = sam_step.judged(runs)[1]
    assert (after["verdict"], after["met"]) == ("beyond the machine", False)
    alone = [[sam_step.Figure("x", measured, 1.25, 1.2)] for measured in (1.5, 1.51)]
    assert sam_step.judged(alone)[0]["verdict"] == "missed"


def test_a_step_of_small_tensors_is_held_against_a_time(sam_step: Any) -> None:
    """On a GPU against that of the host: the device has nothing to do."""
    sgd = sam_step.BASES["sgd"]
    spent, after = sam_step.figures("overhead", sgd, one_run([0.35, 0.37, 0.3]))
    assert (spent.measured, spent.required) == (0.35, 0.4)
    assert after.limit is None
    on_gpu, _ = sam_step.figures("overhead", sgd, one_run([0.02], host={"flatmin.SAM": 0.3}))
    assert on_gpu.measured == 0.3


def test_on_a_gpu_the_limit_is_a_copy(sam_step: Any) -> None:
    """1 GiB read and written in 1 ms: 10 streams of 4 bytes of 2^26 elements take 1.25 ms."""
    run = one_run([3.0], parameters=2**26)
    run["times"] = {"flatmin.SAM": [3.0], "flatmin.SAM, step after the context": [4.0], "copy of 1 GiB by torch": [1.0]}
    run["times"] |= {row: [0.25] for row in CALLS_ROWS}
    over, after, _ = sam_step.figures("matrices", sam_step.BASES["sgd"], run)
    assert over.measured == pytest.approx(3.0 / 1.5)
    assert after.limit == pytest.approx(1.75 / 1.5)
    rows = sam_step.combined("matrices", sam_step.BASES["sgd"], [run])["rows"]
    assert rows["flatmin.SAM"]["model_ms"] == pytest.approx(1.25)
    assert rows["copy of 1 GiB by torch"]["model_ms"] is None


@pytest.mark.parametrize(
    ("measured", "verdict", "met"),
    [
        ([1.0, 1.09, 1.2], "met", True),
        ([1.08, 1.14, 1.15], "within the spread", True),
        ([1.12, 1.14, 1.15], "missed", False),
        ([1.14], "missed", False),
    ],
)
def test_a_miss_within_the_spread_of_the_runs_is_met(
    sam_step: Any, measured: list[float], verdict: str, met: bool
) -> None:
    """The median counts, and the spread is from the smallest to the largest."""
    (each,) = sam_step.judged([[sam_step.Figure("over", m, 1.10)] for m in measured])
    assert (each["verdict"], each["met"]) == (verdict, met)
    assert each["measured"] == sorted(measured)[len(measured) // 2]
    assert (each["lowest"], each["highest"]) == (min(measured), max(measured))


def test_runs_are_combined(sam_step: Any) -> None:
    """Rows by all their rounds, of the runs that have them; figures run by run."""
    runs = [one_run([5.0, 6.0]), one_run([5.5])]
    runs[0]["times"]["torch.compile'd SAM"] = [11.0]
    both = sam_step.combined("mnist", sam_step.BASES["sgd"], runs)
    assert both["runs"] == 2
    assert both["rows"]["flatmin.SAM"]["median_ms"] == 5.5
    assert both["rows"]["torch.compile'd SAM"]["ratio"] == 2.0
    assert both["targets"][0]["measured"] == pytest.approx(1.1)


def test_noise_step(tmp_path: Path) -> None:
    """On its smallest setting: every row, and the three figures that are required."""
    path = tmp_path / "noise.json"
    done = run("--quick", "--json", str(path), script="noise_step.py")
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    held = {each["what"].partition(":")[0]: each["required"] for each in report["targets"]}
    beside_c = {"flatmin.ops.scaled_noise_": 2.0, "flatmin.ops.pacgen": 2.0} if shutil.which("cc") else {}
    assert held == beside_c | {"flatmin.PerturbedOPT": 1.6}
    assert all(ms > 0 for ms in report["median_ms"].values())
    assert all(row in done.stdout for row in report["median_ms"])


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
    [
        (("--rounds", "0"), "--rounds"),
        (("--runs", "0"), "--runs"),
        (("--threads", "0"), "--threads"),
        (("--shapes", "alexnet"), "alexnet"),
    ],
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


@pytest.mark.cuda
def test_noise_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "noise.json"
    done = run("--device", "cuda", "--quick", "--json", str(path), script="noise_step.py")
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert set(report["model_ms"]) < set(report["median_ms"])
    assert len(report["targets"]) == 3
    assert report["environment"]["gpu"] in done.stdout
