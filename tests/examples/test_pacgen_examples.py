"""The scripts in examples/pacgen: tiny runs of each, on small data sets."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pacgen_examples import (
    SCRIPTS,
    TINY_SWEEP,
    Stop,
    UsageError,
    _images,
    _measures,
    _network,
    _runs,
    assert_picture,
    perturbed_opt,
    sweeps,
    write_classes,
    write_mnist,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mnist(tmp_path_factory.mktemp("mnist"))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images sorted into classes, with 80 training and 20 test images."""
    folder = tmp_path_factory.mktemp("cifar")
    write_classes(folder, "train", 8)
    write_classes(folder, "test", 2)
    return folder


def without_times(path: Path) -> Any:
    """A run's JSON, less the seconds that it took."""
    result = json.loads(path.read_text())
    for row in result["epochs"]:
        del row["seconds"]
    return result


def assert_same_runs(a: Path, b: Path) -> None:
    names = sorted(path.name for path in (a / "runs").glob("*"))
    assert names == sorted(path.name for path in (b / "runs").glob("*")), "no checkpoint must be left either"
    assert names
    for name in names:
        assert without_times(a / "runs" / name) == without_times(b / "runs" / name), name


# ---- sweeps ----


def sweep(out: Path, mnist: Path, *flags: str) -> None:
    sweeps.run(sweeps.parse_args(["--out", str(out), "--mnist", str(mnist), "--jobs", "1", *TINY_SWEEP, *flags]))


@pytest.fixture(scope="module")
def swept(mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted sweep of six runs leaves, made in one process."""
    out = tmp_path_factory.mktemp("swept")
    before = torch.get_num_threads()
    sweep(out, mnist)
    assert torch.get_num_threads() == before
    return out


def test_sweep_leaves_runs_correlations_and_figures(swept: Path) -> None:
    result = json.loads((swept / "runs" / "mnist-batch32-lr0.1-seed1.json").read_text())
    assert (result["settings"]["batch"], result["settings"]["lr"], result["settings"]["seed"]) == (32, 0.1, 1)
    assert [row["epoch"] for row in result["epochs"]] == [1, 2]
    for row in result["epochs"]:
        assert row["gap"] == pytest.approx(row["test_loss"] - row["train_loss"])
        assert all(isinstance(row[key], float) and math.isfinite(row[key]) for key in _measures.MEASURES)
    summary = json.loads((swept / "summary.json").read_text())["mnist-batch"]
    assert summary["settings"] == [16, 32, 64] and summary["seeds"] == [0, 1]
    assert summary["equal_epoch"]["points"] == [1, 2] and summary["equal_epoch"]["runs"] == [6, 6]
    for intervals in summary["equal_epoch"]["correlation"].values():
        for i in intervals:
            assert -1 <= i["low"] <= i["high"] <= 1 and -1 <= i["value"] <= 1
    text = (swept / "summary.md").read_text()
    assert all(label in text for label in _measures.MEASURES.values())
    for name in ("mnist-batch.png", "correlation.png", "correlation_by_epoch.png"):
        assert_picture(swept / name)


def test_sweep_is_drawn_again_without_training(swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(swept / "runs", tmp_path / "runs")
    monkeypatch.setattr(sweeps, "perform", None)
    sweeps.run(sweeps.parse_args(["--out", str(tmp_path), "--plot-only"]))
    assert (tmp_path / "summary.json").read_text() == (swept / "summary.json").read_text()
    assert_picture(tmp_path / "correlation.png")


def test_sweep_goes_on_after_an_exception(
    swept: Path, mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first of a run's two epochs, and then in the middle of the second run."""
    trained = []

    def interrupted(*args: Any) -> float:
        if len(trained) in (1, 4):
            trained.append("interrupted")
            raise Stop
        trained.append("epoch")
        return _network.train_epoch(*args)

    monkeypatch.setattr(sweeps, "train_epoch", interrupted)
    for _ in range(2):
        with pytest.raises(Stop):
            sweep(tmp_path, mnist)
        assert list((tmp_path / "runs").glob("*.pt")), "the epoch before the interruption must have been kept"
    sweep(tmp_path, mnist)
    assert trained.count("epoch") == 12, "six runs of two epochs: none is trained twice"
    assert_same_runs(swept, tmp_path)


def wait_for(what: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_sweep_goes_on_after_sigterm_with_other_jobs(swept: Path, mnist: Path, tmp_path: Path) -> None:
    """Two processes are stopped by SIGTERM; one process does the rest. None of it changes a number."""
    command = [sys.executable, str(SCRIPTS / "sweeps.py"), "--out", str(tmp_path), "--mnist", str(mnist)]
    process = subprocess.Popen(
        [*command, "--jobs", "2", *TINY_SWEEP],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: bool(list((tmp_path / "runs").glob("*.pt"))) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "the same command goes on from here" in output
    wait_for(lambda: group_is_gone(process.pid))
    finished = list((tmp_path / "runs").glob("*.json"))
    assert len(finished) < 6, "stopped too late to show anything"
    sweep(tmp_path, mnist)
    assert_same_runs(swept, tmp_path)


def test_sweep_refuses_runs_of_other_settings(swept: Path, mnist: Path, tmp_path: Path) -> None:
    shutil.copytree(swept / "runs", tmp_path / "runs")
    with pytest.raises(UsageError, match=r"made with probes 1, but now it is 2; give another --out"):
        sweep(tmp_path, mnist, "--probes", "2")


def test_one_run_serves_both_sweeps_of_its_task(mnist: Path, cifar: Path) -> None:
    args = sweeps.parse_args(["--mnist", str(mnist), "--cifar10", str(cifar)])
    runs = sweeps.plan(args, {"mnist": (60_000, 10_000), "cifar10": (10_000, 2_000)})
    names = [run.name for run in runs]
    assert len(names) == len(set(names)) == 2 * 3 * (5 + 5 - 1)
    shared = next(run for run in runs if run.name == "cifar10-batch256-lr0.1-seed2")
    assert [name for name, s in sweeps.SWEEPS.items() if s.holds(shared.settings)] == ["cifar10-batch", "cifar10-lr"]
    full = sweeps.plan(sweeps.parse_args(["--full"]), {"mnist": (60_000, 10_000), "cifar10": (50_000, 10_000)})
    assert {run.settings["train"] for run in full} == {60_000, 50_000}


def test_sweep_of_cifar_runs(cifar: Path, tmp_path: Path) -> None:
    flags = ["--sweeps", "cifar10-lr", "--rates", "0.01", "0.1", "--seeds", "1", "--train", "80", "--test", "20"]
    args = ["--out", str(tmp_path), "--cifar10", str(cifar), "--jobs", "1", *TINY_SWEEP, *flags]
    sweeps.run(sweeps.parse_args(args))
    assert len(list((tmp_path / "runs").glob("*.json"))) == 2
    assert_picture(tmp_path / "cifar10-lr.png")


def test_more_images_than_there_are_is_an_error_at_once(mnist: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="500 training images asked for of 128"):
        sweep(tmp_path, mnist, "--train", "500")


# ---- Perturbed OPT ----

TINY_STUDY = [
    "--tasks", "mnist", "--epochs", "2", "--every", "1", "--seeds", "2", "--train", "64", "--holdout", "32",
    "--jobs", "1",
]  # fmt: skip


def study(out: Path, mnist: Path) -> None:
    perturbed_opt.run(perturbed_opt.parse_args(["--out", str(out), "--mnist", str(mnist), *TINY_STUDY]))


@pytest.fixture(scope="module")
def studied(mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("studied")
    study(out, mnist)
    return out


def test_every_method_gets_the_same_budget(studied: Path) -> None:
    result = json.loads((studied / "mnist.json").read_text())
    assert {len(tuning["grid"]) for tuning in result["tuning"].values()} == {6}
    made = [json.loads(path.read_text()) for path in (studied / "runs").glob("*.json")]
    assert len(made) == 4 * 6 + 4 * 2
    assert {run["epochs"][-1]["gradients"] for run in made} == {2} == {result["gradients"]}
    tuned = {run["settings"]["seed"] for run in made if run["settings"]["judge"] == "holdout"}
    compared = {run["settings"]["seed"] for run in made if run["settings"]["judge"] == "test"}
    assert compared == {0, 1} and not tuned & compared


def test_the_best_entry_of_the_grid_is_compared(studied: Path) -> None:
    result = json.loads((studied / "mnist.json").read_text())
    for method, tuning in result["tuning"].items():
        best = tuning["best"]
        assert best["accuracy"] == max(entry["accuracy"] for entry in tuning["grid"])
        runs = [run for run in result["runs"] if run["settings"]["method"] == method]
        assert len(runs) == 2
        for run in runs:
            chosen = {key: run["settings"][key] for key in ("lr", "dropout", "gamma", "scale")}
            assert chosen == {key: best["settings"][key] for key in chosen}


def test_isotropic_noise_has_the_mean_size_of_perturbed_opt(studied: Path) -> None:
    result = json.loads((studied / "mnist.json").read_text())
    sizes: dict[str, dict[int, float]] = {"perturbed": {}, "isotropic": {}}
    for run in result["runs"]:
        sigma = np.mean([row["sigma"] for row in run["epochs"]])
        if run["settings"]["method"] in sizes:
            sizes[run["settings"]["method"]][run["settings"]["seed"]] = sigma
        else:
            assert sigma == 0
    assert sizes["perturbed"][0] > 0
    # the operator reports a float64 sum of float32 sizes
    assert sizes["isotropic"] == pytest.approx(sizes["perturbed"], rel=1e-6)


def test_study_is_drawn_again_without_training(studied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(studied / "mnist.json", tmp_path)
    monkeypatch.setattr(perturbed_opt, "perform", None)
    perturbed_opt.run(perturbed_opt.parse_args(["--out", str(tmp_path), "--tasks", "mnist", "--plot-only"]))
    for name in ("mnist.png", "mnist-curves.png"):
        assert_picture(tmp_path / name)
    text = (tmp_path / "summary.md").read_text()
    assert text == (studied / "summary.md").read_text()
    assert all(f"| {label} |" in text for label in perturbed_opt.METHODS.values())


def test_study_goes_on_after_an_exception(
    studied: Path, mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second epoch of a run with Perturbed OPT, whose state is part of the checkpoint, and in one with
    isotropic noise, whose size comes from the tuning before."""
    for stop in ("perturbed", "isotropic"):

        def interrupted(
            model: nn.Module, batches: Any, optimizer: Any, watch: Callable[[], None], stop: str = stop
        ) -> float:
            frame = sys._getframe(1).f_locals
            if frame["s"]["method"] == stop and frame["epoch"] == 2:
                raise Stop
            return _network.train_epoch(model, batches, optimizer, watch)

        monkeypatch.setattr(perturbed_opt, "train_epoch", interrupted)
        with pytest.raises(Stop):
            study(tmp_path, mnist)
        assert len(list((tmp_path / "runs").glob(f"*-{stop}-*.pt"))) == 1
    monkeypatch.setattr(perturbed_opt, "train_epoch", _network.train_epoch)
    study(tmp_path, mnist)
    assert_same_runs(studied, tmp_path)


@pytest.mark.parametrize("method", ["perturbed", "plain"])
def test_a_run_that_diverges_ends_and_comes_last(mnist: Path, tmp_path: Path, method: str) -> None:
    size = perturbed_opt.parse_args(TINY_STUDY).sizes["mnist"]
    tuned = {"lr": 1e30, "dropout": 0.0, "gamma": 0.1, "scale": 1.0, "sigma": 0.0}
    run = perturbed_opt.make_run("mnist", method, size, tuned, 0, "holdout", "cpu")
    source = _images.Source({"mnist": str(mnist)}, str(tmp_path / "cache"), "cpu")
    (result,) = _runs.perform(tmp_path, [run], partial(perturbed_opt.trained, source), 1, "diverging")
    assert [row["epoch"] for row in result["epochs"]] == [1, 2]
    assert [row["gradients"] for row in result["epochs"]] == [1, 2]
    assert math.isnan(perturbed_opt.last(result, "judge_loss"))
