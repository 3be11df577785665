"""`main`: parse, run one subcommand, print its report, and turn a user's mistake into one line and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from longattn.attention.cli.parser import build_parser
from longattn.attention.cli.report import NO_PICTURES, print_report

USAGE_ERROR = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: words after `longattn`. Default: those of this process.

    Returns:
        The exit status: 0 done; 1 done, and the answer is no (no row serves, a check failed); 2 a mistake in the arguments, or something that
        is missing here, said in one line; 130 interrupted.
    """
    options = None
    try:
        options = build_parser().parse_args(arguments)
        # Within: torch takes long to import, and Ctrl-C may come then.
        command = import_module(f"longattn.attention.cli.{options.command}")
        report = command.run(options)
        print_report(report, as_json=options.json)
        return report.status
    except (TypeError, ValueError, OSError, ModuleNotFoundError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):
            # The reader of a pipe has gone: what is left goes nowhere, as with other commands.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if options is None or options.traceback:
            raise
        no_pictures = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("matplotlib")
        print(f"longattn {options.command}: {NO_PICTURES if no_pictures else error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
