"""What mkdocs is told about this repository: the README is the first page, and pages link to files outside docs/.

A link that begins with ``../`` leads out of the site. Its file must exist in the repository; on the site, which has no
copy of the sources, its text is enough.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)]*)?\)")
PICTURE = re.compile(r"!\[([^\]]*)\]\(docs/([^)\s]+)\)")
log = logging.getLogger("mkdocs.hooks.flatmin")


def on_files(files: Any, config: Any) -> Any:
    """The README becomes index.md, with its links and pictures seen from docs/."""
    readme = (ROOT / "README.md").read_text()
    files.append(File.generated(config, "index.md", content=_seen_from_docs(readme)))
    return files


def _seen_from_docs(readme: str) -> str:
    def seen(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        if "://" in target:
            return match[0]
        return f"[{text}]({posixpath.relpath(target, 'docs')}{anchor or ''})"

    return LINK.sub(seen, PICTURE.sub(r"![\1](\2)", readme))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        if "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return match[0]
        if path == "README.md":
            return f"[{text}]({posixpath.relpath('index.md', folder or '.')}{anchor or ''})"
        if not (ROOT / path).exists():
            log.warning("%s: links to %s, which is not in the repository", page.file.src_uri, path)
        return text if text.startswith("`") else f"{text} (`{path}`)" if text != path else f"`{path}`"

    return LINK.sub(replaced, markdown)
