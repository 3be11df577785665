"""Cases for every rank: training with torch's own tools."""

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ring_process_setup import LONGNET, RANK, WORLD, engines, randn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from longattn.attention import (
    Local,
    MultiheadPatternAttention,
    PatternAttention,
    Ring,
    pattern_attention,
)
from longattn.attention.schedules.base import Schedule
from longattn.attention.schedules.sharding import shard_sequence


def case_tensors_sharded_on_the_sequence() -> None:
    """DTensors in, DTensors out: values and gradients are Local's, at lengths that do not divide; other placements are refused."""
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("ring",))
    for length in (37, 3):
        shapes = ((8, 4), (4, 4), (4, 6))
        whole = [randn(2, length, *shape, seed=n) for n, shape in enumerate(shapes)]
        leaves = [distribute_tensor(x, mesh, [Shard(1)]).requires_grad_() for x in whole]
        out, lse = pattern_attention(leaves[0], leaves[1], leaves[2], LONGNET, return_lse=True)
        assert isinstance(out, DTensor) and out.placements == (Shard(1),) and out.shape == (2, length, 8, 6)
        grads = torch.autograd.grad(out.full_tensor().square().sum(), leaves)
        plain = [x.requires_grad_() for x in whole]
        expected, expected_lse = pattern_attention(plain[0], plain[1], plain[2], LONGNET, return_lse=True)
        torch.testing.assert_close([out.full_tensor(), lse.full_tensor()], [expected, expected_lse])  # type: ignore[union-attr]
        wanted = torch.autograd.grad(expected.square().sum(), plain)
        torch.testing.assert_close([x.full_tensor() for x in grads], list(wanted))
    by_number = distribute_tensor(whole[0].detach(), mesh, [Shard(3)])
    with pytest.raises(ValueError, match="q must have its sequence and its heads sharded"):
        pattern_attention(by_number, by_number, by_number, LONGNET)
    with pytest.raises(TypeError, match="k must be a DTensor"):
        pattern_attention(leaves[0], whole[1], whole[2], LONGNET)


def case_compiled_and_checkpointed() -> None:
    """fullgraph on every rank, gradients included; recomputation drops the same pairs."""
    for schedule in engines()[:1] + engines()[-1:]:
        attention = PatternAttention(LONGNET, schedule=schedule)
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        x = shard_sequence(randn(1, 37, 8, 4), schedule)[0].requires_grad_()
        found, expected = compiled(x, x, x), attention(x, x, x)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in (found, expected)))
        grads = []
        for again in (False, True):
            torch.manual_seed(RANK)

            def block(y: torch.Tensor, schedule: Schedule = schedule) -> torch.Tensor:
                return pattern_attention(y.sin(), y, y, LONGNET, dropout_p=0.4, schedule=schedule)

            y = checkpoint(block, x, use_reentrant=False) if again else block(x)
            grads.append(torch.autograd.grad(y.square().sum(), x))
        torch.testing.assert_close(*grads)


class SmallLongNet(nn.Module):
    """Tokens to next tokens: two blocks of dilated attention, positions given from outside."""

    def __init__(self, schedule: Schedule | None) -> None:
        super().__init__()
        wide = {"dtype": torch.float64}
        self.embed, self.place, self.head = (
            nn.Embedding(11, 16, **wide),
            nn.Embedding(64, 16, **wide),
            nn.Linear(16, 11, **wide),
        )
        self.blocks = nn.ModuleList(
            MultiheadPatternAttention(16, 4, LONGNET, schedule=schedule, **wide) for _ in range(2)
        )

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.place(positions)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


TOKENS = torch.randint(11, (2, 38), generator=torch.Generator().manual_seed(5))


def trained(
    schedule: Schedule, wrap=lambda model: model, batch: slice = slice(None), steps: int = 20
) -> tuple[list[float], nn.Module]:
    """The losses of some steps; each rank's share of the sum, which torch's wrappers average, counts WORLD times."""
    torch.manual_seed(0)
    model = wrap(SmallLongNet(schedule))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    (tokens, positions), (wanted, _) = (shard_sequence(x[batch], schedule) for x in (TOKENS[:, :-1], TOKENS[:, 1:]))
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(tokens, positions).flatten(0, 1), wanted.flatten(), reduction="sum")
        loss = loss / TOKENS[:, 1:].numel()
        optimizer.zero_grad()
        (loss * WORLD).backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
    return losses, model


def alone() -> list[float]:
    """The losses of one process on the whole; every rank computes all of them, so each counts one WORLD-th."""
    torch.manual_seed(0)
    model = SmallLongNet(Local())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    positions, losses = torch.arange(37), []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(TOKENS[:, :-1], positions).flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def case_training_gives_the_losses_of_one_process() -> None:
    """20 steps of a small LongNet in float64 under DistributedDataParallel: every loss to 1e-9, whatever the layout."""
    expected = alone()
    assert expected[-1] < 0.8 * expected[0]
    for schedule in engines()[:3]:
        losses, _ = trained(schedule, DistributedDataParallel)
        assert losses == pytest.approx(expected, abs=1e-9), schedule


def case_one_mesh_for_batches_sequence_and_heads() -> None:
    """FSDP2, torch's tensor-parallel plans and a ring in one DeviceMesh, as `examples/train_mesh.py` has them: the losses do not depend on the mesh,
    and half a run that goes on from its checkpoint is the run."""
    path = Path(__file__).parents[3] / "examples" / "train_mesh.py"
    spec = importlib.util.spec_from_file_location("train_mesh", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    shared = [tempfile.mkdtemp() if RANK == 0 else None]
    dist.broadcast_object_list(shared)
    shapes = {1: [(1, 1, 1)], 2: [(1, 2, 1), (1, 1, 2)], 4: [(1, 2, 2), (2, 2, 1)]}[WORLD]
    curves = []
    for number, shape in enumerate(shapes):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "cp", "tp"))
        folder = Path(str(shared[0])) / str(number)
        folder.mkdir(exist_ok=True)
        given = argparse.Namespace(length=64, batch=2, steps=4, every=2, kill_at=-1, out=folder)
        if number == 0:
            # A folder in which a run ended after two steps.
            example.train(argparse.Namespace(**(vars(given) | {"steps": 2})), mesh)
        example.train(given, mesh)
        dist.barrier()
        rows = [line.split(",") for line in (folder / "losses.csv").read_text().splitlines()]
        curves.append([float(loss) for _, loss in rows])
    assert len(curves[0]) == 4
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=1e-12)


def case_fsdp_on_a_mesh_and_checkpoints() -> None:
    """A data dimension and a ring dimension: batches over one, the sequence over the other, parameters over both; then saved and read."""
    data = 2 if WORLD == 4 else 1
    mesh = init_device_mesh("cpu", (data, WORLD // data), mesh_dim_names=("data", "ring"))
    ring = Ring(mesh["ring"], layout="zigzag")
    row = mesh["data"].get_local_rank()
    batch = slice(row, row + 1) if data == 2 else slice(None)
    flat = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("all",))

    def wrap(model: nn.Module) -> nn.Module:
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=flat)
        return fully_shard(model, mesh=flat)

    losses, model = trained(ring, wrap, batch)
    assert losses == pytest.approx(alone(), abs=1e-9)
    shared = [tempfile.mkdtemp() if RANK == 0 else None]
    dist.broadcast_object_list(shared)
    assert shared[0] is not None
    dcp.save({"model": model.state_dict()}, checkpoint_id=shared[0])
    other = SmallLongNet(Local())
    state = other.state_dict()
    dcp.load({"model": state}, checkpoint_id=shared[0])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value.full_tensor())  # type: ignore[operator]
    assert RANK or os.listdir(Path(shared[0]))
