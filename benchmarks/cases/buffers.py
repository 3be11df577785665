"""What a buffer costs: the manager beside torch.empty, in one process and under the malloc that this process has.

A buffer is (seq_len, 8, 64) in float32: 2 tokens are 4 KB, 512 are 1 MB, 32768 are 64 MB.

    touch        take a buffer, write every element, drop it; beside the same with torch.empty
    keyed        `allocate` by type, shape, dtype and device, and drop of the last reference
    slot         `acquire` of a prepared slot, and drop
    deallocate   `allocate` and `deallocate`, which empties the handle

The last three are 1000 calls without touching memory, so their milliseconds are microseconds a call; promised are 0.6,
0.4 and 2.5. Run with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ set high for the tuned malloc.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.experiment import Labels, Path, Side, Targets
from longattn.bufmgr import AttentionBufferManager, BufferType

_CALLS = 1000
_CPU = torch.device("cpu")
_TEMP = BufferType.TEMP


@dataclass(frozen=True)
class BufferExperiment:
    """An experiment (the protocol of `benchmarks/experiment.py`): one way of taking buffers, beside torch.empty."""

    labels: Labels
    targets: Targets
    way: str

    @property
    def key(self) -> str:
        """The way and the length."""
        return f"{self.way}-{self.labels.seq_len}"

    def prepare(self, side: Side) -> Path:
        """One side with a manager of its own."""
        shape = (self.labels.seq_len, 8, 64)
        step = _torch_step(self.way, shape) if side == "peer" else _our_step(self.way, shape)
        calls = max(1, min(_CALLS, 2**22 // self.labels.seq_len // 64)) if self.way == "touch" else _CALLS

        def call() -> None:
            for _ in range(calls):
                step()

        return Path(call=call, first_call=step, input_bytes=self.labels.seq_len * 8 * 64 * 4)

    def check(self) -> list[str]:
        """Two buffers in use at once are apart, of the right form, and reuse happens."""
        manager = AttentionBufferManager()
        shape = (self.labels.seq_len, 8, 64)
        first, second = (manager.allocate(_TEMP, shape, torch.float32).fill_(n) for n in (1.0, 2.0))
        failures = [] if bool((first == 1.0).all()) and bool((second == 2.0).all()) else ["buffers overlap"]
        del first
        manager.deallocate(second, _TEMP)
        manager.allocate(_TEMP, shape, torch.float32)
        if manager.get_stats()["cache_hits"] != 1:
            failures.append("a buffer that came back was not reused")
        return failures


def _our_step(way: str, shape: tuple[int, ...]) -> Callable[[], object]:
    manager = AttentionBufferManager()
    if way == "slot":
        return manager.prepare(_TEMP, shape, torch.float32, _CPU).acquire
    if way == "keyed":
        return lambda: manager.allocate(_TEMP, shape, torch.float32, _CPU)
    if way == "touch":
        return lambda: manager.allocate(_TEMP, shape, torch.float32, _CPU).fill_(1.0)

    def and_deallocate() -> None:
        tensor = manager.allocate(_TEMP, shape, torch.float32, _CPU)
        manager.deallocate(tensor, _TEMP)

    return and_deallocate


def _torch_step(way: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    if way == "touch":
        return lambda: torch.empty(shape, dtype=torch.float32).fill_(1.0)
    return lambda: torch.empty(shape, dtype=torch.float32)


def experiments(quick: bool) -> Iterator[BufferExperiment]:
    """Every row of the case."""
    rows = [("touch", 2, 1.5), ("touch", 512, 1.1), ("touch", 8192, 1.1), ("touch", 32768, 8.0)]
    rows += [("keyed", 512, None), ("slot", 512, 4.0), ("deallocate", 512, None)]
    for way, seq_len, ratio in rows:
        length = max(2, seq_len // 128) if quick else seq_len
        labels = Labels("buffers", f"{way} h8 d64", "torch.empty", "float32", length, False, "forward")
        yield BufferExperiment(labels, Targets(ratio=None if quick else ratio), way)
