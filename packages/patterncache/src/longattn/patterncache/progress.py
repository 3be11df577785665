"""`progress`: what goes on for long says so, once and in one place: on stderr where that is a terminal, else by logging."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from threading import Timer
from time import perf_counter

PATIENCE = 2.0
"""Seconds that nobody asks about."""


@contextmanager
def progress(what: str, logger: logging.Logger, after: float = PATIENCE) -> Generator[None]:
    """Say what goes on in the context, once it has lasted `after` seconds, and at its end how long it took.

    Args:
        what: such as "importing a mask of 65536 tokens"; a thread of its own says it where `after` is not 0.
        logger: where stderr is no terminal, two records of level INFO go here.
        after: seconds; 0 says it at once. What ends before says nothing.
    """
    begun, said = perf_counter(), False

    def say() -> None:
        nonlocal said
        said = True
        _tell(f"longattn: {what} ...", what, logger)

    timer = Timer(after, say)
    timer.daemon = True
    if after == 0:
        say()
    else:
        timer.start()
    outcome = "failed"
    try:
        yield
        outcome = "done"
    finally:
        timer.cancel()
        if said:
            took = f"{outcome} in {perf_counter() - begun:.1f} s"
            _tell(f" {took}\n", f"{what}: {took}", logger)


def _tell(on_terminal: str, record: str, logger: logging.Logger) -> None:
    stderr = sys.stderr  # None where a process has none
    if stderr is not None and stderr.isatty():
        stderr.write(on_terminal)
        stderr.flush()
    else:
        logger.info("%s", record)
