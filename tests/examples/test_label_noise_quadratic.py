"""examples/label_noise/quadratic.py: its steps against autograd, its files, and what it says of too short a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pacgen_examples import assert_picture

SCRIPT = Path(__file__).parents[2] / "examples" / "label_noise" / "quadratic.py"
sys.path.insert(0, str(SCRIPT.parent))

import quadratic  # noqa: E402


def test_gradient_descent_is_that_of_the_stated_loss() -> None:
    """120 steps by autograd; the rate falls twice."""
    x, target = quadratic.problem(3)
    y = x @ target
    v = torch.ones(quadratic.DIMENSION, dtype=torch.float64, requires_grad=True)
    for step in range(120):
        loss = 0.25 * (y - x @ v.square()).square().mean()
        (gradient,) = torch.autograd.grad(loss, v)
        with torch.no_grad():
            v -= 0.01 * 0.1 ** (step // 40) * gradient
    result = quadratic.train([3], 120)
    found = torch.tensor(result["solutions"][0][0], dtype=torch.float64)
    torch.testing.assert_close(found, v.detach().square(), rtol=1e-9, atol=1e-12)
    assert result["losses"][0][0] == pytest.approx(float(0.25 * (y - x @ found).square().mean()))


def test_label_noise_has_the_gradient_of_moved_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step: the gradient of all points, and how much one label, moved, changes that of its point."""
    monkeypatch.setattr(quadratic, "LABEL_NOISE", 3.0)
    x, target = quadratic.problem(0)
    y, v = x @ target, torch.ones(quadratic.DIMENSION, dtype=torch.float64)
    moved = torch.tensor(quadratic.train([0], 1)["solutions"][0][1], dtype=torch.float64).sqrt() - v
    plain = 0.01 * ((y - x @ v.square()).unsqueeze(1) * x).mean(0)
    rest = (moved - plain) / 0.01  # (y~_i - y_i) x_i of one point
    share = (x @ rest) / x.square().sum(1)
    point = int((rest - share.unsqueeze(1) * x).norm(dim=1).argmin())
    torch.testing.assert_close(rest, share[point] * x[point], rtol=1e-6, atol=1e-9)
    assert 0.01 < abs(float(share[point])) < 12.0


def test_the_command(tmp_path: Path) -> None:
    """A short run writes both files and says that w* is not found; --plot-only draws them again, to the same bytes."""
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path)]
    done = subprocess.run([*command, "--steps", "900", "--problems", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "label noise did not find w*" in done.stderr
    result = json.loads((tmp_path / "quadratic.json").read_text())
    assert result["settings"] == {"seed": 0, "problems": 1, "steps": 900} and result["steps"] == [0, 500, 900]
    distances = [errors[-1] for errors in result["errors"][0]]
    assert distances[1] < distances[0] and all(name in done.stdout for name in quadratic.METHODS)
    picture = tmp_path / "quadratic.png"
    assert_picture(picture)
    before = picture.read_bytes()
    picture.unlink()
    subprocess.run([*command, "--plot-only"], capture_output=True, check=False)
    assert picture.read_bytes() == before


def test_plot_only_needs_a_run(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--plot-only"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no such file; run without --plot-only first" in done.stderr
