"""The experiments in examples/sharpness: tiny runs of each, on small data sets."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import flatmin
from flatmin import ops
from pacgen_examples import SCRIPTS, Stop, UsageError, assert_picture, write_classes, write_mnist

sys.path.insert(0, str(SCRIPTS.parent / "sharpness"))  # as `python examples/sharpness/…` does

import _nets
import m_sam
import ranking
import spectra

TINY = ["--jobs", "1", "--seeds", "2", "--train", "60", "--test", "20", "--batch", "20"]
TINY_SPECTRA = [*TINY, "--epochs", "2", "--measured", "12", "--probes", "2", "--steps", "3"]
TINY_M = [*TINY, "--epochs", "1", "--measured", "12", "--groups", "3", "--m", "5", "20", "--rho", "0.1",
          "--sizes", "1", "12"]  # fmt: skip
TINY_RANKING = [
    "--jobs", "1", "--sweeps", "mnist-batch", "--batches", "16", "32", "64", "--seeds", "2", "--epochs", "1",
    "--train", "96", "--test", "32", "--samples", "16", "--products", "5", "--probes", "1", "--steps", "3",
    "--pairs", "1", "--curvature_samples", "1", "--noise_samples", "1", "--groups", "2",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images sorted into classes, with 80 training and 20 test images."""
    folder = tmp_path_factory.mktemp("cifar_evidence")
    write_classes(folder, "train", 8)
    write_classes(folder, "test", 2)
    return folder


def perform(script: ModuleType, out: Path, *flags: str) -> None:
    script.run(script.parse_args(["--out", str(out), *flags]))


def results(out: Path) -> dict[str, Any]:
    """All finished runs, less the seconds that they took."""
    found = {path.name: json.loads(path.read_text()) for path in sorted((out / "runs").glob("*"))}
    for result in found.values():
        for row in result["epochs"]:
            for key in ("seconds", "report_seconds"):
                row.pop(key, None)
    return found


@pytest.fixture(scope="module")
def spectra_out(cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("spectra")
    perform(spectra, out, "--data", str(cifar), *TINY_SPECTRA)
    return out


def test_spectra_leave_runs_figures_and_a_table(spectra_out: Path) -> None:
    found = results(spectra_out)
    assert set(found) == {f"{method}-seed{seed}.json" for method in ("SGD", "SAM") for seed in (0, 1)}
    for result in found.values():
        assert [row["epoch"] for row in result["epochs"]] == [0, 1, 2]
        for row in result["epochs"]:
            assert row["lambda_1"] == row["eigenvalues"][0] == max(row["eigenvalues"])
            assert row["lambda_1_over_lambda_5"] == pytest.approx(row["eigenvalues"][0] / row["eigenvalues"][4])
            assert row["gap"] == pytest.approx(row["test_loss"] - row["train_loss"])
            assert row["dimension"] == sum(p.numel() for p in _nets.ConvNet().parameters())
            trace = [np.dot(n, w) * row["dimension"] for n, w in zip(row["nodes"], row["weights"], strict=True)]
            assert row["trace"] == pytest.approx(np.mean(trace))
    first = {name: result["epochs"][0] for name, result in found.items()}
    assert first["SGD-seed0.json"] == first["SAM-seed0.json"], "both methods start from the same weights"
    assert first["SGD-seed0.json"] != first["SGD-seed1.json"]
    assert found["SGD-seed0.json"]["epochs"][2] != found["SAM-seed0.json"]["epochs"][2]
    summary = json.loads((spectra_out / "summary.json").read_text())
    ends = [found[f"{m}-seed{s}.json"]["epochs"][2]["lambda_1"] for m in ("SGD", "SAM") for s in (0, 1)]
    assert summary["lambda_1"]["end"]["SGD"]["value"] == pytest.approx(np.mean(ends[:2]))
    ratio = np.sqrt(ends[2] * ends[3] / (ends[0] * ends[1]))
    assert summary["lambda_1"]["end"]["SAM / SGD"]["value"] == pytest.approx(ratio)
    assert summary["lambda_1"]["start"]["SAM / SGD"] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    assert "| lambda_1 (loss / weight^2) | 2, end |" in (spectra_out / "summary.md").read_text()
    for name in ("density.png", "eigenvalues.png"):
        assert_picture(spectra_out / name)


def test_runs_go_on_after_an_exception(cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the second epoch of the first run, and in the second of the third, and measured by a norm."""
    monkeypatch.setattr(spectra, "spectrum", lambda model, *_: {"norm": float(ops.norm(list(model.parameters())))})
    monkeypatch.setattr(spectra, "evaluate_all", lambda out: None)
    perform(spectra, tmp_path / "whole", "--data", str(cifar), *TINY_SPECTRA)
    trained = []

    def interrupted(*args: Any) -> None:
        if len(trained) in (1, 6):
            trained.append("interrupted")
            raise Stop
        trained.append("epoch")
        original(*args)

    original = _nets.train_epoch
    monkeypatch.setattr(_nets, "train_epoch", interrupted)
    for _ in range(2):
        with pytest.raises(Stop):
            perform(spectra, tmp_path / "parts", "--data", str(cifar), *TINY_SPECTRA)
        assert list((tmp_path / "parts" / "runs").glob("*.pt")), "the epoch before the interruption must have been kept"
    perform(spectra, tmp_path / "parts", "--data", str(cifar), *TINY_SPECTRA)
    assert trained.count("epoch") == 8, "four runs of two epochs: none is trained twice"
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_spectra_of_the_seeds_that_are_there(spectra_out: Path, tmp_path: Path) -> None:
    shutil.copytree(spectra_out / "runs", tmp_path / "runs")
    perform(spectra, tmp_path, "--plot-only")
    assert (tmp_path / "summary.json").read_text() == (spectra_out / "summary.json").read_text()
    (tmp_path / "runs" / "SAM-seed1.json").unlink()
    perform(spectra, tmp_path, "--plot-only")
    assert json.loads((tmp_path / "summary.json").read_text())["seeds"] == [0]
    for path in (tmp_path / "runs").glob("*"):
        path.unlink()
    with pytest.raises(UsageError, match="no finished runs"):
        perform(spectra, tmp_path, "--plot-only")


def test_a_step_of_m_sam_is_the_mean_of_its_pieces() -> None:
    """One step of one batch against two plain SAM gradients by hand."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    model, other = _nets.ConvNet(), _nets.ConvNet()
    other.load_state_dict(model.state_dict())
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=1.0), rho=0.1)
    _nets.train_epoch(model, optimizer, (x, y), torch.arange(8), 8, 4)
    params = list(other.parameters())
    total = [torch.zeros_like(p) for p in params]
    for piece in (slice(0, 4), slice(4, 8)):
        grads = torch.autograd.grad(F.cross_entropy(other(x[piece]), y[piece]), params)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        with torch.no_grad():
            saved = [p.clone() for p in params]
            for p, g in zip(params, grads, strict=True):
                p += 0.1 * g / norm
        there = torch.autograd.grad(F.cross_entropy(other(x[piece]), y[piece]), params)
        with torch.no_grad():
            for p, s, t, g in zip(params, saved, total, there, strict=True):
                p.copy_(s)
                t += 0.5 * g
    for trained, p, t in zip(model.parameters(), params, total, strict=True):
        torch.testing.assert_close(trained, p - t, rtol=1e-4, atol=1e-6)


def test_m_sam_leaves_errors_and_correlations(cifar: Path, tmp_path: Path) -> None:
    perform(m_sam, tmp_path, "--data", str(cifar), *TINY_M)
    found = results(tmp_path)
    assert set(found) == {f"{n}-seed{s}.json" for n in ("sgd", "m5-rho0.1", "m20-rho0.1") for s in (0, 1)}
    for result in found.values():
        (row,) = result["epochs"]
        assert row["sharpness_1"] > 0.0 and row["sharpness_12"] > 0.0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["runs"]) == {"SGD", "m = 5, rho = 0.1", "m = 20, rho = 0.1"}
    errors = [100.0 - found[f"sgd-seed{s}.json"]["epochs"][0]["test_accuracy"] for s in (0, 1)]
    assert summary["runs"]["SGD"]["test_error"]["value"] == pytest.approx(np.mean(errors))
    for target in ("gap", "test_error"):
        assert set(summary["correlation"][target]) == {"1", "12"}
        # a net with 20 test images: some resamples, and the values themselves, may be constant
        value = summary["correlation"][target]["12"]["value"]["value"]
        assert value is None or -1.0 <= value <= 1.0
    assert "| m = 12 |" in (tmp_path / "summary.md").read_text()
    assert_picture(tmp_path / "m_sam.png")
    before = (tmp_path / "summary.json").read_text()
    perform(m_sam, tmp_path, "--plot-only")
    assert (tmp_path / "summary.json").read_text() == before


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranking")
    perform(ranking, out, "--mnist", str(write_mnist(tmp_path_factory.mktemp("mnist_evidence"))), *TINY_RANKING)
    return out


def test_ranking_leaves_reports_and_correlations(ranked: Path) -> None:
    found = results(ranked)
    assert len(found) == 6
    for result in found.values():
        (row,) = result["epochs"]
        assert set(ranking.MEASURES) <= set(row)
        assert row["gap"] == pytest.approx(row["test_loss"] - row["train_loss"])
        assert result["settings"]["amounts"]["samples"] == 16
    summary = json.loads((ranked / "summary.json").read_text())["mnist-batch"]
    assert summary["runs"] == 6 and summary["settings"] == [16, 32, 64]
    assert set(summary["correlation"]) == set(ranking.MEASURES)
    assert all(name in (ranked / "summary.md").read_text() for name in ranking.MEASURES.values())
    assert_picture(ranked / "ranking.png")


def test_ranking_is_that_of_the_runs(ranked: Path, tmp_path: Path) -> None:
    """With numbers put in place of the measured ones: one measure that follows the gap, one that goes against it."""
    shutil.copytree(ranked / "runs", tmp_path / "runs")
    for path in (tmp_path / "runs").glob("*.json"):
        result = json.loads(path.read_text())
        s, (row,) = result["settings"], result["epochs"]
        row["gap"] = s["batch"] + 0.1 * s["seed"]
        row["trace"], row["psi"] = 2.0 * row["gap"] ** 3, -row["gap"]
        path.write_text(json.dumps(result))
    perform(ranking, tmp_path, "--plot-only", "--sweeps", "mnist-batch")
    found = json.loads((tmp_path / "summary.json").read_text())["mnist-batch"]
    assert found["correlation"]["trace"] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    assert found["correlation"]["psi"]["value"] == pytest.approx(-1.0)
    assert found["pacgen_less_measure"]["trace"]["value"] == pytest.approx(-2.0)


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        (spectra, ["--epochs", "1"], "--epochs: 1 given"),
        (spectra, ["--rho", "0"], "--rho: 0.0 given"),
        (ranking, ["--samples", "15"], "--samples: 15 given"),
        (m_sam, ["--m", "7"], "--m: 7 given; it must divide the batch size, 100"),
        (m_sam, ["--m", "4", "--rho", "0.1"], "three settings"),
    ],
)
def test_flags_that_do_not_go_together(
    script: ModuleType, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.parse_args(flags)
    assert said in capsys.readouterr().err


def test_sizes_that_the_data_do_not_have(cifar: Path, tmp_path: Path) -> None:
    for script, flags, said in (
        (spectra, ["--measured", "61"], "--measured 61"),
        (m_sam, ["--batch", "80"], "--batch 80"),
        (spectra, ["--train", "81"], "81 images asked for"),
    ):
        tiny = TINY_SPECTRA if script is spectra else TINY_M
        args: argparse.Namespace = script.parse_args(["--out", str(tmp_path), "--data", str(cifar), *tiny, *flags])
        with pytest.raises(UsageError, match=said):
            script.run(args)


@pytest.mark.parametrize("script", [spectra, m_sam, ranking])
def test_full_is_larger_and_flags_count_all_the_same(script: ModuleType) -> None:
    default, full = (script.parse_args(flags).size for flags in ([], ["--full"]))
    assert default == script.Size() and full == script.FULL
    assert full.epochs > default.epochs and full.train >= default.train and full.seeds >= default.seeds
    assert script.parse_args(["--full", "--epochs", "7"]).size == script.FULL._replace(epochs=7)
    assert script.parse_args(["--epochs", "7"]).size == default._replace(epochs=7)
