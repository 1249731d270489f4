"""How flat a minimum is: the loss in the neighbourhood of the weights, and what it says of unseen data."""

from ._directions import filter_normalised
from ._expected import expected_sharpness
from ._keskar import Keskar, keskar
from ._landscape import line, plane
from ._landscape_result import Landscape
from ._m_sharpness import MSharpness, m_sharpness
from ._pacgen import PACGen, pacgen
from ._report import report
from ._report_result import Comparison, Report, compare

__all__ = [
    "Comparison",
    "Keskar",
    "Landscape",
    "MSharpness",
    "PACGen",
    "Report",
    "compare",
    "expected_sharpness",
    "filter_normalised",
    "keskar",
    "line",
    "m_sharpness",
    "pacgen",
    "plane",
    "report",
]
