"""docs/sharpness.md: its code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOC = Path(__file__).parents[2] / "docs" / "sharpness.md"


@pytest.mark.requires("scipy")
def test_the_worked_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], restore_threads: None
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    (code,) = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S)
    exec(compile(code.replace("budget_s=2", "budget_s=0.1"), str(DOC), "exec"), {})
    printed = capsys.readouterr().out
    assert "largest eigenvalue lambda_1" in printed
    assert "SAM / SGD" in printed
    assert "measured differently" not in printed
    files = {"report.png", "compare.png", "line.png", "plane.png", "surface.png", "plane.json"}
    assert {p.name for p in tmp_path.iterdir()} == files
    assert all((DOC.parent / figure).exists() for figure in re.findall(r"!\[.*?\]\((.*?)\)", DOC.read_text()))
