"""`longattn memory`: run a script in this process, then say what its buffer managers, the memory pool and the pattern cache hold."""

from __future__ import annotations

import gc
import runpy
import sys
import traceback
from argparse import Namespace
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from longattn.attention.cli.report import Report, Table
from longattn.bufmgr import AttentionBufferManager, get_global_memory_pool
from longattn.patterncache import get_global_pattern_cache
from longattn.patterncache.spans import shortened

_RUNNERS = (__file__, runpy.__file__, "<frozen runpy>")
"""Files whose frames are of what runs the script, not of the script."""


def run(options: Namespace) -> Report:
    """The script runs as `__main__`, with its own arguments; its exit status is ours, 1 where it raises."""
    path = Path(options.script)
    if not path.is_file():
        raise ValueError(f"script must be a file, got {shortened(options.script)}")
    # JSON is all that stdout then has: what the script prints goes to stderr.
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        status, module = _run_script(path, options.arguments)
    pool = get_global_memory_pool().get_stats()
    cache = get_global_pattern_cache().get_stats()
    # By type: isinstance asks an object for its class, and torch has lazy ones that warn when asked.
    managers = [found for found in gc.get_objects() if issubclass(type(found), AttentionBufferManager)]
    parts: list[Table | str] = [
        Table("global memory pool", ("what", "value"), _rows(pool)),
        Table("global pattern cache", ("what", "value"), _rows(cache)),
        f"{len(managers)} buffer managers alive at the script's end",
        *(manager.memory_summary() for manager in managers),
    ]
    data = {
        "pool": pool,
        "pattern_cache": cache,
        "managers": [manager.get_stats() for manager in managers],
        "exit_status": status,
    }
    del module  # kept until here: what the script's own names hold counts
    return Report(data, parts, status=status)


def _run_script(path: Path, arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """The script's exit status and its names."""
    kept_arguments, kept_path = sys.argv, list(sys.path)
    sys.argv, sys.path[0:0] = [str(path), *arguments], [str(path.parent.resolve())]
    try:
        return 0, runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, int) or end.code is None:
            return end.code or 0, {}
        print(end.code, file=sys.stderr)
        return 1, {}
    except Exception as error:  # noqa: BLE001
        # The script's own fault, not ours: shown as the interpreter would, and what it held is told all the same.
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename in _RUNNERS:
            frames = frames.tb_next
        traceback.print_exception(error.with_traceback(frames))
        return 1, {}
    finally:
        sys.argv, sys.path[:] = kept_arguments, kept_path


def _rows(stats: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in stats.items() if not isinstance(value, dict)]
