"""Every Python block of the README and of docs/ runs, in the order of its page, in one namespace for each page.

A line ``<!-- not run: reason -->`` above a block leaves it out, and the reason is for the reader of the source.
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatmin

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)

#: Pages whose blocks a test of their own runs, which also looks at what they print.
ELSEWHERE = {
    "measuring.md": "tests/curvature/test_measuring_doc.py",
    "sharpness.md": "tests/sharpness/test_sharpness_doc.py",
    "random.md": "tests/build/test_docs.py",
}
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def blocks(page: str) -> list[re.Match[str]]:
    return list(FENCE.finditer(PAGES[page].read_text()))


def taken_for_granted() -> dict[str, Any]:
    """The names that a page need not define: a loop's, and the modules'."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 10))
    inputs, labels = torch.randn(24, 8), torch.randint(10, (24,))
    data = torch.utils.data.TensorDataset(inputs, labels)
    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)

    def backward(output: Tensor, target: Tensor) -> Tensor:
        opt.zero_grad()
        loss = nn.functional.cross_entropy(output, target)
        loss.backward()
        return loss

    return {
        "torch": torch,
        "nn": nn,
        "F": nn.functional,
        "flatmin": flatmin,
        "model": model,
        "loss_fn": nn.functional.cross_entropy,
        "opt": opt,
        "backward": backward,
        "train": list(zip(inputs, labels.tolist(), strict=True)),
        "loader": torch.utils.data.DataLoader(data, batch_size=8),
    }


@pytest.mark.filterwarnings("error::DeprecationWarning:flatmin")
@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE])
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = taken_for_granted()
    for block in blocks(page):
        if block["reason"] is not None:
            continue
        line = block.string.count("\n", 0, block.start("code"))
        code = "\n" * line + block["code"]  # so that an error names the line of the page
        exec(compile(code, str(PAGES[page]), "exec"), space)


def test_every_block_is_run_or_says_why_not() -> None:
    ran, left = 0, {}
    for page in PAGES:
        text = PAGES[page].read_text()
        assert len(blocks(page)) == len(re.findall(r"^```py", text, re.MULTILINE)), f"{page}: a fence of another form"
        for block in blocks(page):
            ran += block["reason"] is None
            if block["reason"] is not None:
                left[page] = left.get(page, 0) + 1
    assert ran > 25
    assert sum(left.values()) <= 4, left


@pytest.mark.parametrize("page", ELSEWHERE)
def test_pages_that_are_run_elsewhere_are(page: str) -> None:
    assert page in (ROOT / ELSEWHERE[page]).read_text()
    assert page != "random.md" or doctest.DocTestParser().get_examples(PAGES[page].read_text())
