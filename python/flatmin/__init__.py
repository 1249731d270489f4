"""flatmin: training into flat minima, fused.

::

    opt = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)

:class:`SAM` wraps any torch optimizer; :mod:`flatmin.ops` holds the operators for loops of your own.
"""

from . import ops
from .sam import SAM

__all__ = ["SAM", "ops"]
__version__ = "0.1.0"
