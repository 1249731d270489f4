"""benchmarks/label_noise.py: run as a user runs it, on its smallest setting. Times are not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "label_noise.py"


def test_quick(tmp_path: Path) -> None:
    path = tmp_path / "quick.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--json", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert report["labels"] == 100_000 and len(report["median_ms"]) == 8
    assert all(row in done.stdout and 0 < report["best_ms"][row] <= ms for row, ms in report["median_ms"].items())
    assert len(report["targets"]) == 2


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice a copy where that is more than a nanosecond, else a nanosecond."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import label_noise

    times = {label_noise.OURS: [9.0], label_noise.WHERE: [50.0], label_noise.COPY: [4.0]}
    speed, share = label_noise.figures(times, 10_000_000)
    assert (speed.measured, speed.required) == pytest.approx((9 / 50, 1 / 5))
    assert (share.measured, share.required) == pytest.approx((0.9, 1.0))
    _, share = label_noise.figures(times | {label_noise.COPY: [6.0]}, 10_000_000)
    assert share.required == pytest.approx(1.2)
