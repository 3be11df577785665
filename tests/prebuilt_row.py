"""What a user without a compiler gets from a platform wheel: every level that this processor has serves, right, with nothing compiled.

The session `platform-wheels` runs it where only such a wheel is installed.
"""

import json
import os
import subprocess
import sys

SERVES = """
import json
import torch
from longattn.kernels import attend, build_native, installation, reference_attention
from longattn.patterncache import Dilated
pattern = Dilated((8, 16, 32), (1, 2, 4), causal=True)
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 300, 4, 40)
state = attend(q, k, v, pattern, backend="native")
expected = reference_attention(q, k, v, pattern.to_dense(300, 4))
torch.testing.assert_close(state.out, expected.out.float(), atol=1e-5, rtol=1e-4)
native = installation()["native"]
built = [str(build_native(part)) for part in native["libraries"]]
print(json.dumps([native["level"], list(native["libraries"].values()), native["compiler"], native["levels"], built]))
"""


def served(level: str) -> tuple[str, list[str]]:
    """The level that served, and those that could."""
    answer = subprocess.run(
        [sys.executable, "-P", "-c", SERVES],
        env={**os.environ, "LONGATTN_NATIVE": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    name, libraries, compiler, levels, built = json.loads(answer.stdout)
    assert compiler is None and all("prebuilt" in path for path in libraries) and built == libraries, answer.stdout
    return name, levels


if __name__ == "__main__":
    widest, levels = served("")
    assert widest == levels[0]
    assert levels == [served(level)[0] for level in levels]
    assert not os.path.exists(os.environ["LONGATTN_CACHE"])
    print("without a compiler:", ", ".join(levels))
