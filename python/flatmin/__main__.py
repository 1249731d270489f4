"""``python -m flatmin``: what is installed, what it runs on, and whether it computes what it should here."""

from __future__ import annotations

import sys

from . import _installation

if __name__ == "__main__":
    sys.exit(_installation.main())
