"""Experiments over plain calls: two functions without arguments, and a gate of one's own."""

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.experiment import Labels, Path, Side, Targets

Make = Callable[[], Callable[[], object]]


@dataclass(frozen=True)
class Calls:
    """An experiment (the protocol of `benchmarks/experiment.py`) over two calls.

    `ours` and `peer` make what is timed; `gate` says what is wrong with either, a sentence each. `input_bytes` is what memory growth is
    told in: 1 where there are no inputs to speak of, so that it is bytes.
    """

    name: str
    labels: Labels
    targets: Targets
    ours: Make = field(compare=False, repr=False)
    peer: Make = field(compare=False, repr=False)
    gate: Callable[[], list[str]] = field(compare=False, repr=False)
    input_bytes: int = 1

    @property
    def key(self) -> str:
        """Name, peer and length."""
        return f"{self.name}-{self.labels.peer}-{self.labels.seq_len}"

    def prepare(self, side: Side) -> Path:
        """One side, made."""
        call = (self.ours if side == "ours" else self.peer)()
        return Path(call=call, first_call=call, input_bytes=self.input_bytes)

    def check(self) -> list[str]:
        """The gate."""
        return self.gate()
