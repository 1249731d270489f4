"""Everything that flatmin promises on a GPU, checked within eight minutes on a machine that may have no network.

    make gpu                      # with the python that is there: PYTHON=python3
    make gpu ARGS=--dry-run       # without a GPU: walks every part as far as it goes, and says what it left out

Nothing is installed and nothing downloaded. A compiled copy of the package is put together in build/gpu and every part
runs on it, one after another, each in a process group of its own that is killed as a whole when its time is up. What a
part finds is in out/gpu.json as soon as it ends, and its output in out/gpu/PART.log, so that a run that is cut short
loses nothing of what was done. What is needed: torch built with CUDA, nvcc, cmake, ninja, pytest, numpy and tqdm. Where
compute-sanitizer is missing its two parts are skipped; where hypothesis is, the tests that draw their inputs are.

Exit status: 0, or 1 if a part failed or was cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TAIL = 4000  # characters of a part's output that go into the JSON
GRACE_SECONDS = 2.0  # for Python to print where it was, between the abort and the kill
CHILDREN_SECONDS = 0.5  # the same for the processes that it started
TOTAL_SECONDS = 480  # of all limits: the questions to torch and nvcc, and the parts
TORCH_LIMIT, NVCC_LIMIT = 30, 5
REHEARSAL_PATIENCE = 4  # times the limits: nobody waits for the machine of a dry run, and it may have two cores
REHEARSED_ARCHITECTURE = "90-real"  # an H100's

OK, FAILED, TIMED_OUT, SKIPPED, NOT_RUN = "ok", "FAILED", "TIMED OUT", "skipped", "not run"

#: Asked of torch in a process of its own: this script has the standard library alone.
ASK_TORCH = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None}
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    found["gpu"] = properties.name
    found["capability"] = list(torch.cuda.get_device_capability(0))
    found["multiprocessors"] = properties.multi_processor_count
    found["gib"] = round(properties.total_memory / 2**30, 1)
print(json.dumps(found))
"""


# ---- a part, and how it is run ----


@dataclass
class Part:
    """One check. ``steps`` run one after another until one fails; all of them together have ``limit`` seconds."""

    name: str
    what: str
    limit: float
    steps: Sequence[Sequence[str]] = ()
    skip: str = ""  # why it is not run, if so
    note: str = ""  # what a dry run leaves out of it
    environment: dict[str, str] = field(default_factory=dict)
    needs: Sequence[str] = ()  # parts without which it makes no sense
    accepted: Sequence[int] = (0,)
    summary: Callable[[str], str] = lambda output: last_line(output)
    success: str = ""  # what to say instead if all is well
    result: Path | None = None  # JSON that it leaves


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def line_with(*words: str) -> Callable[[str], str]:
    """The last line that has one of the words, else the last line of all."""

    def find(output: str) -> str:
        lines = [line for line in output.splitlines() if any(word in line for word in words)]
        return last_line("\n".join(lines) if lines else output).strip("= ")

    return find


def verdicts(output: str) -> str:
    """How many of a benchmark's figures are met, and the others by name."""
    judged = re.findall(r"^  (.+?): [\d.]+ \(at most .*\): (met|missed|within the spread)$", output, re.MULTILINE)
    others = [f"{what}: {verdict}" for what, verdict in judged if verdict != "met"]
    met = f"{len(judged) - len(others)} of {len(judged)} figures met"
    return "; ".join([met, *others]) if judged else last_line(output)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a whole process group. Python first says where it was: PYTHONFAULTHANDLER makes the abort a traceback. The
    part itself goes before those that it started, so that its traceback is in one piece."""
    if process.poll() is None:
        process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGABRT)
        time.sleep(CHILDREN_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_step(command: Sequence[str], environment: dict[str, str], log: Path, until: float) -> int | None:
    """Exit status, or None if time was up. Output is appended to the log and shown while it comes."""
    with log.open("ab") as output, log.open("rb") as shown:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # a group, not a session: whoever ends this script's session ends it too
        )  # fmt: skip
        shown.seek(0, os.SEEK_END)
        try:
            while process.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
                show(shown.read())
            status = process.poll()
        finally:  # also what the step left behind, and after Ctrl-C
            stop(process)
        show(shown.read())
    return status


def show(output: bytes) -> None:
    sys.stdout.write(output.decode(errors="replace").replace("\r", "\n"))
    sys.stdout.flush()


def run_part(part: Part, done: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Everything about a part, as it goes into the JSON."""
    entry: dict[str, Any] = {"part": part.name, "what": part.what, "status": SKIPPED, "seconds": 0.0}
    entry |= {"limit_seconds": part.limit, "note": part.note, "commands": [list(step) for step in part.steps]}
    failed = {each["part"] for each in done if each["status"] not in (OK, SKIPPED)}
    if missing := [name for name in part.needs if name in failed]:
        return entry | {"status": NOT_RUN, "summary": f"needs {', '.join(missing)}"}
    if part.skip:
        return entry | {"summary": part.skip}
    log = folder / f"{part.name}.log"
    log.write_bytes(b"")
    if part.result is not None:
        part.result.unlink(missing_ok=True)
    start, code = time.monotonic(), None
    for step in part.steps:
        try:
            code = run_step(step, os.environ | part.environment, log, start + part.limit)
        except OSError as error:  # the program is not there
            code = 127
            show(f"{error}\n".encode())
            with log.open("a") as output:
                output.write(f"{error}\n")
        if code not in part.accepted:
            break
    said = log.read_text(errors="replace").replace("\r", "\n")
    entry |= {"seconds": round(time.monotonic() - start, 1), "exit_status": code, "tail": said[-TAIL:]}
    if code is None:
        entry |= {"status": TIMED_OUT, "summary": f"cut off after {part.limit:.0f} s: {last_line(said)}"}
    elif code in part.accepted:
        entry |= {"status": OK, "summary": part.success or part.summary(said)}
    else:
        entry |= {"status": FAILED, "summary": part.summary(said)}
    if part.result is not None and part.result.exists():
        entry["result"] = json.loads(part.result.read_text())
    return entry


def run_all(parts: Sequence[Part], report: dict[str, Any], target: Path) -> bool:
    """Run the parts in order, and write the JSON after each. Whether all of them are well."""
    folder = target.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    done: list[dict[str, Any]] = report.setdefault("parts", [])
    for number, part in enumerate(parts, 1):
        print(f"\n== {number} of {len(parts)}: {part.name}: {part.what} (at most {part.limit:.0f} s)", flush=True)
        try:
            entry = run_part(part, done, folder)
        except KeyboardInterrupt:
            entry = {"part": part.name, "what": part.what, "status": FAILED, "seconds": 0.0, "summary": "interrupted"}
            done.append(entry)
            write(report, target)
            break
        done.append(entry)
        write(report, target)
        print(f"== {part.name}: {entry['status']}: {entry['summary']}", flush=True)
    return len(done) == len(parts) and all(entry["status"] in (OK, SKIPPED) for entry in done)


def write(report: dict[str, Any], target: Path) -> None:
    """In one move: a kill between two parts leaves the whole of the former."""
    beside = target.with_suffix(".part")
    beside.write_text(json.dumps(report, indent=2) + "\n")
    beside.replace(target)


# ---- what there is ----


def tool(name: str) -> str:
    """A program from beside this Python, from PATH or from beside nvcc; its bare name where there is none."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    folders = [Path(sys.executable).parent, *map(Path, os.get_exec_path())]
    folders += [Path(nvcc).resolve().parent] if nvcc else []
    return next((found for folder in folders if (found := shutil.which(name, path=str(folder)))), name)


def machine() -> dict[str, Any]:
    """Torch, GPU and nvcc; ``gpu`` is None without one."""
    try:
        asked = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, timeout=TORCH_LIMIT)
    except subprocess.TimeoutExpired:
        return {"gpu": None, "error": f"torch did not answer within {TORCH_LIMIT} s"}
    if asked.returncode != 0:
        return {"gpu": None, "error": last_line(asked.stderr)}
    found: dict[str, Any] = json.loads(last_line(asked.stdout))
    try:
        version = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True, timeout=NVCC_LIMIT).stdout
    except (OSError, subprocess.TimeoutExpired):
        version = ""
    release = re.search(r"release [\d.]+, (V[\d.]+)", version)
    return found | {"nvcc": release.group(1) if release else None, "python": sys.version.split()[0]}


# ---- the parts ----


def build_part(found: dict[str, Any], build: Path, package: Path, limit: float) -> Part:
    """As setup.py builds, but in a folder that is kept, and without pip: its release here may be an old one."""
    major, minor = found.get("capability") or (None, None)
    architecture = REHEARSED_ARCHITECTURE if major is None else f"{major}{minor}-real"
    cmake = tool("cmake")
    configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    copy = (
        "import shutil, sys; shutil.rmtree(sys.argv[2], ignore_errors=True); shutil.copytree(*sys.argv[1:], "
        "ignore=shutil.ignore_patterns('*.so', '__pycache__'))"
    )
    steps = [
        [sys.executable, "-c", copy, str(ROOT / "python" / "flatmin"), str(package)],
        [*configure, f"-DFM_CUDA_ARCHITECTURES={architecture}"],
        [cmake, "--build", str(build)],
        [cmake, "--install", str(build), "--prefix", str(package)],
    ]
    kind = f"the GPU's sm_{architecture.removesuffix('-real')}" if major else f"{architecture}, for want of a GPU"
    with_nvcc = f"nvcc {found['nvcc']}, {kind}" if found.get("nvcc") else "nvcc is not there: the CPU library alone"
    return Part("build", f"compile for {kind}", limit, steps, summary=line_with("rror", "FAILED"), success=with_nvcc)


def sanitizer_part(tool_name: str, calls: Sequence[str], limit: float, common: dict[str, Any], dry: bool) -> Part:
    """Over every kernel, with each tensor in an allocation of its own: a cache would hide what lies beyond it."""
    sanitizer = [tool("compute-sanitizer"), "--tool", tool_name, "--report-api-errors", "no", "--error-exitcode", "9"]
    sanitizer += ["--kernel-regex", "kns=fm_", *calls, "--device", "cuda"]
    found = shutil.which(sanitizer[0]) is not None
    return Part(
        tool_name,
        f"compute-sanitizer's {tool_name} over one call of every kernel",
        limit,
        [[*calls]] if dry else [sanitizer],
        skip="" if found or dry else "compute-sanitizer is not there",
        note="on the CPU, without compute-sanitizer" if dry else "",
        summary=line_with("SUMMARY") if not dry else last_line,
        **common | {"environment": common["environment"] | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}},
    )


def parts_of(found: dict[str, Any], build: Path, folder: Path, dry: bool) -> list[Part]:
    """All parts. The limits of a run on a GPU, with the question what machine it is, add up to ``TOTAL_SECONDS``."""
    site = ROOT / "build" / "gpu" / "site"
    package, python = site / "flatmin", sys.executable
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    common: dict[str, Any] = {"environment": environment, "needs": ["build"]}
    tests = [python, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider"]
    tests += ["--ignore", "tests/benchmarks"]  # the benchmarks have parts of their own
    calls = [python, str(ROOT / "tools" / "every_kernel.py")]
    benchmarks, sam, noise = ROOT / "benchmarks", folder / "sam_step.json", folder / "noise_step.json"
    on_device = ["--quick"] if dry else ["--device", "cuda", "--rounds", "10", "--runs", "1"]
    on_cpu = "on the CPU, with MNIST's shapes" if dry else ""
    return [
        build_part(found, build, package, 110),
        Part(
            "selftest",
            "python -m flatmin: every operator against the reference",
            15,
            [[python, "-m", "flatmin"]],
            **common,
        ),
        Part(
            "tests",
            "pytest -m cuda: bits, no waiting, graphs, streams, memory, mixed precision",
            90,
            [[*tests, "-q", "--collect-only"]] if dry else [[*tests, "-v", "--durations", "5"]],
            accepted=(0, 5) if dry else (0,),  # 5: all were left out
            note="collected only" if dry else "",
            summary=line_with("tests that need a GPU") if dry else line_with(" passed", " failed", " error"),
            **common,
        ),
        Part(
            "kernels",
            "one call of every operator launches every kernel",
            15,
            [calls if dry else [*calls, "--device", "cuda", "--launched"]],
            note="on the CPU, where no kernel is launched" if dry else "",
            summary=line_with("kernels launched", "operators called"),
            **common,
        ),
        sanitizer_part("memcheck", calls, 25, common, dry),
        sanitizer_part("racecheck", calls, 25, common, dry),
        Part(
            "sam_step",
            "benchmarks/sam_step.py, each time beside the model's",
            125,
            [[python, str(benchmarks / "sam_step.py"), *on_device, "--no-compile", "--json", str(sam)]],
            note=on_cpu,
            summary=verdicts,
            result=sam,
            **common,
        ),
        Part(
            "noise_step",
            "benchmarks/noise_step.py, each time beside the model's",
            40,
            [[python, str(benchmarks / "noise_step.py"), *on_device, "--json", str(noise)]],
            note=on_cpu,
            summary=verdicts,
            result=noise,
            **common,
        ),
    ]


# ---- tables ----


def figures(parts: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, float, float | None]]:
    """(shapes, row, ms, ms by the model) of every benchmark."""
    for part in parts:
        result = part.get("result", {})
        if part["part"] == "sam_step":
            for name, each in result.get("shapes", {}).items():
                for row, values in each["rows"].items():
                    yield name, row, values["median_ms"], values["model_ms"]
        elif part["part"] == "noise_step":
            for row, value in result.get("median_ms", {}).items():
                yield result["shapes"], row, value, result["model_ms"].get(row)


def targets(parts: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(shapes, what was required and reached) of every benchmark."""
    for part in parts:
        result = part.get("result", {})
        if part["part"] == "sam_step":
            for name, each in result.get("shapes", {}).items():
                yield from ((name, target) for target in each["targets"])
        elif part["part"] == "noise_step":
            yield from ((result["shapes"], target) for target in result.get("targets", []))


def print_tables(report: dict[str, Any], target: Path) -> None:
    parts = report["parts"]
    measured = list(figures(parts))
    if measured:
        print(f"\n{'shapes':16} {'row':36} {'ms':>9} {'model':>9} {'ratio':>6}")
        for name, row, ms, model in measured:
            beside = "" if model is None else f"{model:9.3f} {ms / model:6.2f}"
            print(f"{name:16} {row:36} {ms:9.3f} {beside}".rstrip())
        print()
        for name, each in targets(parts):
            print(
                f"{name:16} {each['what']}: {each['measured']:.2f}, at most {each['required']:.2f}: {each['verdict']}"
            )
    print(
        f"\n{report['machine'].get('gpu') or 'no GPU'}, torch {report['machine'].get('torch')}; all of it in {target}"
    )
    print(f"{'part':12} {'status':10} {'seconds':>8}  what")
    for part in parts:
        note = f" [{part['note']}]" if part.get("note") else ""
        print(f"{part['part']:12} {part['status']:10} {part['seconds']:8.1f}  {part['summary'][:140]}{note}")


# ---- command line ----


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build flatmin for the GPU that is here and check it, in 8 minutes.")
    parser.add_argument("--dry-run", action="store_true", help="walk every part as far as it goes without a GPU")
    parser.add_argument(
        "--build", type=Path, default=ROOT / "build" / "gpu", metavar="FOLDER",
        help="CMake's folder; what it has compiled already is not compiled again (default build/gpu)",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="PART", help="run only these parts")
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "gpu.json", metavar="PATH")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    print("asking torch for a GPU ...", flush=True)
    start, found = time.monotonic(), machine()
    print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    if found["gpu"] is None and not args.dry_run:
        parser.error(f"{found.get('error') or 'torch finds no GPU'}; `make gpu ARGS=--dry-run` rehearses without one")
    target = args.json.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    parts = parts_of(found, args.build.resolve(), target.with_suffix(""), args.dry_run)
    if args.dry_run:
        parts = [replace(part, limit=REHEARSAL_PATIENCE * part.limit) for part in parts]
    if args.only:
        if unknown := set(args.only) - {part.name for part in parts}:
            parser.error(
                f"--only: {', '.join(sorted(unknown))}: no such part; there are {', '.join(p.name for p in parts)}"
            )
        parts = [part for part in parts if part.name in args.only]
    report: dict[str, Any] = {"machine": found, "dry_run": args.dry_run}
    well = run_all(parts, report, target)
    report["seconds"] = round(time.monotonic() - start, 1)
    write(report, target)
    print_tables(report, target)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
