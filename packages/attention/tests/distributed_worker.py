"""One rank of `test_distributed.py`: python distributed_worker.py RANK WORLD FILE. Prints "ok" when all of it is right."""

import copy
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from longattn.attention import LongNet

rank, world, rendezvous = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
)
torch.manual_seed(0)
options = {"segment_lengths": (8, 16), "dilation_rates": (1, 2), "dim_feedforward": 32}
model = LongNet(50, 16, 2, 2, **options, fused_qkv=True, dtype=torch.float64)
tokens = torch.randint(50, (2 * world, 21))


def loss_of(network, batch):
    """Mean cross-entropy of the next token."""
    return torch.nn.functional.cross_entropy(network(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def step(network, batch):
    """One step of SGD."""
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(network, batch).backward()
        optimizer.step()


alone = copy.deepcopy(model)
step(alone, tokens)
mine = tokens[rank * 2 : rank * 2 + 2]

replicated = DistributedDataParallel(copy.deepcopy(model))
step(replicated, mine)
for found, expected in zip(replicated.module.parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(found, expected)

sharded = copy.deepcopy(model)
mesh = init_device_mesh("cpu", (world,))
for layer in sharded.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
step(sharded, mine)
for found, expected in zip(sharded.parameters(), alone.parameters(), strict=True):
    assert found.to_local().numel() < expected.numel()
    torch.testing.assert_close(found.full_tensor(), expected.detach())

dist.destroy_process_group()
print("ok")
