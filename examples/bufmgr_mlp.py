"""Reused buffers in an MLP and in a data loader with spawned workers: `./run python examples/bufmgr_mlp.py`.

Inference writes its hidden activations into one buffer again and again. The loader's workers have a manager of their own: it travels with the
data set, its options with it, its memory not.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from longattn.bufmgr import AttentionBufferManager, BufferType, LimitingAllocator, SystemAllocator


class MLP(nn.Module):
    """Two layers. In inference the hidden activations lie in a buffer that comes back after each call."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.manager = AttentionBufferManager()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width) -> (batch, width)."""
        if torch.is_grad_enabled():
            return self.down(self.up(x).relu())
        with self.manager.scope():  # what is allocated inside comes back at its end
            hidden = self.manager.allocate(BufferType.TEMP, (len(x), self.up.out_features))
            torch.addmm(self.up.bias, x, self.up.weight.T, out=hidden).relu_()
            return self.down(hidden)


class Waves(Dataset[Tensor]):
    """Noisy waves. Each sample is built in a scratch buffer of this process's manager."""

    def __init__(self, samples: int, width: int) -> None:
        self.samples, self.width = samples, width
        self.manager = AttentionBufferManager()

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        with self.manager.scope():
            wave = self.manager.allocate(BufferType.TEMP, (self.width,))
            torch.arange(self.width, out=wave)
            sample = wave.mul_(0.1 * (index + 1)).sin().clone()
        # Reuse within this process: every sample but the first finds the buffer there.
        assert self.manager.get_stats()["cache_misses"] <= 1, "the scratch buffer is reused"
        return sample


def limited(width: int) -> str:
    """What a manager says that may not have more than one MiB."""
    manager = AttentionBufferManager(upstream=LimitingAllocator(SystemAllocator(), limit_bytes=2**20))
    try:
        manager.allocate(BufferType.TEMP, (2**20, width))
    except MemoryError as error:
        return str(error)
    raise AssertionError("a limit was not held")


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="spawned workers of the loader")
    given = parser.parse_args(argv)

    model = MLP(given.width, 4 * given.width).eval()
    loader = DataLoader(
        Waves(given.samples, given.width),
        batch_size=8,
        num_workers=given.workers,
        multiprocessing_context="spawn" if given.workers else None,
    )
    batches = list(loader)
    with torch.no_grad():
        outputs = [model(batch) for batch in batches]
    for batch, out in zip(batches, outputs, strict=True):
        torch.testing.assert_close(out, model.down(model.up(batch).relu()))
    stats = model.manager.get_stats()
    print(f"{given.samples} samples came from {given.workers} workers, each with a scratch buffer of its own")
    print(f"{len(batches)} batches: {stats['cache_misses']} buffer was made, {stats['cache_hits']} times it was reused")
    assert (stats["cache_misses"], stats["outstanding"]) == (1, 0)
    print(f"with a limit: {limited(given.width)}")


if __name__ == "__main__":
    main()
