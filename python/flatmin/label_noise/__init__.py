"""Label noise: labels that are wrong by a known rule, and what that does to training.

:class:`LabelNoise` works on batches (fresh noise at every call: label-noise SGD) and on data sets (noise once and for
all: training on wrong labels); :class:`RegressionNoise` is its like for regression.
"""

from ._collate import Collate
from ._dataset import NoisyDataset
from ._kinds import CIFAR10_ASYMMETRIC, label_table
from ._label_noise import LabelNoise
from ._regression import RegressionNoise

__all__ = [
    "CIFAR10_ASYMMETRIC",
    "Collate",
    "LabelNoise",
    "NoisyDataset",
    "RegressionNoise",
    "label_table",
]
