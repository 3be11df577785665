"""Attention on a GPU: `python -m benchmarks.gpu`. Needs python, torch and triton, and finds the four packages in this checkout.

Set before torch and triton are imported: where the packages are, and, with `--dry`, that triton interprets.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for _package in ("bufmgr", "patterncache", "kernels", "attention"):
    sys.path.insert(0, str(ROOT / "packages" / _package / "src"))
if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
