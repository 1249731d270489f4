"""Pages in docs/ whose code runs."""

from __future__ import annotations

import doctest
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_on_random_numbers_computes_one() -> None:
    found = doctest.testfile(str(DOCS / "random.md"), module_relative=False)
    assert found.attempted > 8
    assert found.failed == 0
