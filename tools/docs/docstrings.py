"""The docstrings of this project name objects as Sphinx does; the site is Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`[~!]?([^`<]+?)`")
BLOCK = re.compile(r"::$", re.MULTILINE)


class Markdown(griffe.Extension):
    """``:class:`SAM``` becomes code, and the colons before an indented block one."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = BLOCK.sub(":", text)
