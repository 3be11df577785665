"""A case for every rank: data parallel and fully sharded training of a small LongNet is training in one process."""

import copy

import torch
from ring_process_setup import RANK, WORLD
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from longattn.attention import LongNet


def loss_of(network: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    return nn.functional.cross_entropy(network(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def train(network: nn.Module, batch: Tensor) -> None:
    """Two steps of SGD."""
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(network, batch).backward()
        optimizer.step()


def case_ddp_and_fsdp2_train_as_one_process_does() -> None:
    """Two steps on a batch cut in as many parts as there are ranks give the parameters of two steps on the whole."""
    torch.manual_seed(0)
    model = LongNet(
        50,
        16,
        2,
        2,
        segment_lengths=(8, 16),
        dilation_rates=(1, 2),
        dim_feedforward=32,
        fused_qkv=True,
        dtype=torch.float64,
    )
    tokens = torch.randint(50, (2 * WORLD, 21))
    alone = copy.deepcopy(model)
    train(alone, tokens)
    mine = tokens[RANK * 2 : RANK * 2 + 2]

    replicated = DistributedDataParallel(copy.deepcopy(model))
    train(replicated, mine)
    for found, expected in zip(replicated.module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found, expected)

    sharded = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    train(sharded, mine)
    for found, expected in zip(sharded.parameters(), alone.parameters(), strict=True):
        assert isinstance(found, DTensor) and (WORLD == 1 or found.to_local().numel() < expected.numel())
        torch.testing.assert_close(found.full_tensor(), expected.detach())
