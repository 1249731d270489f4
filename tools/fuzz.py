"""Random calls of every raw operator, good and bad ones, on a library built with AddressSanitizer and UBSan.

    make fuzz                                   # builds that library, then a million calls
    make fuzz CALLS=20000 ARGS="--seed 7"       # fewer, others
    make fuzz CALLS=1 ARGS="--seed 123"         # one call again, with its arguments

No call may make a sanitizer speak, crash, or keep hold of a tensor; a good one must be taken, one that is refused must
have written nothing, and one that is taken only what its schema says (tests/support/raw_calls.py). Every call is a
function of its seed: seeds follow on one another, and a failing one is printed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import mmap
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: What the worker says of itself: the seed of the call that it is in, and how many were refused.
_STATE = struct.Struct("qq")
_SHOWN = 5  # faults that are printed whole
_LONGEST_S = 120.0  # a call that takes longer hangs


def worker(first: int, count: int, state: Path, report: Path) -> int:
    """The calls themselves, in a process that a fault may end."""
    import torch

    from raw_calls import RawCall, check, describe

    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(2)
    refused, faults, operators = 0, [], Counter[str]()
    with state.open("r+b") as file, mmap.mmap(file.fileno(), _STATE.size) as shared:
        for seed in range(first, first + count):
            _STATE.pack_into(shared, 0, seed, refused)
            call = RawCall(seed)
            if count == 1:
                print(describe(call), flush=True)
            verdict = check(call)
            operators[call.operator] += 1
            refused += verdict.refusal is not None
            if count == 1:
                print(verdict.refusal or "accepted")
            if verdict.fault is not None:
                faults.append(f"{verdict.fault}\n{describe(RawCall(seed))}")
                if len(faults) == 100:
                    break
        _STATE.pack_into(shared, 0, first + sum(operators.values()), refused)
    report.write_text(json.dumps({"refused": refused, "faults": faults, "operators": operators}))
    return 0


def environment(library: Path, folder: Path) -> dict[str, str]:
    """flatmin with the sanitized library in ``folder``, and what its sanitizers need from the process."""
    shutil.copytree(ROOT / "python/flatmin", folder / "flatmin", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (folder / "flatmin/_C.so").symlink_to(library)
    # libstdc++ too: AddressSanitizer looks for what throws torch's errors when the process starts
    names = ("libasan.so", "libstdc++.so.6")
    found = [subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in names]
    return os.environ | {
        "LD_PRELOAD": " ".join(found),
        # what torch asks for in vain is an error of Python, and its caches are no leak; small quarantine: many calls
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=32:malloc_context_size=8",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT / "tests/support")]),
        "PYTHONWARNINGS": "ignore",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=ROOT / "build/tests/tests/c/_C.so", help="the sanitized _C.so")
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.seed, arguments.calls, *arguments.worker)
    if not arguments.library.exists():
        parser.error(f"--library: there is no {arguments.library}; `make fuzz` builds it")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state, report, errors = folder / "state", folder / "report", folder / "errors"
        state.write_bytes(_STATE.pack(arguments.seed, 0))
        command = [sys.executable, __file__, "--worker", str(state), str(report)]
        command += ["--seed", str(arguments.seed), "--calls", str(arguments.calls)]
        begin = time.monotonic()
        with errors.open("wb") as log:
            process = subprocess.Popen(command, env=environment(arguments.library.resolve(), folder), stderr=log)
            try:
                show(process, state, arguments.seed, arguments.calls)
            finally:
                process.kill()
        seconds = time.monotonic() - begin
        seed, refused = _STATE.unpack(state.read_bytes())
        if process.returncode != 0 or not report.exists():
            print(errors.read_text(errors="replace")[-8000:])
            print(f"exit status {process.returncode} in the call of seed {seed}: {replay(seed)}")
            return 1
        found = json.loads(report.read_text())
    calls = sum(found["operators"].values())
    for fault in found["faults"][:_SHOWN]:
        print(fault)
    shares = [count / calls for count in found["operators"].values()]
    print(
        f"{calls} calls of {len(shares)} operators from seed {arguments.seed} on (each {min(shares):.1%} to "
        f"{max(shares):.1%} of them), {refused / calls:.1%} refused, {len(found['faults'])} faults, {seconds:.0f} s on "
        f"{platform.machine()}, {os.cpu_count()} cores"
    )
    return 1 if found["faults"] else 0


def replay(seed: int) -> str:
    return f'make fuzz CALLS=1 ARGS="--seed {seed}"'


def show(process: subprocess.Popen[bytes], state: Path, first: int, count: int) -> None:
    """A bar until the process ends."""
    from tqdm import tqdm

    moved = time.monotonic()
    with tqdm(total=count, unit=" calls", mininterval=1.0, disable=count == 1) as bar:
        while process.poll() is None:
            time.sleep(0.2)
            done = _STATE.unpack(state.read_bytes())[0] - first - bar.n
            bar.update(done)
            moved = time.monotonic() if done else moved
            if bar.n and time.monotonic() - moved > _LONGEST_S:  # importing torch under the sanitizer is no call
                process.send_signal(signal.SIGUSR1)  # where it is
                time.sleep(1.0)
                process.kill()
                process.wait()


if __name__ == "__main__":
    raise SystemExit(main())
