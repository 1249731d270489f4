"""tools/gpu_check.py, with parts made for the purpose: what it must do when something hangs, fails or is cut short."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"

pytestmark = pytest.mark.usefixtures("_tools")


@pytest.fixture
def _tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def run(tmp_path: Path, *parts: Any) -> tuple[bool, dict[str, Any]]:
    """Whether all is well, and the JSON."""
    import gpu_check

    target = tmp_path / "gpu.json"
    well = gpu_check.run_all(parts, {"machine": {"gpu": None}}, target)
    return well, json.loads(target.read_text())


def is_running(pid: int) -> bool:
    """A killed orphan may stay a zombie where nothing reaps it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    """The children too, which a signal to the part alone would leave behind; and Python says where it hung."""
    import gpu_check

    child = tmp_path / "child"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid))\n"
        "print('hanging')\n"
        "time.sleep(600)\n"
    )
    hangs = gpu_check.Part("hangs", "sleeps", 5.0, [python(code)], environment={"PYTHONFAULTHANDLER": "1"})
    after = gpu_check.Part("after", "prints", 60.0, [python("print('still here')")])
    start = time.monotonic()
    well, report = run(tmp_path, hangs, after)
    assert time.monotonic() - start < 60
    assert not well
    first, second = report["parts"]
    assert (first["status"], first["exit_status"]) == ("TIMED OUT", None)
    assert first["summary"].startswith("cut off after 5 s")
    assert "hanging" in first["tail"]
    assert "line 6 in <module>" in first["tail"]
    assert not is_running(int(child.read_text()))
    assert (second["status"], second["summary"]) == ("ok", "still here")


def test_the_steps_of_a_part_share_its_limit(tmp_path: Path) -> None:
    import gpu_check

    wait = python("import time; time.sleep(1.5)")
    _, report = run(tmp_path, gpu_check.Part("slow", "waits twice", 2.5, [wait, wait, python("print('never')")]))
    assert report["parts"][0]["status"] == "TIMED OUT"
    assert "never" not in report["parts"][0]["tail"].splitlines()


def test_a_part_that_fails_does_not_cost_the_others(tmp_path: Path) -> None:
    """Only what needs it is not run; nor are its own later steps."""
    import gpu_check

    fails = gpu_check.Part("fails", "exits", 60.0, [python("print('broken'); exit(3)"), python("print('later')")])
    needs = gpu_check.Part("needs", "builds on it", 60.0, [python("print('ran')")], needs=["fails"])
    missing = gpu_check.Part("missing", "no such program", 60.0, [["/nowhere/at-all"]])
    skipped = gpu_check.Part("skipped", "left out", 60.0, [python("print('ran')")], skip="not here")
    other = gpu_check.Part("other", "prints", 60.0, [python("print('well')")])
    well, report = run(tmp_path, fails, needs, missing, skipped, other)
    assert not well
    found = {part["part"]: (part["status"], part["summary"]) for part in report["parts"]}
    assert found["fails"] == ("FAILED", "broken")
    assert found["needs"] == ("not run", "needs fails")
    assert found["missing"][0] == "FAILED"
    assert "/nowhere/at-all" in found["missing"][1]
    assert found["skipped"] == ("skipped", "not here")
    assert found["other"] == ("ok", "well")
    assert report["parts"][0]["exit_status"] == 3


def test_all_is_well_where_parts_are_skipped(tmp_path: Path) -> None:
    import gpu_check

    well, _ = run(
        tmp_path,
        gpu_check.Part("well", "prints", 60.0, [python("print(1)")]),
        gpu_check.Part("skipped", "left out", 60.0, skip="not here"),
    )
    assert well


def test_the_json_has_everything_that_a_part_found(tmp_path: Path) -> None:
    """Also what a benchmark left of an earlier run is not taken for this one's."""
    import gpu_check

    left, stale = tmp_path / "left.json", tmp_path / "stale.json"
    stale.write_text('{"old": true}')
    leaves = gpu_check.Part(
        "leaves", "a JSON", 60.0, [python(f"open({str(left)!r}, 'w').write('{{\"ms\": 1.5}}'); print('x\\n' * 5000)")],
        result=left,
    )  # fmt: skip
    nothing = gpu_check.Part("nothing", "leaves none", 60.0, [python("print(2)")], result=stale)
    _, report = run(tmp_path, leaves, nothing)
    first, second = report["parts"]
    assert set(first) == {
        "part", "what", "status", "seconds", "limit_seconds", "note", "commands", "exit_status", "tail", "summary",
        "result",
    }  # fmt: skip
    assert first["result"] == {"ms": 1.5}
    assert len(first["tail"]) == gpu_check.TAIL
    assert (tmp_path / "gpu" / "leaves.log").read_text().count("x\n") == 5000
    assert "result" not in second


def test_a_run_that_is_ended_has_written_what_was_done(tmp_path: Path) -> None:
    """And leaves no part behind: the one that was running is killed."""
    script = (
        f"import sys; sys.path.insert(0, {str(TOOLS)!r})\n"
        "import signal; from pathlib import Path; import gpu_check as g\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "hangs = 'import os, time; print(os.getpid()); time.sleep(99)'\n"
        "parts = [g.Part('first', 'prints', 60.0, [[sys.executable, '-c', 'print(1)']]),\n"
        "         g.Part('second', 'hangs', 99.0, [[sys.executable, '-uc', hangs]]),\n"
        "         g.Part('third', 'prints', 60.0, [[sys.executable, '-c', 'print(3)']])]\n"
        f"g.run_all(parts, {{}}, Path({str(tmp_path / 'gpu.json')!r}))\n"
    )
    log = tmp_path / "gpu" / "second.log"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) > 1):
        assert time.monotonic() < until
        time.sleep(0.05)
    first = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [part["status"] for part in first] == ["ok"]  # written before the second one began
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [(part["part"], part["status"]) for part in parts] == [("first", "ok"), ("second", "FAILED")]
    assert not is_running(int(log.read_text().splitlines()[1]))


def test_a_benchmark_is_summed_up_by_its_figures() -> None:
    """Read as benchmarks/timing.py prints them."""
    import gpu_check

    said = (
        "  time over the limit: 0.97 (at most 1.10; one run: no spread): met\n"
        "  pacgen: time over reading: 2.34 (at most 2.00; 2.30 to 2.35 in 3 runs): missed\n"
        "  noise: time over copy: 2.01 (at most 2.00; 1.90 to 2.05 in 3 runs): within the spread\n"
    )
    expected = "1 of 3 figures met; pacgen: time over reading: missed; noise: time over copy: within the spread"
    assert gpu_check.verdicts(said) == expected
    assert gpu_check.verdicts("Traceback\nRuntimeError: no\n") == "RuntimeError: no"


# ---- the real parts ----


@pytest.fixture
def found() -> dict[str, Any]:
    return {"gpu": "NVIDIA H100", "capability": [9, 0], "torch": "2.11.0", "nvcc": "V13.0.88"}


def test_a_run_takes_eight_minutes_at_most(found: dict[str, Any], tmp_path: Path) -> None:
    import gpu_check

    parts = gpu_check.parts_of(found, tmp_path / "build", tmp_path, dry=False)
    limits = sum(part.limit for part in parts) + gpu_check.TORCH_LIMIT + gpu_check.NVCC_LIMIT
    assert limits <= gpu_check.TOTAL_SECONDS == 8 * 60


def test_a_gpu_gets_code_for_itself_alone(found: dict[str, Any], tmp_path: Path) -> None:
    """And every part but the build runs on what the build put together."""
    import gpu_check

    build, *others = gpu_check.parts_of(found, tmp_path / "build", tmp_path, dry=False)
    assert "-DFM_CUDA_ARCHITECTURES=90-real" in build.steps[1]
    assert all(part.needs == ["build"] for part in others)
    assert all(part.environment["PYTHONPATH"].startswith(str(ROOT / "build" / "gpu" / "site")) for part in others)
    assert {part.name for part in others} == {
        "selftest", "tests", "kernels", "memcheck", "racecheck", "sam_step", "noise_step"
    }  # fmt: skip


def test_without_a_gpu_the_message_names_the_dry_run() -> None:
    command = [sys.executable, str(TOOLS / "gpu_check.py")]
    done = subprocess.run(
        command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


def test_an_operator_that_is_not_called_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The list is the library's: an operator that somebody adds and every_kernel.py does not call is named."""
    import every_kernel

    from flatmin.ops import _library

    added = dict(_library.OPERATORS) | {"brand_new_": lambda *args: None}
    monkeypatch.setattr(_library, "OPERATORS", added)
    monkeypatch.setattr(sys, "argv", ["every_kernel.py"])
    assert every_kernel.main() == 1
    said = capsys.readouterr()
    assert f"{len(added) - 1} of {len(added)} operators called on cpu" in said.out
    assert said.err.splitlines() == ["operator brand_new_ is not called; add it to every_kernel.py"]


def test_kernels_are_known_by_the_names_of_library_and_profile(tmp_path: Path) -> None:
    """As nvcc 13 mangles them, and as a profile has them in the words of the source."""
    import every_kernel

    mangled = ["_Z16fm_update_kernelIL9fm_update6EEv14fm_cuda_launch", "_Z16fm_reduce_kernelILi2EEv14fm_cuda_launch"]
    mangled += [
        "_Z14fm_fold_kernelPK6fm_sumlPS_i9fm_finishdPd",
        "_Z19fm_fold_rows_kernel14fm_cuda_launchi9fm_finishiPd",
    ]
    mangled += [
        "_Z22fm_plain_update_kernelIL9fm_update13EEv14fm_cuda_launch",
        "_Z13fm_dot_kernelILi4EEv14fm_cuda_launchl",
    ]
    library = tmp_path / "library"
    library.write_bytes(b"\0".join(name.encode() for name in mangled))
    profile = ["void fm_update_kernel<(fm_update)6>(fm_cuda_launch)", "void fm_reduce_kernel<2>(fm_cuda_launch)"]
    profile += ["fm_fold_kernel(fm_sum const*, long, fm_sum*, int, fm_finish, double, double*)"]
    profile += ["fm_fold_rows_kernel(fm_cuda_launch, int, fm_finish, int, double*)"]
    profile += [
        "void fm_plain_update_kernel<(fm_update)13>(fm_cuda_launch)",
        "void fm_dot_kernel<4>(fm_cuda_launch, long)",
    ]
    profile += ["void at::native::vectorized_elementwise_kernel<4>(int)"]
    found = every_kernel.kernels_of(library)
    assert found == {
        ("update", 6),
        ("reduce", 2),
        ("fold", None),
        ("fold_rows", None),
        ("plain_update", 13),
        ("dot", 4),
    }
    assert every_kernel.launched(profile) == found
