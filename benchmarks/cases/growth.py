"""LongNet from 32768 to a million tokens: time a token and peak memory over q+k+v stay what they are at the first length.

H=2, D=64, segments 2048/4096/8192 with rates 1/2/4, forward to 1048576 tokens, forward + backward to 131072. The peer is the same call on
32768 tokens, as often as makes up the length: a ratio of 1 is as much time a token. `python -m benchmarks.cases.growth` draws the rows.
"""

import csv
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks import gate, record
from benchmarks.cases.attention import RATES, SEGMENTS, branch_names
from benchmarks.comparison import Inputs
from benchmarks.experiment import DIRECTIONS, Direction, Labels, Path, Side, Targets
from longattn.attention import pattern_attention
from longattn.patterncache import Dilated

FIRST, LENGTHS = 32768, (32768, 131072, 524288, 1048576)
LONGEST: dict[Direction, int] = {"forward": LENGTHS[-1], "forward+backward": 131072}
HEADS = (2, 64)
AT_LEAST, MOST_GROWTH = 0.95, {"forward": 0.4, "forward+backward": 1.6}
_CHECKED_ROWS = 8


@dataclass(frozen=True)
class Growing:
    """One length beside the first (the protocol of `benchmarks/experiment.py`)."""

    labels: Labels
    targets: Targets
    inputs: Inputs
    segments: tuple[int, ...]
    first: int

    @property
    def key(self) -> str:
        """dtype, length and direction."""
        return f"{self.labels.dtype}-{self.labels.seq_len}-{self.labels.direction}"

    @property
    def pattern(self) -> Dilated:
        """The same at every length."""
        return Dilated(self.segments, RATES)

    def prepare(self, side: Side) -> Path:
        """The whole length at once, or the first length again and again."""
        length = self.inputs.seq_len
        times, tokens = (1, length) if side == "ours" else (length // self.first, self.first)
        call = self._call(tokens)

        def run() -> None:
            for _ in range(times):
                call()

        bytes_of_peer = Inputs(self.first, self.inputs.dtype, self.inputs.per_token).bytes
        return Path(run, self._call(256), self.inputs.bytes if side == "ours" else bytes_of_peer)

    def check(self) -> list[str]:
        """Sampled rows of the whole length beside float64."""
        q, k, v, grad = self.inputs.tensors()
        rows = gate.sampled_rows(self.inputs.seq_len, (), _CHECKED_ROWS)
        truth = gate.oracle(q, k, v, grad, self.pattern, rows)
        gradients = self.labels.direction != "forward"
        errors = gate.errors(self._attention, q, k, v, grad, truth, gradients=gradients)
        return gate.red("ours", errors, q.dtype)

    def _attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return pattern_attention(q, k, v, self.pattern)

    def _call(self, tokens: int) -> Callable[[], object]:
        q, k, v, grad = self.inputs.tensors(tokens)
        if self.labels.direction == "forward":
            return lambda: self._attention(q, k, v)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        return lambda: torch.autograd.grad(self._attention(*inputs), inputs, grad)


def experiments(quick: bool) -> Iterator[Growing]:
    """Every row of the case; `quick` gives tiny ones without targets."""
    lengths, first = ((64, 256), 64) if quick else (LENGTHS, FIRST)
    segments = (16, 32, 64) if quick else SEGMENTS
    for dtype, direction, length in itertools.product(("float32", "bfloat16"), DIRECTIONS, lengths):
        if length > LONGEST[direction] or (quick and dtype != "float32"):
            continue
        inputs = Inputs(length, dtype, (2, 16) if quick else HEADS)
        heads, head_dim = inputs.per_token
        variant = f"dilated {branch_names(segments, RATES)} h{heads} d{head_dim}"
        labels = Labels("growth", variant, f"{first} tokens at a time", dtype, length, False, direction)
        targets = Targets() if quick else Targets(ratio=AT_LEAST, growth=MOST_GROWTH[direction])
        yield Growing(labels, targets, inputs, segments, first)


def draw() -> None:
    """The recorded rows as `results/growth.svg`: microseconds a token, and growth, over length."""
    import matplotlib

    matplotlib.use("Agg")
    # The same figure gives the same file.
    matplotlib.rcParams["svg.hashsalt"] = "longattn"
    from matplotlib import pyplot

    rows = list(csv.DictReader((record.RESULTS / "growth.csv").read_text().splitlines()))
    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(9, 3))
    for dtype, direction in sorted({(row["dtype"], row["direction"]) for row in rows}):
        # Of several rows of a length the last is the newest.
        mine = {int(row["seq_len"]): row for row in rows if (row["dtype"], row["direction"]) == (dtype, direction)}
        lengths = sorted(mine)
        label = f"{dtype}, {direction}"
        times.plot(lengths, [float(mine[n]["our_cpu_ms"]) * 1e3 / n for n in lengths], "o-", label=label)
        grown = [(n, float(mine[n]["our_growth"])) for n in lengths if mine[n]["our_growth"]]
        memory.plot([n for n, _ in grown], [growth for _, growth in grown], "o-", label=label)
    for axes, title in ((times, "CPU microseconds a token"), (memory, "peak memory over q + k + v")):
        axes.set(xscale="log", xlabel="tokens", title=title)
        axes.set_ylim(bottom=0)
    times.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(record.RESULTS / "growth.svg", metadata={"Date": None})


if __name__ == "__main__":
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("matplotlib draws the plot: install it")
    draw()
