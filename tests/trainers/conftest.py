"""The recipes of examples/trainers/ as modules, and what the packages that they use need on a CPU build of torch."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

RECIPES = Path(__file__).parents[2] / "examples" / "trainers"

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _declare_operators_of_torchvision() -> None:
    """The wheel of torchvision on PyPI is built for CUDA. Beside a CPU build of torch its library does not load, and
    its Python then looks for two operators in vain. None of the tests calls them."""
    if torch.version.cuda is None:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")


_declare_operators_of_torchvision()


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a recipe by its name."""
    monkeypatch.syspath_prepend(str(RECIPES))

    def load(name: str) -> ModuleType:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages, about each other
            return importlib.import_module(name)

    return load
