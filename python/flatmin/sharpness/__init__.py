"""How flat a minimum is: the loss in the neighbourhood of the weights, and what it says of unseen data."""

from ._directions import filter_normalised
from ._expected import expected_sharpness
from ._keskar import Keskar, keskar
from ._landscape import line, plane
from ._landscape_result import Landscape
from ._m_sharpness import MSharpness, m_sharpness
from ._pacgen import PACGen, pacgen

__all__ = [
    "Keskar",
    "Landscape",
    "MSharpness",
    "PACGen",
    "expected_sharpness",
    "filter_normalised",
    "keskar",
    "line",
    "m_sharpness",
    "pacgen",
    "plane",
]
