"""What a wheel of this workspace may hold: its own folder of the namespace, and its metadata.

Run as `python tests/wheel_contents.py WHEEL...`; exits non-zero with one line per fault.
"""

import sys
import zipfile
from pathlib import Path


def faults(wheel: Path) -> list[str]:
    """Return one sentence per thing in the wheel that should not be there, or is missing.

    Args:
        wheel: path of a file named ``longattn_<package>-<version>-...whl``.
    """
    distribution, version = wheel.name.split("-")[:2]
    own = f"longattn/{distribution.removeprefix('longattn_')}/"
    allowed = (own, f"{distribution}-{version}.dist-info/")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    found = [f"{wheel.name}: holds {name}, outside {own}" for name in names if not name.startswith(allowed)]
    found += [f"{wheel.name}: holds the test {name}" for name in names if "/tests/" in name]
    found += [f"{wheel.name}: misses {own}{name}" for name in ("__init__.py", "py.typed") if own + name not in names]
    return found


if __name__ == "__main__":
    problems = [fault for argument in sys.argv[1:] for fault in faults(Path(argument))]
    print(*problems, f"wheel contents: {len(sys.argv) - 1} wheels, {len(problems)} faults", sep="\n")
    sys.exit(bool(problems) or len(sys.argv) < 2)
