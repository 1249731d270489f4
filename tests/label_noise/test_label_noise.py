"""flatmin.LabelNoise on batches: rates, transition matrices, reproducibility, state."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from flatmin import LabelNoise

N = 1_000_000
ROW = 0.3 * torch.rand(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MATRIX = torch.where(torch.eye(5, dtype=torch.bool), 1.0, ROW * (ROW > 0.1))
MATRIX /= MATRIX.sum(1, keepdim=True)

#: Every kind that draws labels, with the probability that label y becomes j as its definition has it.
KINDS: dict[str, tuple[int, Any, Any]] = {
    "exclude_true": (10, 0.2, "exclude_true"),
    "exclude_true of 2": (2, 0.3, "exclude_true"),
    "exclude_true always": (7, 1.0, "exclude_true"),
    "uniform": (10, 0.2, "uniform"),
    "uniform always": (3, 1.0, "uniform"),
    "pair": (10, 0.45, "pair"),
    "cifar10": (10, 0.4, "cifar10"),
    "mapping": (4, 0.3, {0: 3, 3: 1}),
    "matrix": (5, None, MATRIX),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(name: str, seed: int = 0, **options: Any) -> LabelNoise:
    classes, p, kind = KINDS[name]
    return LabelNoise(classes, p, kind, generator=seeded(seed), **options)


def stated(name: str) -> list[list[float]]:
    """The transition matrix, written out from the definition of the kind."""
    classes, p, kind = KINDS[name]
    rows = [[0.0] * classes for _ in range(classes)]
    cifar = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}
    for y in range(classes):
        if p is None:
            rows[y] = MATRIX[y].tolist()
            continue
        rows[y][y] += 1.0 - p
        if kind == "exclude_true":
            others = [j for j in range(classes) if j != y]
        elif kind == "uniform":
            others = list(range(classes))
        elif kind == "pair":
            others = [(y + 1) % classes]
        else:
            others = [(cifar if kind == "cifar10" else kind).get(y, y)]
        for j in others:
            rows[y][j] += p / len(others)
    return rows


# ---- what is drawn ----


@pytest.mark.parametrize("name", KINDS)
def test_transition_matrix(name: str) -> None:
    """The stated one is the kind's, and every row of 10^6 draws passes a chi-square test at 10^-4 of all rows."""
    noise, rows = make(name), torch.tensor(stated(name), dtype=torch.float64)
    classes = noise.num_classes
    torch.testing.assert_close(noise.transition_matrix, rows, rtol=0, atol=1e-12)
    y = torch.arange(N) % classes
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    counts.view(-1).scatter_add_(0, y * classes + noise(y), torch.ones(N, dtype=torch.int64))
    for row, expected in zip(counts, rows, strict=True):
        possible = expected > 0
        assert int(row[~possible].sum()) == 0
        if int(possible.sum()) > 1:
            wanted = expected[possible] * int(row.sum())
            assert scipy.stats.chisquare(row[possible], wanted).pvalue > 1e-4 / classes


@pytest.mark.parametrize("name", KINDS)
def test_effective_rate(name: str) -> None:
    """The share of changed labels within 4 sigma of what is stated, and 1 less the mean diagonal."""
    noise = make(name, seed=1)
    rate = noise.effective_rate
    assert rate == pytest.approx(1.0 - sum(row[y] for y, row in enumerate(stated(name))) / noise.num_classes)
    y = torch.arange(N) % noise.num_classes
    changed = float((noise(y) != y).double().mean())
    assert abs(changed - rate) <= 4.0 * math.sqrt(rate * (1.0 - rate) / N)


def test_two_conventions_of_symmetric_noise() -> None:
    """Redrawing from all classes leaves a tenth of "50 %" noise on 10 classes as it was (DivideMix#29)."""
    assert LabelNoise(10, 0.5, "exclude_true").effective_rate == 0.5
    assert LabelNoise(10, 0.5, "uniform").effective_rate == pytest.approx(0.45)


@pytest.mark.parametrize("name", KINDS)
def test_repr_states_both_rates(name: str) -> None:
    noise = make(name)
    assert f"rate={noise.effective_rate:.4g}" in repr(noise)
    assert noise.p is None or f"p={noise.p}" in repr(noise)


@pytest.mark.parametrize("kind", ["exclude_true", "uniform", "pair", {0: 1}])
def test_never_and_always(kind: Any) -> None:
    y = torch.arange(1000) % 3
    assert torch.equal(LabelNoise(3, 0.0, kind)(y), y)
    always = LabelNoise(3, 1.0, kind)(y)
    if kind == "exclude_true":
        assert bool((always != y).all())
    if kind == "pair":
        assert torch.equal(always, (y + 1) % 3)


@pytest.mark.parametrize("shape", [(0,), (1,), (), (0, 4), (2, 3, 4)])
@pytest.mark.parametrize("name", ["exclude_true", "mapping"])
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    y = torch.zeros(shape, dtype=torch.int64)
    noisy = make(name)(y)
    assert noisy.shape == y.shape and noisy.dtype == torch.int64


@pytest.mark.parametrize("name", ["uniform", "matrix"])
def test_ignored_labels_stay(name: str) -> None:
    for ignored in (-100, -1, 255):
        noise = make(name, ignore_index=ignored)
        y = torch.arange(1000) % noise.num_classes
        y[::3] = ignored
        noisy = noise(y)
        assert torch.equal(noisy == ignored, y == ignored)
        assert int((noisy != y).sum()) > 50


def test_one_label() -> None:
    """As torchvision's target_transform calls it."""
    noise = LabelNoise(10, 1.0, "pair")
    assert noise(3) == 4 and isinstance(noise(3), int)
    assert noise(torch.tensor(9)) == 0


# ---- soft targets ----


def test_smooth_is_the_mean_of_exclude_true() -> None:
    y = torch.tensor([[0, 2], [-100, 1]])
    soft = LabelNoise(3, 0.3, "smooth")(y)
    assert soft.shape == (2, 3, 2)  # the classes are dimension 1, as cross_entropy takes them
    rows = LabelNoise(3, 0.3, "exclude_true").transition_matrix.float()
    torch.testing.assert_close(soft[0, :, 0], rows[0])
    torch.testing.assert_close(soft[1, :, 1], rows[1])
    assert torch.equal(soft[1, :, 0], torch.zeros(3))
    torch.testing.assert_close(LabelNoise(3, 0.3, "smooth").transition_matrix.float(), rows)


def test_smooth_is_torchs_label_smoothing() -> None:
    """label_smoothing=e gives e / C to every class, the true one too."""
    logits, y = torch.randn(20, 5, generator=seeded()), torch.arange(20) % 5
    ours = torch.nn.functional.cross_entropy(logits, LabelNoise(5, 0.1 * 4 / 5, "smooth")(y))
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.1))


def test_gaussian() -> None:
    """One-hot plus p times standard normal noise, independent of each other and of the label."""
    noise = LabelNoise(4, 0.5, "gaussian", generator=seeded())
    y = torch.arange(N // 4) % 4
    target = noise(y)
    xi = (target - torch.nn.functional.one_hot(y, 4)).double() / 0.5
    assert scipy.stats.kstest(xi.flatten().numpy(), "norm").pvalue > 1e-4
    assert (xi.T.cov() - torch.eye(4)).abs().max() < 4 * math.sqrt(2.0 / len(y))
    wrong = float((target.argmax(1) != y).double().mean())
    assert abs(wrong - noise.effective_rate) < 4 * math.sqrt(noise.effective_rate / len(y))
    assert LabelNoise(4, 0.0, "gaussian").effective_rate == 0.0
    assert torch.equal(LabelNoise(4, 0.0, "gaussian")(y), torch.nn.functional.one_hot(y, 4).float())


def test_gaussian_by_index() -> None:
    """A mask's noise goes with its number; one of all positions is none at all."""
    y = torch.arange(6 * 35).view(6, 5, 7) % 3
    noise = LabelNoise(3, 0.5, "gaussian", generator=seeded())
    order = torch.tensor([4, 1])
    assert torch.equal(noise(y[order], index=order), noise(y, index=torch.arange(6))[order])


# ---- golden values: label noise and its mean (methods.md C1) ----


def test_noise_of_the_gradient() -> None:
    """Logits (2, .5, -1), y = 0, p = .3: the mean noisy loss is that of the soft target, and the variance of the
    gradient by the logits is 1 - sum of the row's squares = .465 (Damian, Ma and Lee 2021)."""
    logits = torch.tensor([2.0, 0.5, -1.0], dtype=torch.float64)
    noise = LabelNoise(3, 0.3, "exclude_true", generator=seeded())
    row = noise.transition_matrix[0]
    losses = torch.tensor([torch.nn.functional.cross_entropy(logits, torch.tensor(j)) for j in range(3)])
    assert losses.tolist() == pytest.approx([0.2413112967, 1.7413112967, 3.2413112967], abs=1e-9)
    soft = torch.nn.functional.cross_entropy(logits, LabelNoise(3, 0.3, "smooth")(torch.tensor(0)).double())
    assert float(soft) == pytest.approx(0.9163112967, abs=1e-7)  # the target is float32
    assert float((row * losses).sum()) == pytest.approx(0.9163112967, abs=1e-9)
    minimum = -(row * row.log()).sum()
    assert float(soft - minimum) == pytest.approx(0.0975028404, abs=1e-7)
    drawn = noise(torch.zeros(N, dtype=torch.int64)).bincount(minlength=3) / N
    gradients = logits.softmax(0) - torch.eye(3, dtype=torch.float64)
    spread = (drawn * gradients.square().sum(1)).sum() - (logits.softmax(0) - row).square().sum()
    assert float(spread) == pytest.approx(0.465, abs=4e-3)


# ---- what a draw depends on ----


def test_calls_draw_anew_and_the_seed_decides() -> None:
    y = torch.arange(1000) % 10
    a, b, other = make("uniform"), make("uniform"), make("uniform", seed=1)
    first, second = a(y), a(y)
    assert not torch.equal(first, second)
    assert torch.equal(first, b(y)) and torch.equal(second, b(y))
    assert not torch.equal(first, other(y))
    torch.manual_seed(3)
    c = LabelNoise(10, 0.2, "uniform")
    torch.manual_seed(3)
    assert LabelNoise(10, 0.2, "uniform").seed == c.seed


def test_by_index_the_order_of_batches_does_not_matter() -> None:
    y = torch.arange(600) % 10
    noise, again = make("exclude_true"), make("exclude_true")
    whole = noise(y, index=torch.arange(600))
    noisy = torch.empty_like(y)
    for batch in torch.randperm(600, generator=seeded()).split(64):
        noisy[batch] = again(y[batch], index=batch)
    assert torch.equal(noisy, whole)
    assert torch.equal(noise(y, index=torch.arange(600)), whole)  # calls do not count
    noise.set_epoch(1)
    assert not torch.equal(noise(y, index=torch.arange(600)), whole)
    noise.set_epoch(0)
    assert torch.equal(noise(y, index=torch.arange(600)), whole)


def test_positions_and_numbers_are_independent() -> None:
    """A call by position and one by index do not flip the same labels, nor do two epochs or two calls."""
    y = torch.zeros(100_000, dtype=torch.int64)
    noise = LabelNoise(2, 0.5, "exclude_true", generator=seeded())
    draws = [noise(y), noise(y), noise(y, index=torch.arange(len(y)))]
    noise.set_epoch(1)
    draws.append(noise(y, index=torch.arange(len(y))))
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs(float((a == b).double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(len(y))


def test_ranks_draw_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.arange(1000) % 10
    results = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        noise = make("uniform")
        results.append((noise(y), noise(y, index=torch.arange(1000))))
    assert not torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# ---- state ----


@pytest.mark.parametrize("name", ["uniform", "matrix"])
def test_a_resumed_run_draws_on(name: str) -> None:
    y = torch.arange(1000) % 4
    noise = make(name)
    noise.set_epoch(3)
    for _ in range(5):
        noise(y)
    state = copy.deepcopy(noise.state_dict())
    expected = [noise(y), noise(y), noise(y, index=torch.arange(1000))]
    resumed = make(name, seed=9)
    resumed.load_state_dict(torch_saved(state))
    assert all(map(torch.equal, expected, [resumed(y), resumed(y), resumed(y, index=torch.arange(1000))]))
    assert resumed.epoch == 3


def torch_saved(state: dict[str, Any]) -> Any:
    """Through the format of a checkpoint that is loaded without code."""
    import io

    memory = io.BytesIO()
    torch.save(state, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=True)


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
@pytest.mark.parametrize("name", ["pair", "matrix", "mapping"])
def test_a_copy_draws_the_same_and_goes_its_own_way(name: str, copied: Any) -> None:
    y = torch.arange(1000) % 4
    noise = make(name)
    noise(y)
    other = copied(noise)
    assert torch.equal(noise(y), other(y)) and repr(noise) == repr(other)
    noise.set_epoch(4)
    assert other.epoch == 0


@pytest.mark.parametrize(
    "state",
    [
        {},
        None,
        {"seed": 1, "step": 2},
        {"seed": -1, "step": 0, "epoch": 0},
        {"seed": 2**64, "step": 0, "epoch": 0},
        {"seed": 1, "step": 0, "epoch": 2**64},
    ],
)
def test_a_bad_state_is_refused(state: dict[str, Any]) -> None:
    noise = make("pair")
    before = noise.state_dict()
    with pytest.raises((TypeError, ValueError), match="state_dict"):
        noise.load_state_dict(state)
    assert noise.state_dict() == before


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 0.2), ValueError, "kind: None given; give"),
        ((10, 0.2, "symmetric"), ValueError, "kind: 'symmetric' given; give \"exclude_true\""),
        ((10, 1.2, "uniform"), ValueError, "p: 1.2 given"),
        ((10, -0.1, "smooth"), ValueError, "p: -0.1 given"),
        ((10, math.nan, "pair"), ValueError, "p: nan given"),
        ((10, None, "pair"), TypeError, "p: None given"),
        ((10, -1.0, "gaussian"), ValueError, r"p \(the standard deviation"),
        ((1, 0.2, "exclude_true"), ValueError, "num_classes: 1 given, but kind='exclude_true'"),
        ((1, 0.2, "smooth"), ValueError, "num_classes: 1 given, but kind='smooth'"),
        ((0, 0.2, "pair"), ValueError, "num_classes: 0"),
        ((2**31, 0.2, "pair"), ValueError, "num_classes"),
        ((9, 0.2, "cifar10"), ValueError, "num_classes: 9 given, but kind='cifar10'"),
        ((3, 0.2, {0: 3}), ValueError, "kind: the mapping has label 3"),
        ((3, 0.2, {"a": 1}), ValueError, "kind: a label of the mapping: 'a'"),
        ((2, None, [[0.5, 0.5], [0.5, 0.4]]), ValueError, "kind: row 1 of the matrix sums to 0.9"),
        ((2, None, [[0.5, 0.5], [1.5, -0.5]]), ValueError, "kind: row 1 of the matrix holds"),
        ((3, None, [[1.0, 0.0], [0.0, 1.0]]), ValueError, r"kind: a matrix of shape \(2, 2\)"),
        ((2, 0.2, [[1.0, 0.0], [0.0, 1.0]]), ValueError, "p: 0.2 given, but the matrix"),
        ((2, None, [[1.0, 0.0], [1.0]]), TypeError, "kind: .* given, which is no matrix"),
        ((2, None, ["uniform"]), TypeError, "kind: .* given, which is no matrix"),
        ((2, 0.2, {1}), ValueError, r"kind: \{1\} given; give"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LabelNoise(*arguments)


def test_a_matrix_of_numpy() -> None:
    one, other = (LabelNoise(5, None, m, generator=seeded()) for m in (MATRIX, MATRIX.numpy()))
    y = torch.arange(100) % 5
    assert torch.equal(one(y), other(y)) and torch.equal(one.transition_matrix, other.transition_matrix)


def test_ignore_index_is_no_class() -> None:
    with pytest.raises(ValueError, match="ignore_index: 9223372036854775808 given"):
        LabelNoise(10, 0.2, "pair", ignore_index=2**63)
    with pytest.raises(ValueError, match="ignore_index: 0 given, which is one of the 10 classes"):
        LabelNoise(10, 0.2, "pair", ignore_index=0)


def test_a_generator_is_one() -> None:
    with pytest.raises(TypeError, match="generator: 3 given"):
        LabelNoise(10, 0.2, "pair", generator=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["uniform", "cifar10", "smooth", "gaussian"])
def test_a_label_out_of_range_is_named(kind: str) -> None:
    y = torch.zeros(4, 3, dtype=torch.int64)
    y[2, 1] = 10
    noise = LabelNoise(10, 0.2, kind)
    with pytest.raises(RuntimeError, match="labels: element 7 is 10, but there are 10 classes"):
        noise(y)


@pytest.mark.parametrize("labels", [torch.zeros(3), torch.zeros(3, dtype=torch.int32), [1, 2], 1.5, np.array([1, 2])])
def test_labels_are_int64(labels: Any) -> None:
    with pytest.raises(TypeError, match=r"labels: .* given; give"):
        make("pair")(labels)


@pytest.mark.parametrize("kind", ["pair", "smooth", "gaussian"])
@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([0, 1, 2], TypeError, "index: list given; give the numbers of the samples as an int64 tensor"),
        (torch.tensor([0.0, 0.5, 1.0]), TypeError, "index: torch.float32 given"),
        (torch.tensor([True, False, True]), TypeError, "index: torch.bool given"),
        (torch.arange(2), ValueError, r"index: shape \(2,\) given, but labels have \(3,\)"),
    ],
)
def test_bad_index(kind: str, index: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LabelNoise(3, 0.2, kind)(torch.arange(3), index=index)


# ---- on a GPU the host does not wait ----


def test_deferred_check() -> None:
    """What a GPU's labels go through, on the CPU: the first label out of range is named when the answer is read."""
    from flatmin.label_noise._deferred import DeferredCheck

    check = DeferredCheck(10, -100)
    check.watch(torch.tensor([1, -100, 9]))
    check.poll(wait=True)
    check.watch(torch.tensor([[1, -100], [11, -1]]))
    with pytest.raises(RuntimeError, match="element 2 is 11, but there are 10 classes"):
        check.watch(torch.tensor([1]))
    check.watch(torch.tensor([], dtype=torch.int64))
    check.poll(wait=True)


@pytest.mark.cuda
@pytest.mark.parametrize("name", KINDS)
def test_a_gpu_draws_the_same(name: str) -> None:
    y = torch.arange(10_000) % KINDS[name][0]
    cpu, gpu = make(name), make(name)
    for index in (None, torch.arange(10_000) * 7):
        noisy: Tensor = gpu(y.cuda(), index=None if index is None else index.cuda())
        assert torch.equal(noisy.cpu(), cpu(y, index=index))


@pytest.mark.cuda
def test_a_label_out_of_range_on_a_gpu() -> None:
    noise = make("uniform")
    noise(torch.tensor([0, 10], device="cuda"))
    with pytest.raises(RuntimeError, match="element 1 is 10"):
        noise.check()
    noise.check()
