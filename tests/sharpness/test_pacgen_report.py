"""What ``flatmin.pacgen`` reports: its table, its dictionary, its figure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatmin.sharpness import PACGen, pacgen
from flatmin.sharpness._pac_bayes import Bound
from models import batches, small_net

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- the report ----


@pytest.fixture
def report() -> PACGen:
    return pacgen(small_net(), F.cross_entropy, batches(2), curvature_samples=2, noise_samples=1)


def test_table(report: PACGen) -> None:
    lines = str(report).splitlines()
    assert "239 parameters on 16 samples, gamma 0.1, eps 0.1" in lines[0]
    assert "hutchinson, 2 samples" in lines[1]
    header = next(i for i, line in enumerate(lines) if line.startswith("parameter"))
    assert "Psi / nats" in lines[header]
    rows = {line.split()[0]: line.split()[1:] for line in lines[header + 2 : header + 8]}
    assert list(rows) == [layer.name for layer in report.layers]
    for layer in report.layers:
        size, psi, each = rows[layer.name][:3]
        assert size == str(layer.size)
        assert float(psi) == pytest.approx(layer.psi, rel=1e-5)  # six digits
        assert float(each) == pytest.approx(layer.psi / layer.size, rel=1e-3)  # four
    totals = lines[header + 9].split()
    assert totals[:2] == ["total", "239"]
    assert float(totals[2]) == pytest.approx(report.psi, rel=1e-5)
    text = {line[:31].strip(): line[31:] for line in lines[header + 11 :]}
    assert float(text["training loss"]) == pytest.approx(report.training_loss, rel=1e-5)
    assert float(text["bound, uniform noise"].split()[0]) == pytest.approx(report.bound_uniform, rel=1e-5)
    normal = float(text["bound, truncated normal noise"].split()[0])
    assert normal == pytest.approx(report.bound_truncated_normal, rel=1e-5)
    assert text["expected sharpness"].endswith("(one draw of the uniform noise)")
    assert "tensor(" not in repr(report)


def test_dictionary_is_json(report: PACGen) -> None:
    found = report.as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["psi"] == report.psi
    assert [layer["psi"] for layer in found["layers"]] == [layer.psi for layer in report.layers]
    assert found["uniform"] == report.uniform._asdict()
    assert Bound(**found["truncated_normal"]) == report.truncated_normal
    assert report.sharpness is not None
    assert found["sharpness"] == {"value": report.sharpness.value, "stderr": None, "samples": 1}  # one draw: no error
    each = pacgen(
        small_net(), F.cross_entropy, batches(1), curvature_samples=1, noise_samples=0, lipschitz="element"
    ).as_dict()
    assert json.loads(json.dumps(each, allow_nan=False)) == each
    assert each["sharpness"] is None
    assert each["lipschitz"]["largest"] >= each["lipschitz"]["median"]


def test_figure(report: PACGen, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = report.plot(tmp_path / "pacgen.png")
    assert (tmp_path / "pacgen.png").read_bytes().startswith(b"\x89PNG")
    left, right = figure.axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == [layer.name for layer in report.layers]
    widths = [bar.get_width() for bar in left.patches]
    assert widths == [layer.psi for layer in report.layers]
    tops = [max(bar.get_y() + bar.get_height() for bar in right.patches if round(bar.get_x()) == x) for x in (0, 1)]
    assert tops == pytest.approx([report.bound_uniform, report.bound_truncated_normal], rel=1e-12)
    assert "nats" in left.get_xlabel()
    assert right.get_ylabel()
    assert report.plot().axes


def test_figure_of_many_layers_joins_the_smallest() -> None:
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
    found = pacgen(
        net, F.cross_entropy, (torch.randn(4, 2), torch.tensor([0, 1, 0, 1])), curvature_samples=1, noise_samples=0
    )
    left = found.plot().axes[0]
    labels = [tick.get_text() for tick in left.get_yticklabels()]
    assert len(labels) == 24
    assert labels[-1] == "17 others"
    assert sum(bar.get_width() for bar in left.patches) == pytest.approx(found.psi, rel=1e-12)


def test_figure_without_matplotlib(report: PACGen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.plot()
