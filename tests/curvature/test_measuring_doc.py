"""docs/measuring.md: its code runs as it stands, and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOC = Path(__file__).parents[2] / "docs" / "measuring.md"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_worked_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        blocks = re.findall(r"```(\w*)\n(.*?)```", DOC.read_text(), re.S)
        space: dict[str, object] = {}
        for language, code in blocks:
            if language == "python":
                exec(compile(code, str(DOC), "exec"), space)
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    (shown,) = [code for language, code in blocks if not language]
    pattern = r"(\w+): lambda_1 ([\d.]+), .*\n  trace ([\d.]+)"
    found, expected = re.findall(pattern, printed), re.findall(pattern, shown)
    assert [name for name, _, _ in found] == ["SGD", "SAM"]
    for (_, *values), (_, *stated) in zip(found, expected, strict=True):
        # training is not the same to the bit on every machine
        assert [float(v) for v in values] == pytest.approx([float(v) for v in stated], rel=0.3)
    assert float(found[1][1]) < float(found[0][1])  # SAM's network is flatter
    assert (tmp_path / "density_SGD.png").exists()
    assert (DOC.parent / "measuring" / "density_SGD.png").exists()
