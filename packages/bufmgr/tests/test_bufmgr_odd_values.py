"""Every public signature with a table of odd values: it serves, or raises an error that names the parameter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import longattn.bufmgr as package
from longattn.bufmgr import (
    AllocationTrace,
    ArenaAllocator,
    AttentionBufferManager,
    BufferConfig,
    BufferType,
    FailureCallbackAllocator,
    LimitingAllocator,
    LoggingAllocator,
    MemoryPool,
    NumaAllocator,
    PoisoningAllocator,
    RecordingAllocator,
    StatisticsAllocator,
    StepLearner,
    SystemAllocator,
    TieredBuffers,
    TraceEvent,
    create_attention_buffer_manager,
    migrate,
    numa_policy,
    numa_topology,
    plan_memory,
    prometheus_text,
    read_device_memory,
    read_placement,
)

TEMP = BufferType.TEMP


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(3)


ODD: dict[str, Any] = {
    "None": None,
    "True": True,
    "0": 0,
    "-1": -1,
    "1.5": 1.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "2**70": 2**70,
    "complex": 1j,
    "empty text": "",
    "text": "banana",
    "long text": "x" * 10**5,
    "long number": 10**5000,
    "long list": ["x" * 100] * 10**4,
    "bytes": b"temp",
    "list": [],
    "nested list": [[1]],
    "dict": {},
    "set": {3},
    "object": object(),
    "type": int,
    "function": len,
    "tensor": torch.ones(3),
    "scalar tensor": torch.tensor(2),
    "sparse": torch.eye(3).to_sparse(),
    "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "meta": torch.ones(2, device="meta"),
    "fake": fake(),
    "dtype": torch.float32,
    "device": torch.device("cpu"),
}

# Made anew for each call: (the callable, arguments that it serves)
CALLS: dict[str, Callable[[], tuple[Callable[..., Any], dict[str, Any]]]] = {}


def call(make: Callable[[], tuple[Callable[..., Any], dict[str, Any]]]) -> None:
    CALLS[make.__name__] = make


def request(**more: Any) -> dict[str, Any]:
    return {"type": TEMP, "shape": (3,), "dtype": torch.float32, "device": "cpu", "zero_init": False, **more}


FLAGS = (
    "enable_reuse",
    "enable_preallocation",
    "enable_profiling",
    "lightweight",
    "debug",
    "adaptive_cache",
    "device_pools",
)
OPTIONS = {
    "custom_configs": None,
    "upstream": None,
    "cleanup": "adaptive",
    "numa": "prefer",
    **dict.fromkeys(FLAGS, False),
}


@call
def allocate():
    return AttentionBufferManager().allocate, request()


@call
def tiered_buffers():
    return TieredBuffers, {"max_device_bytes": 64, "manager": None}


@call
def step_learner():
    return StepLearner, {"manager": AttentionBufferManager()}


@call
def hold():
    return TieredBuffers(64).hold, {"tensor": torch.ones(2)}


@call
def prepare():
    return AttentionBufferManager().prepare, request()


@call
def allocate_like():
    arguments = request(tensor=torch.ones(2))
    del arguments["shape"]
    return AttentionBufferManager().allocate_like, arguments


@call
def deallocate():
    manager = AttentionBufferManager()
    return manager.deallocate, {"tensor": manager.allocate(TEMP, (3,)), "type": TEMP}


@call
def empty():
    return AttentionBufferManager().empty, {"shape": (3,), "dtype": torch.float32, "device": "cpu", "role": "temp"}


@call
def release():
    pool = MemoryPool()
    return pool.release, {"tensor": pool.empty((3,), torch.float32), "role": "temp"}


@call
def strategy():
    return AttentionBufferManager().strategy, {"type": TEMP, "shape": (3,), "dtype": torch.float32}


@call
def preallocate_buffers():
    sizes = {"batch_size": 1, "seq_len": 2, "num_heads": 1, "head_dim": 2}
    return AttentionBufferManager().preallocate_buffers, {**sizes, "dtype": torch.float32, "device": "cpu"}


@call
def clear_cache():
    return AttentionBufferManager().clear_cache, {"type": TEMP}


@call
def keep():
    manager = AttentionBufferManager()
    scope = manager.scope()
    tensor = manager.allocate(TEMP, (3,))
    scope.add(tensor, next(iter(manager._book.leases.values())))
    return scope.keep, {"tensor": tensor}


@call
def manager():
    return AttentionBufferManager, OPTIONS


@call
def create():
    return create_attention_buffer_manager, OPTIONS


@call
def pool():
    return MemoryPool, {"upstream": None, "max_cached_buffers": 2, "max_cached_mb": 1.0, "cleanup": "adaptive"}


@call
def pool_memory_stats():
    return MemoryPool().memory_stats, {"device": "cpu"}


@call
def config():
    return BufferConfig, dict(BufferConfig().__dict__)


@call
def read_memory():
    return read_device_memory, {"device": torch.device("cpu")}


@call
def arena():
    return ArenaAllocator, {"upstream": None, "limit_bytes": None, "floor_bytes": 0, "huge_pages": None}


@call
def statistics():
    return StatisticsAllocator, {"upstream": SystemAllocator()}


@call
def limiting():
    return LimitingAllocator, {"upstream": SystemAllocator(), "limit_bytes": 100}


@call
def logging():
    return LoggingAllocator, {"upstream": SystemAllocator()}


@call
def failure_callback():
    arguments = {"upstream": SystemAllocator(), "on_refusal": lambda nbytes: False, "max_retries": 2}
    return FailureCallbackAllocator, arguments


@call
def poisoning():
    return PoisoningAllocator, {"upstream": SystemAllocator()}


@call
def recording():
    return RecordingAllocator, {"upstream": SystemAllocator(), "max_events": 10}


@call
def allocation_trace():
    return AllocationTrace, {"events": [TraceEvent(0.0, "refuse", -1, 10)]}


@call
def prometheus():
    return prometheus_text, {"sources": {"pool": MemoryPool()}}


@call
def numa_allocator():
    return NumaAllocator, {"upstream": SystemAllocator(), "policy": "prefer", "nodes": None}


@call
def policy_of_a_thread():
    return lambda **arguments: numa_policy(**arguments).__enter__(), {"policy": "prefer", "nodes": None}


@call
def placement():
    return read_placement, {"tensor": torch.ones(3)}


@call
def migration():
    return migrate, {"tensor": torch.ones(3), "node": numa_topology().memory_nodes[0]}


@call
def plan():
    class AnyShapes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return self.weight * 2

    return plan_memory, {"module": AnyShapes(), "shapes": [(4, 3)], "backward": True}


STACK: list[Callable[[], Any]] = [
    SystemAllocator,
    ArenaAllocator,
    MemoryPool,
    lambda: StatisticsAllocator(SystemAllocator()),
    lambda: LimitingAllocator(SystemAllocator(), 100),
    lambda: LoggingAllocator(SystemAllocator()),
    lambda: FailureCallbackAllocator(SystemAllocator(), lambda nbytes: False),
    lambda: PoisoningAllocator(SystemAllocator()),
    lambda: RecordingAllocator(SystemAllocator()),
    lambda: NumaAllocator(SystemAllocator(), "prefer"),
]
for number, make in enumerate(STACK):
    CALLS[f"allocate {number}"] = lambda make=make: (make().allocate, {"nbytes": 10})

    def give_back(make: Callable[[], Any] = make) -> tuple[Callable[..., Any], dict[str, Any]]:
        allocator = make()
        return allocator.deallocate, {"block": allocator.allocate(10)}

    CALLS[f"deallocate {number}"] = give_back


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS.keys())
def test_odd_values(make: Callable[[], tuple[Callable[..., Any], dict[str, Any]]]):
    function, arguments = make()
    function(**arguments)
    wrong = []
    for parameter in arguments:
        for name, value in ODD.items():
            function, good = make()
            try:
                function(**{**good, parameter: value})
            except MemoryError:
                pass
            except (TypeError, ValueError) as error:
                if parameter not in str(error) or len(str(error)) > 5000:
                    wrong.append((parameter, name, repr(error)[:200]))
            except Exception as error:  # noqa: BLE001 - which one it is, is what the test reports
                wrong.append((parameter, name, repr(error)[:200]))
    assert wrong == [], "\n".join(map(str, wrong))


def test_every_public_callable_is_here_or_needs_no_arguments():
    """A new public name shows up in this test, so that it is tried, too."""
    tried = [getattr(make()[0], "__self__", make()[0]) for make in CALLS.values()]
    kinds = [value if callable(value) else type(value) for value in tried]
    without = {
        "BufferType", "DEFAULT_CONFIGS", "Allocator", "TensorAllocator", "Block", "Statistics", "OutstandingBuffer", "TraceEvent",
        "Strategy", "MemoryReading", "PreparedSlot", "get_global_memory_pool", "reset_global_memory_pool",
        "NumaNode", "NumaTopology", "Placement", "numa_policy", "numa_topology", "MemoryPlan", "Lifetime",
        "TieredBuffer", "ExpectedRequest",
    }  # fmt: skip
    assert {name for name in package.__all__ if not any(getattr(package, name) is kind for kind in kinds)} == without
