"""examples/sharpness/report.py as a user runs it, on scikit-learn's digits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flatmin

SCRIPT = Path(__file__).parents[2] / "examples" / "sharpness" / "report.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # without its folder first in sys.path, a package that is not installed is found as the tests find it
    path = os.pathsep.join([str(Path(flatmin.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=env, check=False)


def test_both_reports_and_their_figures(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    small = ("--limit-train", "100", "--epochs", "2", "--budget", "0.01", "--points", "2")
    done = run("--data", "digits", "--out", str(tmp_path), *small)
    assert done.returncode == 0, done.stderr
    assert "std. errors apart" in done.stdout
    assert "measured differently" not in done.stdout
    names = {"report_SGD", "report_SAM", "compare", "line", "plane", "surface"}
    assert {p.stem for p in tmp_path.glob("*.png")} == names
    stored = json.loads((tmp_path / "report_SAM.json").read_text())
    assert stored["settings"]["training samples"] == 100


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    done = run("--data", str(tmp_path / "none"), "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
