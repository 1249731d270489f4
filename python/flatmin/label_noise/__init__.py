"""Label noise: labels that are wrong by a known rule, and what that does to training.

:class:`LabelNoise` works on batches (fresh noise at every call: label-noise SGD) and on data sets (noise once and for
all: training on wrong labels); :class:`RegressionNoise` is its like for regression. What label-noise SGD minimises
besides the loss is measured by :func:`regulariser`, the noise that it puts on gradients by :func:`gradient_noise`.
"""

from ._collate import Collate
from ._dataset import NoisyDataset
from ._kinds import CIFAR10_ASYMMETRIC, label_table
from ._label_noise import LabelNoise
from ._meters import GradientNoise, gradient_noise
from ._regression import RegressionNoise
from ._regulariser import Regulariser, effective_lambda, regulariser

__all__ = [
    "CIFAR10_ASYMMETRIC",
    "Collate",
    "GradientNoise",
    "LabelNoise",
    "NoisyDataset",
    "RegressionNoise",
    "Regulariser",
    "effective_lambda",
    "gradient_noise",
    "label_table",
    "regulariser",
]
