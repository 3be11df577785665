"""Pages that are files of the repository elsewhere: README, glossary, licence. Their links lead to pages, as the file's links lead to files."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SHOWN = {
    "readme": "README.md",
    "glossary": "GLOSSARY.md",
    "contributing": "CONTRIBUTING.md",
    "security": "SECURITY.md",
    "licence": "LICENSE",
    "packages/bufmgr": "packages/bufmgr/README.md",
    "packages/patterncache": "packages/patterncache/README.md",
    "packages/kernels": "packages/kernels/README.md",
    "packages/attention": "packages/attention/README.md",
    "benchmarks": "benchmarks/README.md",
    "examples": "examples/README.md",
}
"""Page -> the file that it shows."""

FOLDERS = {"docs/adr": "adr/index", "benchmarks/results": "performance", "docs": "index", "examples": "examples"}
"""Folder -> the page about what is in it."""

_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]\[]*)\]\((?P<target>[^)\s]+)\)")


def page_of(path: str) -> str | None:
    """The page of a file or folder of the repository, None where it has none."""
    for page, file in SHOWN.items():
        if path == file:
            return page
    if path in FOLDERS:
        return FOLDERS[path]
    return path.removeprefix("docs/").removesuffix(".md") if re.fullmatch(r"docs/.*\.md", path) else None


def shown(page: str) -> str:
    """The Markdown of a page of `SHOWN`."""
    file = SHOWN[page]
    text = (ROOT / file).read_text(encoding="utf-8")
    if not file.endswith(".md"):
        return f"# {file.capitalize()}\n\n```text\n{text}\n```\n"
    return relinked(text, file, page)


def relinked(text: str, file: str, page: str) -> str:
    """Links and pictures of a file of the repository, said from a page's place; a file without a page is named, without a link."""

    def replaced(match: re.Match[str]) -> str:
        target, _, anchor = match["target"].partition("#")
        if not target or "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(file), target))
        folder = posixpath.dirname(page) or "."
        if match["picture"]:
            return f"![{match['text']}]({posixpath.relpath(path, posixpath.join('docs', folder))})"
        known = page_of(path)
        if known is None:
            return f"{match['text']} (`{path}`)"
        place = posixpath.relpath(known, folder) + ".md"
        return f"[{match['text']}]({place}{'#' + anchor if anchor else ''})"

    return _LINK.sub(replaced, text)
