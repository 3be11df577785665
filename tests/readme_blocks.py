"""Run the Python blocks of pages in the environment at hand: `python tests/readme_blocks.py packages/bufmgr/README.md`.

The standard library only: the nox session `install` runs this where nothing but one package and what it declares is installed.
A block that imports a module which that package only knows as an extra is left out, with a line that says so.
"""

import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
IMPORT = re.compile(r"^(?:import|from) (\w+)", re.MULTILINE)


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each block; blank lines keep the page's own line numbers in a traceback."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(1))
        yield line + 1, "\n" * line + match.group(1)


def run_block(page: Path, text: str) -> None:
    """Run a block in a fresh namespace."""
    exec(compile(text, str(page), "exec"), {"__name__": "example"})


def main(pages: list[str]) -> int:
    """Run every page's blocks, each in an empty folder; 1 where a page had none to run."""
    for page in (Path(name).resolve() for name in pages):
        ran = 0
        for line, text in blocks(page):
            missing = [name for name in IMPORT.findall(text) if importlib.util.find_spec(name) is None]
            if missing:
                print(f"{page.name}:{line}: left out, not installed here: {', '.join(missing)}")
                continue
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                run_block(page, text)
                os.chdir(page.parent)
            ran += 1
        print(f"{page.parent.name}/{page.name}: {ran} blocks ran")
        if not ran:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
