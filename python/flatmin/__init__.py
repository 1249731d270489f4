"""flatmin: training into flat minima, fused.

::

    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)

:class:`SAM` and :class:`PerturbedOPT` wrap any torch optimizer (:mod:`flatmin.optim`); :func:`report`
measures how flat a minimum is in one call, :func:`pacgen`, :mod:`flatmin.sharpness` and :mod:`flatmin.curvature` each
in its part; :class:`LabelNoise` makes labels wrong by a known rule; :mod:`flatmin.ops` holds the operators for loops
of your own.
"""

from . import curvature, label_noise, ops, optim, reference, sharpness
from . import noise as noise
from . import sam as sam
from .label_noise import LabelNoise, RegressionNoise
from .optim import GSAM, SAM, PerturbedOPT
from .sharpness import PACGen, Report, compare, pacgen, report

__all__ = [
    "GSAM",
    "SAM",
    "LabelNoise",
    "PACGen",
    "PerturbedOPT",
    "RegressionNoise",
    "Report",
    "compare",
    "curvature",
    "label_noise",
    "ops",
    "optim",
    "pacgen",
    "reference",
    "report",
    "sharpness",
]
__version__ = "0.1.0"
