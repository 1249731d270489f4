"""The CUDA build as far as it shows without a GPU: what nvcc makes of the kernels, and what is in the library.

test_build.py holds what this library has in common with the CPU's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import requirements
from flatmin.ops import _library
from operator_arguments import SHAPE, Arguments, call, good
from requirements import CUDA_LIBRARY

ROOT = Path(__file__).resolve().parents[2]
FORMULAS, RANDOM = ROOT / "csrc/math/fm_formulas.h", ROOT / "csrc/math/fm_random.h"
UPDATE_TABLE = ROOT / "csrc/math/updates.h"

#: A released wheel: code for each of these, and PTX for what is not named. sm_80 serves 86 and 89.
RELEASED = "75-real 80-real 90-real 100 120-real"


def update_names() -> list[str]:
    """The rows of the table in its order, a base step as two: ``sgd`` for restore_sgd, ``noise`` for scaled_noise."""
    text = UPDATE_TABLE.read_text()
    table = text[text.index("#define FM_UPDATES(X)") : text.index("typedef enum fm_update")]
    rows, bases = table.split("#define FM_BASE_STEPS")
    steps = re.findall(r"FM_BASE_STEP\(X, FM_\w+, (\w+)", bases)
    before, after = (re.findall(r"X\(FM_\w+, (\w+)", part) for part in rows.split("FM_BASE_STEPS(X)"))
    names = [*before, *(name + suffix for name in steps for suffix in ("", "_curvature")), *after]
    return [re.sub("^(restore|scaled)_", "", name) for name in names]


#: What the number after a kernel template's name means: the enums fm_update and FM_TERM_* in csrc/math.
UPDATES = update_names()
TERMS = ("square", "magnitude", "power", "largest", "ties", "pacgen")

#: Of rows that are nothing but aligned float32 (cuda/plain.cuh): what every list of ordinary training runs.
PLAIN = {
    "plain ascend": 64,  # 4 blocks of 256 threads; needs 40
    "plain save": 40,  # 6 of 256; 28 on sm_90, up to 36 elsewhere
    "plain restore": 40,  # 6 of 256; 28 on sm_90, up to 36 elsewhere
    "plain axpy": 64,  # 4 of 256; 40
    "plain blend": 64,  # 4 of 256; 48
    "plain sgd": 64,  # 4 of 256; 56
    "plain adam": 80,  # 3 of 256; 72
    "plain sgd_curvature": 128,  # 4 of 128; 92
    "plain adam_curvature": 128,  # 4 of 128; 122
    "plain lion": 64,  # 4 of 256; 56
    "plain lion_curvature": 128,  # 4 of 128; 92
    "plain noise": 128,  # 4 of 128; 115
    "plain average": 80,  # 6 of 128; 80
    "plain probe": 64,  # 4 of 256; 55
    "plain square": 64,  # 8 of 128; 51
    "plain magnitude": 64,  # 8 of 128; 51
    "plain power": 80,  # 6 of 128; 76
    "plain largest": 64,  # 8 of 128; 51
    "plain ties": 64,  # 8 of 128; 51
    "plain pacgen": 128,  # 4 of 128; 120
    "plain dot_2": 96,  # 5 of 128; 94
    "plain dot_3": 128,  # 4 of 128; 96 on sm_90, up to 106 elsewhere
    "plain dot_4": 128,  # 4 of 128; 108
}

#: Registers a thread at most. An SM has 65,536 and hands them out by 8: one more than this and a block less fits on it.
#: Resident blocks are what hides the latency of memory. A thread has 32 bytes of each float32 operand under way, and an
#: H100 needs 18 KB an SM (3.35 TB/s / 132 SMs x 700 ns): SGD with three loads has 48 KB in its 2 blocks of 256 threads,
#: Adam 32 KB in one, the norm 16 KB in 4 blocks of 128.
REGISTERS = {
    "ascend": 128,  # 2 blocks of 256 threads; needs 94
    "save": 80,  # 3 of 256; 72
    "restore": 80,  # 3 of 256; 70
    "axpy": 128,  # 2 of 256; 90
    "blend": 128,  # 2 of 256; 90
    "sgd": 128,  # 2 of 256; 88
    "adam": 168,  # 1 of 256, as for anything above 128; 132
    "sgd_curvature": 168,  # 3 of 128; 156
    "adam_curvature": 255,  # 2 of 128; 246
    "lion": 128,  # 2 of 256; 102
    "lion_curvature": 168,  # 3 of 128; 160
    "noise": 168,  # 3 of 128; 148
    "average": 168,  # 3 of 128; 128
    "probe": 80,  # 3 of 256; 64
    "square": 128,  # 4 of 128; 126
    "magnitude": 128,  # 4 of 128; 94
    "power": 128,  # 4 of 128; 98
    "largest": 128,  # 4 of 128; 94
    "ties": 128,  # 4 of 128; 96
    "pacgen": 168,  # 3 of 128; 162
    "dot_2": 128,  # 4 of 128; 126
    "dot_3": 168,  # 3 of 128; 152
    "dot_4": 168,  # 3 of 128; 166
    "fold": 64,  # 2 of 512; 32
    "fold_rows": 64,  # 2 of 512; 30
    "corrupt_labels": 56,  # 4 of 256, all the threads that sm_75 has; 54 there, 36 at most elsewhere
    "draw_samples": 48,  # 5 of 256; 28 on sm_90, up to 41 elsewhere
} | PLAIN


def kernel_name(symbol: str) -> str:
    """``ascend`` for _Z16fm_update_kernelIL9fm_update0EEv14fm_cuda_launch."""
    plain, kind, which = re.search(r"fm_(plain_)?(\w+?)_kernel(?:I\w*?(\d+)EE)?", symbol).groups()  # type: ignore[union-attr]
    names: dict[str, Sequence[str]] = {"update": UPDATES, "reduce": TERMS}
    name = f"dot_{which}" if kind == "dot" else names[kind][int(which)] if kind in names else kind
    return f"plain {name}" if plain else name


# ---- what nvcc makes of the source ----


def ptx_of(name: str, architecture: int, folder: Path) -> str:
    """PTX of a source with the flags that CMakeLists.txt gives."""
    flags = re.search(r"COMPILE_LANGUAGE:CUDA>:(--threads[^>]*)>", (ROOT / "CMakeLists.txt").read_text())
    assert flags is not None
    includes = [f"-I{ROOT / name}" for name in ("csrc/math", "csrc/core", "cuda")]
    command = [requirements.NVCC or "nvcc", "-ptx", f"-arch=compute_{architecture}", "-std=c++17", "-O3", *includes]
    source, out = ROOT / "cuda" / f"{name}.cu", folder / f"{name}.{architecture}.ptx"
    run = subprocess.run(
        [*command, *flags.group(1).split(), "-o", out, source], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return out.read_text()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """PTX by kernel, for sm_90. What ptxas makes of it is asked of the shipped library below."""
    folder = tmp_path_factory.mktemp("ptx")
    entries = {}
    for name in ("reductions", "updates", "base_steps", "labels"):
        ptx = ptx_of(name, 90, folder)
        parts = re.split(r"^\.(?:visible|weak) \.entry ", ptx, flags=re.MULTILINE)[1:]
        entries |= {kernel_name(entry): entry for entry in parts}
    return entries


def inexact(ptx: str) -> list[str]:
    """Instructions whose result another device, or another release of nvcc, may give in other bits.

    Without ``.rn`` an addition or multiplication may be contracted; ``.ftz`` loses subnormals; ``.approx`` and
    ``.full`` are off by some units in the last place, and ``ex2``, ``lg2``, ``sin``, ``cos``, ``tanh`` and ``rsqrt``
    come in no other form.
    """
    contractible = r"\b(?:add|sub|mul|div|sqrt|fma|mad|rcp)(?!\.rn)(?:\.\w+)*\.f(?:16|32|64)\b.*"
    approximate = r"\b\w+(?:\.\w+)*\.(?:ftz|approx|full)\b.*|\b(?:ex2|lg2|sin|cos|tanh|rsqrt)\..*"
    return re.findall(rf"{contractible}|{approximate}", ptx)


def disallowed(ptx: str) -> list[str]:
    """Local memory, where a spilled register or an array goes, and atomics, whose order is not fixed."""
    return re.findall(r"(?:\w+)?\.local\b.*|\b(?:atom|red)\..*", ptx)


@pytest.mark.parametrize(
    "line",
    [
        "add.f32 %f1, %f2, %f3;",
        "fma.rz.f64 %fd1, %fd2, %fd3, %fd4;",
        "mul.rn.ftz.f32 %f1, %f2, %f3;",
        "div.approx.f32 %f1, %f2, %f3;",
        "div.full.f32 %f1, %f2, %f3;",
        "sqrt.approx.ftz.f32 %f1, %f2;",
        "lg2.approx.f32 %f1, %f2;",
    ],
)
def test_the_lint_finds_inexact_instructions(line: str) -> None:
    assert inexact(f"mov.u32 %r1, %r2;\n{line}\nadd.rn.f32 %f4, %f5, %f6;") == [line]


@pytest.mark.parametrize(
    "line", ["st.local.u32 [%rd1], %r1;", ".local .align 8 .b8 depot[64];", "red.global.add.f64 x;"]
)
def test_the_lint_finds_local_memory_and_atomics(line: str) -> None:
    assert disallowed(f"st.global.u32 [%rd1], %r1;\n{line}\nld.param.u32 %r1, [x];") == [line]


@pytest.mark.requires("nvcc")
def test_every_kernel_of_the_ptx_is_known(compiled: dict[str, str]) -> None:
    assert set(compiled) == set(REGISTERS)


@pytest.mark.requires("nvcc")
@pytest.mark.parametrize("kernel", REGISTERS)
def test_ptx_rounds_as_the_source_says(compiled: dict[str, str], kernel: str) -> None:
    ptx = compiled[kernel]
    assert inexact(ptx) == []
    assert disallowed(ptx) == []


def stated_fmas(*rules: str) -> int:
    """FM_FMA in the formulas of one type whose names begin with fm_<rule>."""
    functions = re.findall(r"^FM_HD .*?^}", FORMULAS.read_text(), re.MULTILINE | re.DOTALL)
    return sum(f.count("FM_FMA") for f in functions for rule in rules if f"FM_NAME(fm_{rule}" in f.splitlines()[0])


def drawing_fmas(*functions: str) -> int:
    """fmaf in functions of fm_random.h, which are float for either type."""
    bodies = re.findall(r"^FM_HD .*?^}", RANDOM.read_text(), re.MULTILINE | re.DOTALL)
    return sum(body.count("fmaf(") for body in bodies for name in functions if f" {name}(" in body.splitlines()[0])


#: Formulas behind each update: SGD states four (decay, buffer, Nesterov, step), Adam three (decay and both moments), an
#: average three (itself, its quotient, the quotient's average), noise three (neighbourhood, curvature, sum), Lion three
#: (both averages and the step), axpy one and blend that one twice.
AVERAGE = ("average_curvature", "quotient", "average_lipschitz")
RULES = {
    "ascend": ("ascend_2",),
    "axpy": ("add_multiple",),
    "blend": ("add_multiple", "add_multiple"),
    "sgd": ("sgd_",),
    "adam": ("adam_",),
    "sgd_curvature": ("sgd_", *AVERAGE),
    "adam_curvature": ("adam_", *AVERAGE),
    "lion": ("lion_",),
    "lion_curvature": ("lion_", *AVERAGE),
    "noise": ("neighbourhood", "root_curvature", "add_noise"),
    "average": AVERAGE,
}


def forms_fmas(update: str) -> int:
    """Of all forms of an update together. SGD's without momentum has two of its four, blend's of two lists one of two;
    noise has two of its three without a curvature and one where sizes are given, each with two kinds of law."""
    if update == "noise":
        return 2 * (2 + 3 + 1)
    stated = stated_fmas(*RULES.get(update, ()))
    fewer = {"sgd": 2, "sgd_curvature": 2, "blend": 1}.get(update, 0)
    forms = {"ascend": 4, "axpy": 2, "blend": 2, "sgd": 2, "adam": 2, "average": 3}
    return forms.get(update.removesuffix("_curvature"), 1) * stated - fewer


def plain_fmas(kernel: str) -> dict[str, int]:
    """Each form stands for itself, by quads: one, or two where lanes are summed. PACGen has its products, with two, and
    its terms, each three times eight elements: a loop unrolled by two has a third text for what is left over."""
    if kernel == "pacgen":
        return {"f64": 3 * 8 * (2 + 3)}
    quads = 2 if kernel.endswith("_curvature") or kernel in ("average", "noise") else 1
    normal = drawing_fmas("fm_ln", "fm_turn") * 2 if kernel == "probe" else 0
    return {"f32": 4 * quads * forms_fmas(kernel) + normal}


def expected_fmas(kernel: str) -> dict[str, int]:
    """By type. The text of an update stands four times in PTX for each: of half of 8 elements in float, of halves of
    twice 4 in double. So normal draws, a quad at a time, stand once and twice; a truncated draw belongs to its element.
    PACGen's term, with three in double, stands 16 times."""
    if kernel == "pacgen":
        return {"f64": 3 * 16}
    normal = 2 * drawing_fmas("fm_ln", "fm_turn")
    truncated = drawing_fmas("fm_normal_quantile", "fm_ln", "fm_normal_mass", "fm_exp2f")
    stated = stated_fmas(*RULES.get(kernel, ()))
    draws = {"noise": 3, "probe": 3, "draw_samples": 1}.get(kernel, 0) * normal
    cut = (4 + 4) * truncated if kernel == "noise" else 0
    return {"f32": 4 * stated + draws + cut, "f64": 4 * stated}


@pytest.mark.requires("nvcc")
@pytest.mark.parametrize("kernel", REGISTERS)
def test_ptx_fuses_only_where_the_source_does(compiled: dict[str, str], kernel: str) -> None:
    """A contraction rounds once where the formula rounds twice."""
    found = Counter(re.findall(r"\bfma\.rn\.(f32|f64)\b", compiled[kernel]))
    if kernel == "plain noise":  # nvcc lets several texts share the tails of their draws
        drawn = drawing_fmas("fm_ln", "fm_turn", "fm_normal_quantile", "fm_ln", "fm_normal_mass", "fm_exp2f")
        assert plain_fmas("noise")["f32"] < found["f32"] < 12 * 4 * drawn
        assert found["f64"] == 0
    else:
        plain = kernel.removeprefix("plain ")
        assert found == Counter(expected_fmas(kernel) if plain == kernel else plain_fmas(plain))


def test_the_updates_state_their_fmas() -> None:
    assert [stated_fmas(*RULES.get(kernel, ())) for kernel in UPDATES] == [1, 0, 0, 1, 2, 4, 7, 3, 6, 3, 6, 3, 3, 0]


@pytest.mark.requires("nvcc")
@pytest.mark.parametrize(("first", "last"), [(75, 90), (100, 120)])
def test_gpus_of_one_first_pass_have_the_same_ptx(first: int, last: int, tmp_path: Path) -> None:
    """So that a release compiles PTX for the first of them alone. labels.cu takes nvcc a second."""
    target = re.compile(r"^\.target .*", re.MULTILINE)
    text = [target.sub("", ptx_of("labels", number, tmp_path)) for number in (first, last)]
    assert text[0] == text[1]
    assert "__CUDA_ARCH" not in "".join(file.read_text() for file in ROOT.glob("c*/**/*.*h"))


# ---- what is said of the source elsewhere ----


def test_docs_say_how_many_tensors_a_launch_carries() -> None:
    rows = requirements.LAUNCH_ROWS
    assert f"ceil(N / {rows})" in (ROOT / "docs/traffic.md").read_text()
    assert f"one launch per pass for up to {rows} tensors" in (ROOT / "README.md").read_text()


# ---- the shipped library ----


def dumped(*options: str) -> str:
    """What cuobjdump says of the library. It calls nvdisasm, which lies beside it."""
    tool = requirements.cuobjdump()
    path = os.pathsep.join([str(Path(tool).parent), os.environ.get("PATH", "")])
    run = subprocess.run(
        [tool, *options, CUDA_LIBRARY], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def expected_code(architectures: str) -> tuple[set[str], set[str]]:
    """Machine code and PTX that CMake makes of a list such as ``80-real 90;120-virtual``: without a suffix, both."""
    real, virtual = set(), set()
    for item in re.split(r"[ ;]+", architectures.strip()):
        number, _, kind = item.partition("-")
        if kind in ("real", ""):
            real.add(f"sm_{number}")
        if kind in ("virtual", ""):
            virtual.add(f"sm_{number}")
    return real, virtual


def embedded(option: str) -> set[str]:
    """Architectures of the embedded files: cuobjdump names those of PTX sm_<number> too."""
    return set(re.findall(r"^(?:ELF|PTX) file +\d+: .*\.(sm_\w+)\.(?:cubin|ptx)$", dumped(option), re.MULTILINE))


@pytest.mark.requires("a build with nvcc")
def test_the_library_has_code_for_every_architecture() -> None:
    """Those of a release; a developer's build, narrowed by the variable that the build reads, has those it names."""
    given = os.environ.get("FM_CUDA_ARCHITECTURES") or "all"
    real, virtual = expected_code(RELEASED if given == "all" else given)
    assert embedded("-lelf") == real
    assert embedded("-lptx") == virtual


def test_cmake_compiles_for_the_released_architectures() -> None:
    released = re.search(r"set\(FM_CUDA_RELEASED (.*?)\)", (ROOT / "CMakeLists.txt").read_text())
    assert released is not None
    kept = re.findall(r"code=\[(.*?)\]", released.group(1))
    assert ",".join(kept).split(",") == ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_100"]
    assert expected_code(RELEASED) == ({"sm_75", "sm_80", "sm_90", "sm_100", "sm_120"}, {"sm_100"})


@pytest.mark.requires("nvcc")
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("echo 9.0; echo 9.0; echo 5.2", "with the CUDA library for 90-real"),
        ("echo 5.2", "without the CUDA library, since this nvcc does not compile for the GPU here (5.2)"),
        ("echo NVML library version: 535.1; exit 18", "without the CUDA library, since there is no GPU here"),
    ],
    ids=["a GPU known", "a GPU unknown", "no driver"],
)
def test_a_build_is_for_the_gpu_that_is_there(answer: str, said: str, tmp_path: Path) -> None:
    """By default. nvidia-smi is asked: here one that says what the test wants."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{answer}\n")
    tool.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja"]
    run = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"-- flatmin: {said}" in run.stdout
    compiled = re.findall(r"code=\[?(sm_\d+)", (tmp_path / "build" / "build.ninja").read_text())
    assert set(compiled) == ({"sm_90"} if "90-real" in said else set())


def resources() -> Iterator[tuple[str, dict[str, int]]]:
    """Kernel and what it takes, once for each architecture."""
    for symbol, numbers in re.findall(r"Function (\w+):\s+(REG:.*)", dumped("--dump-resource-usage")):
        yield kernel_name(symbol), {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}


@pytest.mark.requires("a build with nvcc")
def test_the_library_keeps_its_register_budget_on_every_architecture() -> None:
    seen = Counter(name for name, _ in resources())
    assert set(seen) == set(REGISTERS)
    assert set(seen.values()) == {len(embedded("-lelf"))}
    for name, used in resources():
        assert used["REG"] <= REGISTERS[name], (name, used)
        assert used["STACK"] == used["LOCAL"] == 0, (name, used)


# ---- the library in torch ----


def has_kernel(name: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"flatmin::{name}", key))


@pytest.mark.requires("a build with nvcc")
@pytest.mark.requires("a CUDA build of torch")
@pytest.mark.parametrize("name", _library.OPERATORS)
def test_every_operator_has_a_kernel_for_each_device(name: str) -> None:
    """Sparse keys too: there the call ends in a message that names the argument."""
    keys = ("CPU", "SparseCPU", "SparseCsrCPU", "CUDA", "SparseCUDA", "SparseCsrCUDA")
    assert [key for key in keys if not has_kernel(name, key)] == []


@pytest.mark.requires("a build with nvcc")
@pytest.mark.requires("a CUDA build of torch")
def test_cuda_tensors_take_the_kernels_only_if_the_driver_runs_them() -> None:
    """Without a driver the library loads, reports that it is not ready, and breaks nothing."""
    ready = torch.ops.flatmin.cuda_ready()
    assert ready is ("cuda" in _library.DEVICES)
    assert not ready or torch.cuda.is_available()


@pytest.mark.requires("a CUDA build of torch")
def test_shape_functions_take_cuda_tensors() -> None:
    """Adam's counters stay on the CPU, beside parameters on the device: no mixture to refuse."""
    real = {name: good(name) for name in ("restore_adam_", "restore_sgd_", "norm")}
    with FakeTensorMode():
        given = {name: fake_on_cuda(arguments) for name, arguments in real.items()}
        given["restore_adam_"]["steps"] = [torch.empty(()) for _ in given["restore_adam_"]["params"]]
        call("restore_adam_", given["restore_adam_"])
        given["restore_sgd_"]["grads"][-1] = torch.empty(SHAPE)
        with pytest.raises(RuntimeError, match="tensors on different devices"):
            call("restore_sgd_", given["restore_sgd_"])
        assert call("norm", given["norm"]).device.type == "cuda"


def fake_on_cuda(arguments: Arguments) -> Arguments:
    return tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"), arguments)  # type: ignore[no-any-return]


@pytest.mark.requires("a CPU build of torch")
@pytest.mark.parametrize("name", _library.OPERATORS)
def test_a_cpu_build_of_torch_never_loads_the_library(name: str) -> None:
    """Asked of the loader's own list of libraries too: a library can be loaded and register nothing."""
    assert has_kernel(name, "CPU")
    assert not has_kernel(name, "CUDA")
    assert "cuda" not in _library.DEVICES
    assert not hasattr(torch.ops.flatmin, "cuda_ready")
    assert CUDA_LIBRARY.name not in Path("/proc/self/maps").read_text()
