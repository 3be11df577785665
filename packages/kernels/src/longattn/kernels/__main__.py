"""`python -m longattn.kernels build` compiles the native CPU row beforehand, all parts of it."""

from __future__ import annotations

import argparse
import os
import sys

from longattn.kernels.native import building
from longattn.kernels.native.cpu import CHOICES


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m longattn.kernels", description="Attention kernels of longattn.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser(
        "build",
        help="compile the native CPU row now rather than in its first call",
        description="Compile the native CPU row for this processor into the cache folder (LONGATTN_CACHE), and print the path of each of its libraries.",
    )
    build.add_argument("--level", choices=CHOICES, help="widest form to use (default: what this processor has)")
    options = parser.parse_args(arguments)
    if options.level is not None:
        os.environ["LONGATTN_NATIVE"] = options.level
    try:
        for part in building.PARTS:
            print(building.build_native(part))
    except building.NativeBuildError as problem:
        print(f"longattn: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
