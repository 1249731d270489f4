"""The name that :class:`flatmin.SAM` had in version 0.1."""

from .optim.sam import SAM

__all__ = ["SAM"]
