"""lucidrains' scripts, which assert that a ring, a tiled and a plain attention are the same, on our ring and our kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PEER = Path(os.environ.get("LONGATTN_PEER", "nowhere"))
pytestmark = pytest.mark.skipif(not (PEER / "assert_attn.py").is_file(), reason="LONGATTN_PEER is no such checkout")

FLASH = [[], ["--causal"], ["--rand-key-pad-mask"], ["--softclamp-qk-sim"], ["--causal", "--softclamp-qk-sim"]]
RING = [[], ["--causal"], ["--causal", "--striped-ring-attn", "--num-buckets", "1"], ["--batch-size-var-len"]]


@pytest.mark.parametrize(
    ("script", "options"),
    [
        *(("assert_flash.py", options) for options in FLASH),
        *((script, ["--world-size", "2", *options]) for script in ("assert_attn.py", "assert.py") for options in RING),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "plain",
)
def test_their_assertions_hold(script: str, options: list[str]) -> None:
    """A script ends with an error where one does not."""
    answer = subprocess.run(
        [sys.executable, str(PEER / script), *options], capture_output=True, text=True, check=False, timeout=1200
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
