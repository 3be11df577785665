"""`python -m demo`: long-context dilated attention on a real text, beside what others do."""

import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from demo.options import Options, parse
from demo.paths import PathProcess
from demo.picture import draw
from demo.refusal import RefusalError
from demo.report import NAMES, Steps, gather, show
from demo.resources import check_memory
from demo.text import read_text

_PAIRS = 3
# No new pair so many seconds after the start: a slow or busy machine gets fewer pairs, not a longer demo.
_LAST_PAIR = 70.0


def prepare(options: Options) -> tuple[Options, bytes, str]:
    """Read the text and decide the length; refuse what cannot run before anything is started.

    Returns:
        The options with their length, the text, and where it comes from.
    """
    text, source = read_text(options.file, options.seq_len)
    options = replace(options, seq_len=len(text))
    try:
        options.pattern.canonical()
    except (TypeError, ValueError) as error:
        raise RefusalError(str(error)) from error
    check_memory(options)
    return options, text, source


def measure(options: Options, text_file: Path, steps: Steps, started: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run every path in its own process; dense once, the others in interleaved pairs.

    Returns:
        What our worker said about its backend, and a result per path.
    """
    with ExitStack() as processes:
        dense, joined, ours, baseline = (
            processes.enter_context(PathProcess(path, options, text_file))
            for path in ("dense", "joined", "ours", "baseline")
        )
        with steps.step("building q, k, v from the text in four processes"):
            # Nobody is timed while another still starts.
            ready, *_ = [worker.ready() for worker in (ours, joined, baseline, dense)]
        with steps.step("dense SDPA: forward, once"):
            dense_passes = [dense.ask("run")]
            dense.close()
        with steps.step("a pattern that joins all tokens: forward and backward, twice"):
            # The first pass measures memory.
            joined.ask("run")
            results = {"joined": gather([joined.ask("run")], joined.ask("check"))}
            joined.close()
        passes: dict[str, list[dict[str, Any]]] = {"ours": [], "baseline": []}
        # The first pass of each measures memory and is the warm-up of the pairs that follow, of which one always does.
        for at in range(1 + _PAIRS):
            label = "first pass, memory" if at == 0 else f"pair {at} of {_PAIRS}, time"
            for worker in (ours, baseline):
                with steps.step(f"{worker.path}: forward and backward, {label}"):
                    in_time = time.perf_counter() - started < _LAST_PAIR
                    if at < 2 or in_time or len(passes["ours"]) > len(passes["baseline"]):
                        passes[worker.path].append(worker.ask("run"))
        for worker in (ours, baseline):
            with steps.step(f"{worker.path}: sampled rows beside the float64 oracle"):
                results[worker.path] = gather(passes[worker.path][1:], worker.ask("check"))
    results["dense"] = gather(dense_passes, {})
    return ready, {path: results[path] for path in NAMES}


def run(argv: Sequence[str] | None) -> None:
    """The whole demo.

    Raises:
        RefusalError: something the user can change stands in the way.
    """
    started = time.perf_counter()
    options, text, source = prepare(parse(argv))
    steps = Steps(total=4 + 2 * (1 + _PAIRS) + 2)
    with steps.running(), tempfile.TemporaryDirectory() as folder:
        with steps.step(f"picture of who sees whom: {options.png}"):
            assert options.seq_len is not None, "prepare decided the length"
            draw(options.pattern, options.seq_len, options.heads, Path(options.png))
        text_file = Path(folder) / "text"
        text_file.write_bytes(text)
        ready, results = measure(options, text_file, steps, started)
    show(options, source, ready, results, time.perf_counter() - started)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns:
        0; 2 after one line on standard error that says what stands in the way; 130 when interrupted.
    """
    try:
        run(argv)
    except RefusalError as refusal:
        print(f"demo: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
