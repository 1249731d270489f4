"""benchmarks/curvature.py: run as a user runs it, on its smallest setting. Times are not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "curvature.py"


def test_quick(tmp_path: Path) -> None:
    path = tmp_path / "quick.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--threads", "1", "--json", str(path)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    expected = {"flatmin"} | {n for n, m in (("PyHessian", "pyhessian"), ("curvlinops", "curvlinops")) if find_spec(m)}
    for rows in ("eigenvalues", "density", "product_seconds"):
        assert set(report[rows]) == expected
    assert (report["images"], report["density_images"]) == (40, 20)
    mine = report["eigenvalues"]["flatmin"]
    assert len(mine["values"]) == 5
    assert max(mine["residuals"]) <= 1e-3
    assert mine["products"] == int(mine["products"]) > 5
    assert report["density"]["flatmin"]["products"] == 2 * 5
    assert set(report["memory_bytes"]) == {"product", "eigenvalues", "basis"}
    assert min(report["memory_bytes"].values()) > 0
    residual = report["targets"][0]
    assert residual["what"] == "flatmin's largest relative residual / 1e-3"
    assert residual["met"]
    assert "vector work of a step with 50 vectors" in done.stdout


def test_the_network_is_resnet_20() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import curvature, torch; net = curvature.resnet()\n"
        "print(sum(p.numel() for p in net.parameters()), sum(isinstance(m, torch.nn.Conv2d) for m in net.modules()),"
        " tuple(net(torch.zeros(2, 3, 32, 32)).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    # 19 convolutions of 3 x 3 and two shortcuts of 1 x 1
    assert done.stdout.split() == ["272474", "21", "(2,", "10)"], done.stderr
