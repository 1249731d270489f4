"""docs/reference.md has every public name, and the tests that pages name are there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


@pytest.mark.parametrize("module", ["", ".optim", ".curvature", ".sharpness", ".label_noise", ".ops"])
def test_every_public_name_is_in_the_reference(module: str) -> None:
    documented = re.findall(r"^::: (flatmin\S+)$", REFERENCE, re.MULTILINE)
    assert len(documented) == len(set(documented))
    public = importlib.import_module(f"flatmin{module}")
    objects = [
        importlib.import_module(path.rpartition(".")[0]).__dict__[path.rpartition(".")[2]] for path in documented
    ]
    for name in public.__all__:
        found = getattr(public, name)
        if not hasattr(found, "__path__"):  # a package has a section of its own
            assert any(found is known for known in objects), f"{public.__name__}.{name}"


def test_everything_in_the_reference_has_a_docstring() -> None:
    for path in re.findall(r"^::: (flatmin\S+)$", REFERENCE, re.MULTILINE):
        module, _, name = path.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        assert not callable(found) or (found.__doc__ or "").strip(), path


def test_the_tests_that_pages_name_are_there() -> None:
    """docs/peers.md and docs/trainers.md claim nothing without a test."""
    checked = 0
    for page in ("peers.md", "trainers.md", "moving.md", "limits.md"):
        text = (ROOT / "docs" / page).read_text()
        for file, test in re.findall(r"`(?:tests/)?([\w/]+\.py)::(test_\w+)`", text):
            source = (ROOT / "tests" / file).read_text()
            assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{page}: {file}::{test}"
            checked += 1
    assert checked > 60
