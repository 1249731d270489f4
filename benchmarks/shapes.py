"""Parameter shapes of the networks that the benchmark steps, in the order of ``model.parameters()``.

ResNet-50 and EfficientNet-B0 are built from the block tables of their papers, so that no torchvision is needed.
"""

from __future__ import annotations

from collections.abc import Callable

Shape = tuple[int, ...]

IMAGENET_CLASSES = 1000
# Stages of ResNet-50 (He et al. 2015, arXiv 1512.03385, table 1): width of the 3x3 convolution, blocks.
RESNET50_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
RESNET50_EXPANSION = 4
# Stages of EfficientNet-B0 (Tan and Le 2019, arXiv 1905.11946, table 1): expansion, kernel, output channels, blocks.
EFFICIENTNET_B0_STAGES = (
    (1, 3, 16, 1),
    (6, 3, 24, 2),
    (6, 5, 40, 2),
    (6, 3, 80, 3),
    (6, 5, 112, 3),
    (6, 5, 192, 4),
    (6, 3, 320, 1),
)


def _conv_norm(out: int, channels: int, kernel: int) -> list[Shape]:
    """A convolution without bias over ``channels`` per group, and the batch norm after it."""
    return [(out, channels, kernel, kernel), (out,), (out,)]


def _linear(out: int, features: int) -> list[Shape]:
    return [(out, features), (out,)]


def mnist() -> list[Shape]:
    """The net of the PyTorch MNIST example, as in examples/mnist.py."""
    return [(32, 1, 3, 3), (32,), (64, 32, 3, 3), (64,), *_linear(128, 9216), *_linear(10, 128)]


def resnet50() -> list[Shape]:
    """161 tensors, 25,557,032 elements."""
    shapes = _conv_norm(64, 3, 7)
    channels = 64
    for width, blocks in RESNET50_STAGES:
        out = RESNET50_EXPANSION * width
        for block in range(blocks):
            shapes += _conv_norm(width, channels, 1) + _conv_norm(width, width, 3) + _conv_norm(out, width, 1)
            if block == 0:
                shapes += _conv_norm(out, channels, 1)  # the shortcut changes its width once per stage
            channels = out
    return shapes + _linear(IMAGENET_CLASSES, channels)


def _inverted_residual(channels: int, expansion: int, kernel: int, out: int) -> list[Shape]:
    """MBConv: expand, depthwise convolution, squeeze-and-excitation to a quarter of the input's width, project."""
    wide, squeezed = expansion * channels, channels // 4
    expand = _conv_norm(wide, channels, 1) if expansion != 1 else []
    excite: list[Shape] = [(squeezed, wide, 1, 1), (squeezed,), (wide, squeezed, 1, 1), (wide,)]
    return expand + _conv_norm(wide, 1, kernel) + excite + _conv_norm(out, wide, 1)


def efficientnet_b0() -> list[Shape]:
    """213 tensors, 5,288,548 elements: many small ones, where the cost per tensor shows."""
    channels = 32
    shapes = _conv_norm(channels, 3, 3)
    for expansion, kernel, out, blocks in EFFICIENTNET_B0_STAGES:
        for _ in range(blocks):
            shapes += _inverted_residual(channels, expansion, kernel, out)
            channels = out
    return shapes + _conv_norm(1280, channels, 1) + _linear(IMAGENET_CLASSES, 1280)


def matrices() -> list[Shape]:
    """Four square matrices as in a transformer block, 268 MB: only bandwidth counts."""
    return [(4096, 4096)] * 4


def overhead() -> list[Shape]:
    """As many tensors as EfficientNet-B0 has, of one element: only the cost of calls is left."""
    return [(1,)] * len(efficientnet_b0())


SHAPE_SETS: dict[str, Callable[[], list[Shape]]] = {
    "mnist": mnist,
    "efficientnet_b0": efficientnet_b0,
    "resnet50": resnet50,
    "matrices": matrices,
    "overhead": overhead,
}
