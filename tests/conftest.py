"""Settings of the whole test run: hypothesis draws the same examples every time, no test leaks its thread count, and
tests that this machine cannot run are left out and reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import requirements
from drawing import HYPOTHESIS

if HYPOTHESIS:
    from hypothesis import HealthCheck, Phase, settings

    settings.register_profile(
        "flatmin",
        deadline=None,  # a first call loads a library or compiles: its time says nothing
        derandomize=True,
        max_examples=40,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.register_profile("without shrinking", settings.get_profile("flatmin"), phases=(Phase.generate,))
    settings.load_profile("flatmin")


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """For a test that changes the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(restore_threads: None) -> None:
    """For small tensors: threads would only wait for each other, and for the other tests of a busy machine."""
    torch.set_num_threads(1)


# ---- parts that not every machine has ----

_left_out: Counter[str] = Counter()

FAILURE_CHARACTERS = 3000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nothing-left-out", action="store_true", help="fail where a part is missing that a test needs")


def pytest_configure(config: pytest.Config) -> None:
    if HYPOTHESIS and _for_a_gpu(config):  # it is lent for minutes: the first example that fails must do
        settings.load_profile("without shrinking")
    config.addinivalue_line("markers", "cuda(devices=1, gib=0): runs on so many GPUs, with so much memory")
    config.addinivalue_line("markers", "requires(part): needs a part that requirements.PARTS names")


def _for_a_gpu(config: pytest.Config) -> bool:
    return bool(config.option.markexpr == "cuda")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """``pytest -m cuda`` says at once why a test failed: what comes at the end is lost where the run is cut short."""
    report = yield
    reporter = item.config.pluginmanager.getplugin("terminalreporter")
    if report.failed and _for_a_gpu(item.config) and reporter is not None:
        reporter.write_line(f"\n{report.nodeid}\n{report.longreprtext[-FAILURE_CHARACTERS:]}")
    return report


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``pytest -m cuda`` opens only the modules that have such a test: a machine that is lent for its GPU may lack what
    the others import."""
    if not _for_a_gpu(config) or collection_path.suffix != ".py":
        return None
    return True if "mark.cuda" not in collection_path.read_text() else None


def _missing(item: pytest.Item) -> str | None:
    """The first part that a test needs and this machine has not."""
    gpu = item.get_closest_marker("cuda")
    if gpu is not None and (part := requirements.gpu_missing(**gpu.kwargs)):
        return part
    parts = [mark.args[0] for mark in item.iter_markers("requires")]
    return next((part for part in parts if not requirements.PARTS[part]), None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = {item: _missing(item) for item in items}
    _left_out.update(part for part in missing.values() if part is not None)
    config.hook.pytest_deselected(items=[item for item in items if missing[item] is not None])
    items[:] = [item for item in items if missing[item] is None]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # in a process of pytest-xdist: each of them collects all tests
        session.config.workeroutput["left_out"] = dict(_left_out)
    elif _left_out and session.config.option.nothing_left_out:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if found := getattr(node, "workeroutput", {}).get("left_out"):
        _left_out.clear()
        _left_out.update(found)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for part, count in sorted(_left_out.items()):
        terminalreporter.write_line(f"left out: {count} tests that need {part}")
