"""Bad input: an exception that names the argument and says what to do, and not one byte written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from flatmin import ops
from flatmin.ops import _dispatch, _library
from operator_arguments import OPERATORS, SHAPE, Arguments, call, good, lists_of, scalar, scalars
from problems import memory

N = 4  # tensors in each list: the bad one is the last, when the others could have been written already


def tensors(offset: float = 0.0) -> list[Tensor]:
    return [torch.arange(30.0).view(SHAPE) + i + offset for i in range(N)]


def flat(arguments: Arguments) -> list[Tensor]:
    """Every CPU tensor with memory to compare."""
    lists = [v if isinstance(v, list) else [v] for v in arguments.values()]
    every = [t for values in lists for t in values if isinstance(t, Tensor)]
    return [t for t in every if t.layout == torch.strided and t.device.type == "cpu"]


def assert_refused(op: str, arguments: Arguments, *message: str) -> None:
    """The call raises, its message contains each given part, and every tensor keeps its bytes."""
    before = [memory(t).clone() for t in flat(arguments)]
    with pytest.raises(RuntimeError) as caught:
        call(op, arguments)
    for part in message:
        assert part in str(caught.value)
    assert all(torch.equal(memory(t), old) for t, old in zip(flat(arguments), before, strict=True))


@pytest.mark.parametrize("op", OPERATORS)
def test_good_arguments_pass(op: str) -> None:
    """What the rows below spoil is accepted before they do, so each exception is the row's own."""
    arguments = good(op)
    before = [memory(t).clone() for t in flat(arguments)]
    result = call(op, arguments)
    changed = any(not torch.equal(memory(t), old) for t, old in zip(flat(arguments), before, strict=True))
    assert changed == bool(_library.WRITTEN[op])
    assert (result is not None) == bool(_library.OPERATORS[op]._schema.returns)


# ---- one bad element in a list ----


@dataclass(frozen=True)
class BadElement:
    """What to put for the last tensor of a list, and the advice that the message must give."""

    name: str
    spoil: Callable[[Tensor], Tensor]
    advice: str


ANY_LIST = [
    BadElement("sparse", lambda t: t.to_sparse(), "to_dense"),
    BadElement("sparse_csr", lambda t: t.to_sparse_csr(), "to_dense"),
    BadElement("complex", lambda t: t.to(torch.complex64), "view_as_real"),
    BadElement("integer", lambda t: t.to(torch.int32), "convert"),
    BadElement("boolean", lambda t: t > 3, "convert"),
]
BESIDE_PARAMS = [
    BadElement("shape", lambda t: t.reshape(5, 6), "same sizes"),
    BadElement("fewer dimensions", lambda t: t.reshape(30), "same sizes"),
    BadElement("more elements", lambda t: torch.zeros(6, 6), "same sizes"),
    BadElement("half beside float", lambda t: t.half(), "convert"),
    BadElement("double beside float", lambda t: t.double(), "convert"),
]
WRITTEN = [
    BadElement("expanded", lambda t: torch.zeros(5).expand(SHAPE), "clone"),
    BadElement("overlapping", lambda t: torch.zeros(30).as_strided(SHAPE, (1, 1)), "clone"),
]
LISTS = {op: lists_of(op) for op in OPERATORS}

#: Lists that an operator takes of any floating type, and those that it can do without.
ANY_TYPE = {("norm", "weights"), ("ties", "weights"), ("curvature_", "sources"), *(("dot", name) for name in "bcd")}
OPTIONAL = {(op, "lipschitz") for op in OPERATORS} | {("scaled_noise_", "curvatures"), ("dot", "d"), ("blend_", "y")}


def element_rows() -> list[Any]:
    rows = []
    for op, names in LISTS.items():
        for name in names:
            bad = list(ANY_LIST)
            if name != names[0]:
                # a norm multiplies in float64 whatever the types, and an average takes a gradient as it comes
                bad += BESIDE_PARAMS[:3] if (op, name) in ANY_TYPE else BESIDE_PARAMS
            if name in _library.WRITTEN[op]:
                bad += WRITTEN
            rows += [pytest.param(op, name, b, id=f"{op}-{name}-{b.name}") for b in bad]
    return rows


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(("op", "name", "bad"), element_rows())
def test_a_bad_element_is_named(op: str, name: str, bad: BadElement) -> None:
    arguments = good(op)
    arguments[name][N - 1] = bad.spoil(arguments[name][N - 1])
    assert_refused(op, arguments, f"{name}[{N - 1}]", bad.advice)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in LISTS.items() for name in names])
def test_devices_do_not_mix(op: str, name: str) -> None:
    """A meta tensor among CPU tensors sends the whole call to the meta implementation: it must refuse as well."""
    arguments = good(op)
    arguments[name][N - 1] = arguments[name][N - 1].to("meta")
    assert_refused(op, arguments, "device", "call once for each")


# ---- lists that do not fit together ----


@pytest.mark.parametrize("change", ["one less", "one more", "none"])
@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op, names in LISTS.items() for name in names[1:]] + [("restore_adam_", "steps")],
)
def test_lengths_must_agree(op: str, name: str, change: str) -> None:
    arguments = good(op)
    values = arguments[name]
    if change == "none" and (op, name) in OPTIONAL:
        return
    arguments[name] = {"one less": values[:-1], "one more": [*values, values[0].clone()], "none": []}[change]
    assert_refused(op, arguments, f"{name} has {len(arguments[name])}", f"has {N}", "one for each")


def test_buffers_without_momentum() -> None:
    arguments = good("restore_sgd_")
    arguments["momentum"] = 0.0
    assert_refused("restore_sgd_", arguments, "momentum_buffers", "empty list")


# ---- memory that two written tensors share ----

#: Two views of 64 numbers that have an element in common.
SHARED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "same tensor": lambda t: (t, t),
    "two views of all": lambda t: (t, t.view(8, 8)),
    "transposed twin": lambda t: (t.view(8, 8), t.view(8, 8).t()),
    "overlapping slices": lambda t: (t[:30], t[15:45]),
    "overlapping slices, reversed": lambda t: (t[15:45], t[:30]),
    "strided inside dense": lambda t: (t, t[1::2]),
    "strided twins": lambda t: (t[::2], t[::2]),
    "strided slices": lambda t: (t.view(8, 8)[:6, :5], t.view(8, 8)[2:, :5]),
}


WRITES_PARAMS = [op for op in OPERATORS if "params" in _library.WRITTEN[op]]


@pytest.mark.parametrize("op", WRITES_PARAMS)
@pytest.mark.parametrize("shared", SHARED)
def test_a_parameter_given_twice(op: str, shared: str) -> None:
    """It would be perturbed twice and its second backup would hold the first perturbation."""
    first, second = SHARED[shared](torch.zeros(64))
    arguments = good(op)
    params = [tensors()[0], first, tensors()[1], second]
    arguments["params"] = params
    arguments["backup"] = ops.backup_like(params).fill_(0xA5)
    for name in arguments:
        if name in LISTS[op] and name != "params":
            arguments[name] = [torch.ones_like(p, memory_format=torch.contiguous_format) for p in params]
    assert_refused(op, arguments, "params[1]", "params[3]", "share memory", "each tensor once")


INTERLEAVED: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "every second": lambda t: [t[::2], t[1::2]],
    "dense pieces in the gaps of a column": lambda t: [t.view(20, 3)[:, 0], *t.view(20, 3)[:, 1:].unbind()],
}


@pytest.mark.parametrize("split", INTERLEAVED)
def test_interleaved_parameters_are_no_overlap(split: str) -> None:
    """Those of one list share an address range but no element."""
    t = torch.zeros(60)
    params = INTERLEAVED[split](t)
    backup = ops.backup_like(params)
    norm = torch.ones((), dtype=torch.float64)
    signs = [1.0 if i == 0 else -1.0 for i in range(len(params))]
    grads = [torch.full(p.shape, sign) for p, sign in zip(params, signs, strict=True)]
    ops.sam_ascend_(params, grads, backup, norm, 0.5)
    for p, sign in zip(params, signs, strict=True):
        assert p.eq(0.5 * sign).all()
    ops.restore_(params, backup)
    assert t.eq(0.0).all()


def test_of_interleaved_parameters_those_that_overlap_are_named() -> None:
    t = torch.zeros(60)
    arguments = {"params": [t[::2], t[1::2], t[2::4]], "grads": [torch.ones(30), torch.ones(30), torch.ones(15)]}
    arguments = good("sam_ascend_") | arguments | {"backup": ops.backup_like(arguments["params"])}
    assert_refused("sam_ascend_", arguments, "params[0]", "params[2]", "share memory")


@pytest.mark.parametrize("name", ["momentum_buffers", "backup"])
def test_state_shared_with_a_parameter(name: str) -> None:
    arguments = good("restore_sgd_")
    if name == "backup":
        arguments["params"][1] = arguments["backup"].view(torch.float32)[:30].view(SHAPE)
    else:
        arguments[name][2] = arguments["params"][1]
    assert_refused("restore_sgd_", arguments, name, "params[1]", "share memory")


# ---- single tensors ----

BAD_SCALARS: dict[str, Callable[[], Tensor]] = {
    "float32": lambda: torch.tensor(1.0),
    "integer": lambda: torch.tensor(1),
    "two elements": lambda: torch.ones(2, dtype=torch.float64),
    "no element": lambda: torch.ones(0, dtype=torch.float64),
}
#: Every single tensor but what holds bytes, two numbers or a key. Operators without lists are in test_labels.py.
SCALARS = [
    (op, a.name)
    for op in OPERATORS
    for a in _library.OPERATORS[op]._schema.arguments
    if LISTS[op] and str(a.type) == "Tensor" and a.name not in ("backup", "coefficients", "corrections", "key")
]


@pytest.mark.parametrize("bad", BAD_SCALARS)
@pytest.mark.parametrize(("op", "name"), SCALARS)
def test_scalars_are_float64(op: str, name: str, bad: str) -> None:
    arguments = good(op)
    arguments[name] = BAD_SCALARS[bad]()
    assert_refused(op, arguments, f"{name} must be a float64 tensor of one element")


BAD_BACKUPS: dict[str, Callable[[Tensor], Tensor]] = {
    "too small": lambda b: b[:-64].clone(),
    "too large": lambda b: torch.cat([b, b]),
    "wrong type": lambda b: b.view(torch.int8),
    "wrong type of the same bytes": lambda b: b.view(torch.float32),
    "two dimensions": lambda b: b.view(2, -1),
    "with gaps": lambda b: torch.cat([b, b])[::2],
}


def test_coefficients_are_three_numbers() -> None:
    for bad in (scalars(1.0, 2.0), torch.ones(3), scalars(1.0, 0.0, 1.0, 0.0, 1.0, 0.0)[::2]):
        arguments = good("blend_") | {"coefficients": bad}
        assert_refused("blend_", arguments, "coefficients must be a contiguous float64 tensor of 3 elements")


@pytest.mark.parametrize("op", [op for op in OPERATORS if "corrections" in _library.ARGUMENTS[op]])
def test_corrections_are_two_numbers(op: str) -> None:
    for bad in (scalars(1.0), scalars(1.0, 1.0, 1.0), torch.ones(2), scalars(1.0, 0.0, 1.0, 0.0)[::2]):
        arguments = good(op)
        arguments["corrections"] = bad
        assert_refused(op, arguments, "corrections must be a contiguous float64 tensor of 2 elements")


@pytest.mark.parametrize("op", ["scaled_noise_", "probe_", "curvature_"])
def test_random_numbers_need_a_key(op: str) -> None:
    arguments = good(op) | {"key": torch.empty(0, dtype=torch.uint64)} | ({"source": 2} if op == "curvature_" else {})
    assert_refused(op, arguments, "key is empty", "random_key")


@pytest.mark.parametrize("bad", BAD_BACKUPS)
@pytest.mark.parametrize("op", [op for op in OPERATORS if "backup" in _library.ARGUMENTS[op]])
def test_backups_fit_the_parameters(op: str, bad: str) -> None:
    arguments = good(op)
    arguments["backup"] = BAD_BACKUPS[bad](arguments["backup"])
    assert_refused(op, arguments, "backup", f"uint8 tensor of {N * 128} elements", "backup_like(params)")


@pytest.mark.parametrize(
    "key",
    [
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(1, dtype=torch.uint64),
        torch.zeros(3, dtype=torch.uint64),
        torch.zeros((), dtype=torch.uint64),
        torch.zeros(4, dtype=torch.uint64)[::2],
    ],
    ids=["int64", "one word", "three words", "0-dim", "with gaps"],
)
@pytest.mark.parametrize("op", ["sam_ascend_", "sam_norm_ascend_"])
def test_keys_are_two_words(op: str, key: Tensor) -> None:
    arguments = good(op)
    arguments["key"] = key
    assert_refused(op, arguments, "key must be", "uint64", "(seed, step)")


@pytest.mark.parametrize(
    "count",
    [torch.zeros((), dtype=torch.int64), torch.zeros(2), torch.zeros((), dtype=torch.bfloat16)],
    ids=["int64", "two elements", "bfloat16"],
)
def test_step_counts_are_single_floats(count: Tensor) -> None:
    arguments = good("restore_adam_")
    arguments["steps"][2] = count
    assert_refused("restore_adam_", arguments, "steps[2]", "float32 tensor of one element")


# ---- numbers ----

AVERAGING = [op for op in OPERATORS if "lipschitz_decay" in _library.ARGUMENTS[op]]
STEPS = [op for op in AVERAGING if op.startswith("restore_")]
DECAYS = ("decay", "lipschitz_decay")


@pytest.mark.parametrize(
    ("op", "name", "value", "advice"),
    [
        ("norm", "q", 0.5, "1 <= q"),
        ("norm", "q", math.nan, "1 <= q"),
        ("norm", "q", -math.inf, "1 <= q"),
        ("sam_ascend_", "q", 0.999, "1 <= q"),
        ("sam_norm_ascend_", "q", 0.999, "1 <= q"),
        ("sam_norm_ascend_", "q", math.inf, "call norm, ties and sam_ascend_"),
        ("norm", "scaling", 4, "big_vision"),
        ("ties", "scaling", -1, "asam"),
        ("sam_ascend_", "scaling", 7, "davda54"),
        ("sam_norm_ascend_", "scaling", 7, "davda54"),
        ("norm", "eta", -0.1, "not be negative"),
        ("sam_ascend_", "eta", math.nan, "not be negative"),
        ("sam_ascend_", "eps", -1e-12, "not be negative"),
        ("sam_ascend_", "rho", scalar(-0.05), "not be negative"),
        ("sam_norm_ascend_", "rho", scalar(-0.05), "not be negative"),
        ("scaled_noise_", "law", 4, "truncated_normal"),
        ("scaled_noise_", "gamma", -0.1, "not be negative"),
        ("scaled_noise_", "eps", math.nan, "not be negative"),
        ("scaled_noise_", "scale", scalar(-0.5), "not be negative"),
        ("scaled_noise_", "lipschitz_constant", scalar(-0.5), "not be negative"),
        ("probe_", "law", -1, "rademacher"),
        ("probe_", "law", 2, "no cut"),
        ("curvature_", "source", 3, "probed"),
        ("curvature_", "min_step", -1.0, "not be negative"),
        ("curvature_", "source_scale", math.inf, "finite"),
        *((op, "min_step", math.nan, "not be negative") for op in STEPS),
        *((op, name, bad, "from 0 to 1") for op in AVERAGING for name in DECAYS for bad in (-1.0, 2.0, math.nan)),
        ("pacgen", "gamma", -1.0, "not be negative"),
        ("pacgen", "lipschitz_constant", scalar(-1.0), "not be negative"),
    ],
)
def test_numbers_out_of_range(op: str, name: str, value: float | Tensor, advice: str) -> None:
    arguments = good(op)
    arguments[name] = value
    assert_refused(op, arguments, f"{name}:", "given", advice)


@pytest.mark.parametrize("rho", [-0.05, math.nan, math.inf, -1])
def test_public_ascend_refuses_a_radius(rho: float) -> None:
    params = tensors()
    with pytest.raises(ValueError, match=r"rho: .* given, but a radius is finite and not negative"):
        ops.sam_ascend_(params, tensors(), ops.backup_like(params), scalar(1.0), rho)
    with pytest.raises(ValueError, match=r"rho: .* given, but a radius is finite and not negative"):
        ops.sam_norm_ascend_(params, tensors(), ops.backup_like(params), rho)
    with pytest.raises(ValueError, match="rho"):
        ops.sam_ascend_([], [], ops.backup_like([]), scalar(1.0), rho)
    assert {p._version for p in params} == {0}
    assert all(torch.equal(p, w) for p, w in zip(params, tensors(), strict=True))


@pytest.mark.parametrize("p", [0.5, 0.0, -2.0, math.nan])
def test_no_norm_below_one(p: float) -> None:
    with pytest.raises(ValueError, match=r"p: .* given, but a norm needs 1 <= p <= inf"):
        ops.dual_exponent(p)


@pytest.mark.parametrize("p", [1.0, 1.02, 1.5, 2.0, 3.0, math.inf])
def test_dual_exponents(p: float) -> None:
    assert 1.0 / p + 1.0 / ops.dual_exponent(p) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("adaptive", ["ASAM", "", None, 2])
def test_unknown_conventions(adaptive: Any) -> None:
    with pytest.raises(ValueError, match=r"adaptive: .* given; give one of False, True, 'asam', 'davda54'"):
        ops.norm(tensors(), tensors(), adaptive=adaptive)


# ---- what runs in plain torch ----


def test_complex_parameters_warn_once_and_work() -> None:
    """Without a kernel the operators fall back: same meaning (a complex number is two reals), one warning."""
    _dispatch.warned.clear()
    params, grads = [torch.full((3,), 1.0 + 2.0j)], [torch.full((3,), 3.0 - 4.0j)]
    backup = ops.backup_like(params)
    with pytest.warns(UserWarning, match="no kernel for complex parameters"):
        norm = ops.norm(grads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.sam_ascend_(params, grads, backup, norm, 0.5)
    assert norm.item() == pytest.approx(5.0 * math.sqrt(3.0))
    torch.testing.assert_close(params[0], torch.full((3,), 1.0 + 2.0j) + 0.5 * grads[0] / norm)
    ops.restore_(params, backup)
    assert torch.equal(params[0], torch.full((3,), 1.0 + 2.0j))


@pytest.mark.parametrize(
    ("spoil", "advice"),
    [(lambda t: t.to_sparse(), "to_dense"), (lambda t: t.to(torch.int32), "floating-point")],
    ids=["sparse", "integer"],
)
def test_the_fallback_refuses_too(spoil: Callable[[Tensor], Tensor], advice: str) -> None:
    _dispatch.warned.clear()
    params = [torch.zeros(SHAPE, dtype=torch.complex64), spoil(torch.zeros(SHAPE))]
    with pytest.warns(UserWarning, match="no kernel"), pytest.raises(RuntimeError, match=advice):
        ops.norm(params)


def test_a_missing_library_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_LIBRARY", _library._LIBRARY.with_name("absent.so"))
    with pytest.raises(ImportError, match=r"absent\.so is missing.*pip install"):
        _library._load()
