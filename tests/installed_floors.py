"""What a session's environment must hold, and what it must not.

Run as `python -P tests/installed_floors.py editable|wheel PRESENT ABSENT`, with comma-separated import names.
"""

import importlib
import sys


def main(kind: str, present: str, absent: str) -> str:
    """Return the first fault as one sentence, or an empty string."""
    for name in present.split(","):
        path = importlib.import_module(name).__file__ or ""
        if kind == "wheel" and "site-packages" not in path:
            return f"{name} comes from {path}, not from the installed wheel"
    for name in filter(None, absent.split(",")):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        return f"{name} can be imported, but nothing that was installed declares it"
    return ""


if __name__ == "__main__":
    fault = main(*sys.argv[1:])
    print(f"floors: {fault or 'there: ' + sys.argv[2] + '; absent: ' + sys.argv[3]}")
    sys.exit(bool(fault))
