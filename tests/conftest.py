"""Settings of the whole test run: hypothesis draws the same examples every time, and no test leaks its thread count."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "flatmin",
    deadline=None,  # a first call loads a library or compiles: its time says nothing
    derandomize=True,
    max_examples=40,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("flatmin")


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """For a test that changes the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
