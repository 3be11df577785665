"""Training over a mesh (dp, cp, tp) of processes, which goes on from its checkpoint when a worker dies.

    ./run python -m torch.distributed.run --standalone --nproc-per-node 4 --max-restarts 1 examples/train_mesh.py --cp 2 --tp 2 --kill-at 5

Batches are cut over dp, the sequence over cp (a Ring), heads and feedforward over tp (torch's plans), and parameters over dp and cp together (FSDP2).
With --kill-at, the last rank kills itself at that step of the first run: the others print where they were, torchrun starts all workers again, and they go
on from the last checkpoint. The losses are those of a run that nothing happened to, and of one process; `train-mesh/losses.csv` has them. A folder
that has checkpoints of a run is gone on with: --out names another.
"""

import argparse
import csv
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from longattn.attention import LongNet, Ring, shard_sequence

VOCABULARY = 64


def build(mesh: DeviceMesh, ring: Ring) -> nn.Module:
    """A small LongNet in float64, cut over the mesh."""
    torch.manual_seed(0)
    model = LongNet(
        VOCABULARY, d_model=32, nhead=4, num_layers=2, segment_lengths=(16, 64), dilation_rates=(1, 2), schedule=ring,
        dtype=torch.float64,
    )  # fmt: skip
    columns = ColwiseParallel(use_local_output=False)
    # The norms between two projections see a row of all heads, or of all of the feedforward: rows are cut there.
    between, back = (
        SequenceParallel(use_local_output=False),
        RowwiseParallel(input_layouts=torch.distributed.tensor.Shard(1)),
    )
    attention = {"q_proj": columns, "k_proj": columns, "v_proj": columns, "norm": between, "out_proj": back}
    feedforward = {"linear1": columns, "norm": between, "linear2": back}
    parameters = mesh["dp", "cp"]._flatten("parameters")
    for layer in model.layers:
        if mesh["tp"].size() > 1:
            parallelize_module(layer.self_attn, mesh["tp"], attention)
            parallelize_module(layer.feedforward, mesh["tp"], feedforward)
        fully_shard(layer, mesh=parameters)
    return fully_shard(model, mesh=parameters)


def batch_of(step: int, batch: int, length: int) -> torch.Tensor:
    """(batch, length + 1) tokens: a piece of eight tokens, again and again, with a few replaced."""
    generator = torch.Generator().manual_seed(step)
    pieces = torch.randint(VOCABULARY, (batch, 8), generator=generator)
    tokens = pieces.repeat(1, length // 8 + 1)[:, : length + 1]
    noise = torch.rand(tokens.shape, generator=generator) < 0.05
    return torch.where(noise, torch.randint(VOCABULARY, tokens.shape, generator=generator), tokens)


class Progress:
    """Model, optimizer and step, as `torch.distributed.checkpoint` saves them."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        self.model, self.optimizer, self.folder = model, optimizer, folder

    def save(self, step: int) -> None:
        """Whole, and then named as the last one: a worker that dies in between leaves the one before."""
        weights, moments = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=self.folder / f"step-{step}")
        if dist.get_rank() == 0:
            (self.folder / "last.tmp").write_text(str(step))
            (self.folder / "last.tmp").rename(self.folder / "last")
        dist.barrier()

    def load(self) -> int:
        """The step of the last checkpoint, from which it goes on; 0 without one."""
        if not (self.folder / "last").exists():
            return 0
        step = int((self.folder / "last").read_text())
        weights, moments = get_state_dict(self.model, self.optimizer)
        state: dict[str, Any] = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=self.folder / f"step-{step}")
        set_state_dict(self.model, self.optimizer, model_state_dict=weights, optim_state_dict=moments)
        return step


def train(given: argparse.Namespace, mesh: DeviceMesh) -> None:
    """Steps from the last checkpoint to the last one asked for."""
    ring = Ring(mesh["cp"], layout="zigzag", lengths=given.length)
    model = build(mesh, ring)
    progress = Progress(model, torch.optim.Adam(model.parameters(), lr=3e-3), given.out)
    began = progress.load()
    data, share = mesh["dp"].get_local_rank(), given.batch // mesh["dp"].size()
    table = given.out / "losses.csv"
    losses = list(csv.reader(table.read_text().splitlines()))[:began] if began else []
    for step in range(began, given.steps):
        last = dist.get_rank() == dist.get_world_size() - 1
        if last and step == given.kill_at and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        tokens = batch_of(step, given.batch, given.length)[data * share :][:share]
        (inputs, _), (targets, _) = (shard_sequence(x, ring) for x in (tokens[:, :-1], tokens[:, 1:]))
        logits = model(inputs)
        total = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        loss = total / (given.batch * given.length)
        progress.optimizer.zero_grad()
        # FSDP takes the mean over dp and cp.
        (loss * mesh["dp"].size() * mesh["cp"].size()).backward()
        progress.optimizer.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append([str(step), repr(whole.item() / mesh["tp"].size())])
        if (step + 1) % given.every == 0 or step + 1 == given.steps:
            if dist.get_rank() == 0:
                with table.open("w", newline="") as file:
                    csv.writer(file).writerows(losses)
            progress.save(step + 1)
    if dist.get_rank() == 0:
        print(
            f"loss {float(losses[0][1]):.3f} at step 0, {float(losses[-1][1]):.3f} at step {len(losses) - 1}"
            + (f"; these workers went on from the checkpoint before step {began}" if began else "")
        )
        assert float(losses[-1][1]) < float(losses[0][1])


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("dp", "cp", "tp"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--every", type=int, default=2, help="steps between two checkpoints")
    parser.add_argument("--kill-at", type=int, default=-1)
    parser.add_argument("--out", type=Path, default=Path("train-mesh"))
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    # torchrun has one store for all its starts: without a prefix a rank may find the addresses of workers that are gone.
    store, rank, ranks = next(dist.rendezvous("env://"))
    start = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("gloo", store=start, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    train(given, init_device_mesh("cpu", (given.dp, given.cp, given.tp), mesh_dim_names=("dp", "cp", "tp")))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
