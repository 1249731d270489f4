"""examples/label_noise/cifar.py: its parts against plain forms, equal budgets, what bootstrap trains on, resuming."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacgen_examples import Stop, UsageError, _images, assert_picture, write_classes

SCRIPT = Path(__file__).parents[2] / "examples" / "label_noise" / "cifar.py"
sys.path.insert(0, str(SCRIPT.parent))

import _noisy_tables  # noqa: E402
import _noisy_training  # noqa: E402
import cifar  # noqa: E402

METHODS = ["sgd", "mixup", "sam", "bootstrap+sam", "bootstrap+mixup"]
TINY = ["--noise", "0.4", "--seeds", "2", "--epochs", "2", "--every", "1", "--train", "80", "--test", "20", "--batch",
        "16", "--shrink", "4", "--width", "4", "--jobs", "1"]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")

# ---- parts ----


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154)])
def test_size_of_the_network(depth: int, count: int) -> None:
    """As stated for CIFAR-10 by He et al. (0.27 and 0.46 million) and, to the last one, by public reproductions."""
    model = _noisy_training.ResNet(depth, 16)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("crop", [False, True])
def test_every_augmented_image_is_a_mirrored_or_moved_one(crop: bool) -> None:
    x = torch.rand(40, 3, 8, 8)
    made = _noisy_training.augmented(x, crop, torch.Generator().manual_seed(0))
    padded = F.pad(x, (1, 1, 1, 1))
    places = [(i, j) for i in range(3) for j in range(3)] if crop else [(1, 1)]
    seen = set()
    for k in range(40):
        windows = {(i, j, False): padded[k, :, i : i + 8, j : j + 8] for i, j in places}
        windows |= {(i, j, True): w.flip(2) for (i, j, _), w in windows.items()}
        found = [name for name, window in windows.items() if torch.equal(window, made[k])]
        assert len(found) == 1
        seen.add(found[0])
    assert {name[2] for name in seen} == {False, True} and (len(seen) > 9 or not crop)


def test_mixup_mixes_images_and_targets_alike() -> None:
    """Images that show nothing but their class: the mixed image is the mixed target."""
    y = torch.arange(10).repeat(3)
    x, target = _noisy_training.Mixup(8.0, 3)(F.one_hot(y, 10).float(), y)
    torch.testing.assert_close(x, target)
    torch.testing.assert_close(target.sum(1), torch.ones(30))
    assert int((target > 0).sum(1).max()) == 2
    same = _noisy_training.Mixup(0.0, 3)(F.one_hot(y, 10).float(), y)
    assert torch.equal(same[1], F.one_hot(y, 10).float()) and torch.equal(same[0], same[1])


def test_a_step_of_sam_sees_the_same_batch_twice() -> None:
    """Against the formula, with Mixup: other pairs in the second pass would give another gradient."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 6), torch.randint(10, (12,))
    model = nn.Linear(6, 10)
    w = [p.detach().clone().requires_grad_() for p in model.parameters()]
    mixed, target = _noisy_training.Mixup(2.0, 5)(x, y)
    first = torch.autograd.grad(F.cross_entropy(F.linear(mixed, *w), target), w)
    norm = torch.cat([g.flatten() for g in first]).norm()
    moved = [(p + 0.3 * g / norm).detach().requires_grad_() for p, g in zip(w, first, strict=True)]
    second = torch.autograd.grad(F.cross_entropy(F.linear(mixed, *moved), target), moved)
    optimizer = _noisy_training.make_optimizer(model, 0.3, 0.01)
    _noisy_training.train_epoch(model, optimizer, iter([(x, y)]), _noisy_training.Mixup(2.0, 5), iter([0.2]))
    for p, before, g in zip(model.parameters(), w, second, strict=True):
        torch.testing.assert_close(p, before - 0.2 * (g + 0.01 * before))


def test_the_rate_falls_from_the_first_step_to_the_last() -> None:
    rates = [_noisy_training.cosine(0.1, step, 100) for step in range(101)]
    assert rates[0] == 0.1 and rates[50] == pytest.approx(0.05) and rates[100] == pytest.approx(0.0)
    assert rates == sorted(rates, reverse=True)


# ---- runs ----


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 training and 20 test images, sorted into classes."""
    folder = tmp_path_factory.mktemp("images")
    write_classes(folder, "train", 8)
    write_classes(folder, "test", 2)
    return folder


def train(out: Path, images: Path, *flags: str) -> None:
    cifar.run(cifar.parse_args(["--out", str(out), "--data", str(images), *TINY, *flags]))


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train(out, images, "--method", *METHODS)
    return out


def result(folder: Path, method: str, seed: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs" / f"noise0.4-{method}-seed{seed}.json").read_text())
    for row in found["epochs"]:
        del row["seconds"]
    return found


def test_every_method_has_the_same_budget_and_as_many_looks(trained: Path) -> None:
    for method in METHODS:
        rows = result(trained, method)["epochs"]
        assert len(rows) == (2 if method.endswith("sam") else 4)
        assert rows[-1]["gradients"] == 4 * 80 // 16
        assert [row["gradients"] for row in rows if "accuracy" in row] == [10, 20]


def test_what_is_reported_is_what_the_rows_say(trained: Path) -> None:
    for method in METHODS:
        found = result(trained, method)
        looks = [row["accuracy"] for row in found["epochs"] if "accuracy" in row]
        assert found["last"] == looks[-1] and found["best"] == max(looks)
        assert found["fitted"] == found["epochs"][-1]["fitted"], "all 32 wrong labels are watched"
    table = json.loads((trained / "summary.json").read_text())["last"]["0.4"]
    mean = sum(result(trained, "sam", seed)["last"] for seed in (0, 1)) / 2
    assert table["sam"]["value"] == pytest.approx(mean) and table["sam"]["seeds"] == [0, 1]
    ahead = mean - sum(result(trained, "sgd", seed)["last"] for seed in (0, 1)) / 2
    assert table["sam"]["ahead_of_sgd"]["value"] == pytest.approx(ahead)


def test_labels_are_wrong_by_count_and_bootstrap_takes_its_teachers(trained: Path, images: Path) -> None:
    train_images, _ = _images.shuffled_images("cifar10", str(images), str(trained / "cache"), "cpu", 0)
    for seed in (0, 1):
        sam, again = result(trained, "sam", seed), result(trained, "bootstrap+sam", seed)
        stated, wrong = cifar.seen_labels(train_images.labels, sam["settings"])
        assert int(wrong.sum()) == 32 and torch.equal(wrong, stated != train_images.labels)
        assert sam["labels_right"] == 60.0
        predicted = torch.tensor([int(c) for c in sam["predicted"]])
        right = 100.0 * float((predicted == train_images.labels).double().mean())
        assert again["labels_right"] == pytest.approx(right)
        assert sam["fitted"] == pytest.approx(100.0 * float((predicted == stated)[wrong].double().mean()))
    assert again["settings"]["teacher"] == "noise0.4-sam-seed1"
    different = cifar.seen_labels(train_images.labels, result(trained, "sam", 0)["settings"])[0]
    assert not torch.equal(different, stated), "another seed has other wrong labels"


def test_a_run_goes_on_where_it_was_stopped(
    trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second epoch of SAM's run, then of that on its labels; with Mixup's random numbers beside."""
    real = _noisy_training.train_epoch
    trained_epochs = []
    stops = [("mixup", 3), ("sam", 2), ("bootstrap+sam", 2)]

    def interrupted(model: nn.Module, *rest: Any) -> float:
        s, epoch = sys._getframe(1).f_locals["s"], sys._getframe(1).f_locals["epoch"]
        if (s["method"], epoch) in stops:
            stops.remove((s["method"], epoch))
            raise Stop
        trained_epochs.append((s["method"], epoch))
        return real(model, *rest)

    monkeypatch.setattr(cifar, "train_epoch", interrupted)
    flags = ["--seeds", "1", "--method", "mixup", "bootstrap+sam"]
    while stops:
        with pytest.raises(Stop):
            train(tmp_path, images, *flags)
        assert len(list((tmp_path / "runs").glob("*.pt"))) == 1
    train(tmp_path, images, *flags)
    assert len(trained_epochs) == len(set(trained_epochs)) == 8, "no epoch is trained twice"
    assert not list((tmp_path / "runs").glob("*.pt"))
    for method in ("mixup", "sam", "bootstrap+sam"):
        assert result(tmp_path, method) == result(trained, method)


def test_pictures_are_drawn_again_to_the_same_bytes(trained: Path) -> None:
    paths = [trained / "cifar.png", trained / "cifar_curves.png"]
    for path in paths:
        assert_picture(path)
    before = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    done = subprocess.run([sys.executable, str(SCRIPT), "--out", str(trained), "--plot-only"], capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert [path.read_bytes() for path in paths] == before
    assert done.stdout.startswith((trained / "summary.md").read_text())
    assert all(name in done.stdout for m, name in _noisy_tables.LABELS.items() if m in METHODS)


def test_processes_can_be_given_the_trainer(tmp_path: Path) -> None:
    source = _images.Source({"cifar10": "x"}, "cache", "cpu")
    made = pickle.loads(pickle.dumps(cifar.Trainer(tmp_path, source)))
    assert (made.folder, made.source) == (tmp_path, source)


def test_the_size_of_the_paper_and_its_radii() -> None:
    args = cifar.parse_args(["--full"])
    assert (args.size.depth, args.size.epochs, args.size.crop, args.size.shrink) == (32, 200, True, 1)
    runs = [run for part in cifar.stages(args, 0) for run in part]
    assert {(r.settings["noise"], r.settings["rho"]) for r in runs if r.settings["method"].endswith("sam")} == {
        (0.2, 0.1), (0.4, 0.1), (0.6, 0.1), (0.8, 0.05)}  # fmt: skip
    assert {r.settings["epochs"] for r in runs if r.settings["method"] in ("sgd", "mixup")} == {400}
    assert len(runs) == len({r.name for r in runs}) == 20


# ---- errors ----


def refusals() -> Iterator[tuple[list[str], str]]:
    yield ["--noise", "1.5"], "share in [0, 1]"
    yield ["--depth", "9"], "6 n + 2"
    yield ["--shrink", "3"], "1, 2, 4 or 8"
    yield ["--epochs", "1", "--every", "2"], "there are 1 epochs"
    yield ["--method", "sam", "sam"], "given twice"
    yield ["--device", "nowhere"], "argument --device: nowhere cannot be used"
    yield ["--batch", "1", "--shrink", "8"], "argument --batch: one image of 4x4 pixels has no statistics"


@pytest.mark.parametrize(("flags", "message"), list(refusals()))
def test_bad_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cifar.parse_args(flags)
    assert message in capsys.readouterr().err


def test_errors_of_usage(trained: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--train: 81 given, but the data holds 80"):
        train(tmp_path, images, "--train", "81")
    with pytest.raises(UsageError, match="run without --plot-only"):
        cifar.run(cifar.parse_args(["--out", str(tmp_path), "--plot-only"]))
    with pytest.raises(UsageError, match=r"made with lr 0\.1, but now it is 0\.2"):
        train(trained, images, "--method", "sgd", "--lr", "0.2")
    mixed: list[dict[str, Any]] = [result(trained, "sgd"), result(trained, "sgd", 1)]
    mixed[1]["settings"]["width"] = 5
    with pytest.raises(UsageError, match="width 4 and 5 lie in one folder"):
        _noisy_tables.tabulate(mixed, METHODS)


def test_a_file_that_is_no_result(images: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for text in ("{}", "[]"):
        (tmp_path / "runs" / "noise0.5-sgd-seed0.json").write_text(text)
        for flags in (["--plot-only"], ["--noise", "0.5", "--method", "sgd", "--seeds", "1"]):
            with pytest.raises(UsageError, match=r"noise0\.5-sgd-seed0\.json: not the result of a run; delete it"):
                train(tmp_path, images, *flags)


def test_a_run_without_wrong_labels(images: Path, tmp_path: Path) -> None:
    """What is a share of none is missing in the files, and does not stop tables and figures."""
    train(tmp_path, images, "--noise", "0", "--seeds", "1", "--epochs", "1", "--method", "sgd")
    found: Tensor | Any = json.loads((tmp_path / "runs" / "noise0-sgd-seed0.json").read_text())
    assert found["fitted"] is None and found["labels_right"] == 100.0
    assert (tmp_path / "cifar_curves.png").is_file()
