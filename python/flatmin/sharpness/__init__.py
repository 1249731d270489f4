"""How flat a minimum is: the loss in the neighbourhood of the weights, and what it says of unseen data."""

from ._expected import expected_sharpness
from ._keskar import Keskar, keskar
from ._m_sharpness import MSharpness, m_sharpness
from ._pacgen import PACGen, pacgen

__all__ = ["Keskar", "MSharpness", "PACGen", "expected_sharpness", "keskar", "m_sharpness", "pacgen"]
