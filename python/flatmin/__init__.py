"""flatmin: training into flat minima, fused.

::

    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)

:class:`SAM` wraps any torch optimizer; :func:`pacgen` and :mod:`flatmin.curvature` measure how flat a minimum is;
:mod:`flatmin.ops` holds the operators for loops of your own.
"""

from . import curvature, ops
from ._pacgen import PACGen, pacgen
from .noise import PerturbedOPT
from .sam import SAM

__all__ = ["SAM", "PACGen", "PerturbedOPT", "curvature", "ops", "pacgen"]
__version__ = "0.1.0"
