"""Bad input at the edge: the error names the parameter, what was expected and what came, and nothing is lost."""

import re
from fractions import Fraction
from typing import Any

import pytest
import torch

from longattn.bufmgr import AttentionBufferManager, BufferType, MemoryPool
from longattn.bufmgr.testing import FailingAllocator

Q = BufferType.QUERY


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"shape": (2, -1)}, ValueError, "shape[1] must be a whole number of 0 or more, got -1"),
        ({"shape": (2.0,)}, TypeError, "shape[0] must be a whole number of 0 or more, got 2.0"),
        ({"shape": (True, 2)}, TypeError, "shape[0] must be a whole number of 0 or more, got True"),
        ({"shape": ("3",)}, TypeError, "shape[0] must be a whole number of 0 or more, got '3'"),
        ({"shape": (None,)}, TypeError, "shape[0] must be a whole number"),
        ({"shape": (Fraction(2),)}, TypeError, "shape[0] must be a whole number"),
        ({"shape": 3}, TypeError, "shape must be a sequence of whole numbers, got 3"),
        ({"shape": "23"}, TypeError, "shape must be a sequence of whole numbers, got '23'"),
        ({"shape": None}, TypeError, "shape must be a sequence of whole numbers, got None"),
        ({"dtype": "float32"}, TypeError, "dtype must be a torch.dtype or None, got 'float32'"),
        ({"dtype": float}, TypeError, "dtype must be a torch.dtype or None, got <class 'float'>"),
        ({"dtype": torch.quint8}, TypeError, "dtype must be one that is not quantized, got torch.quint8"),
        ({"device": "banana"}, ValueError, "device must be a device that torch knows, got 'banana'"),
        ({"device": "vulkan"}, ValueError, "device must be 'cpu' or 'meta'"),
        ({"device": "cuda:4096"}, ValueError, "device must be"),
        ({"device": 1.5}, TypeError, "device must be a torch.device, str, int or None, got 1.5"),
        ({"device": True}, TypeError, "device must be a torch.device, str, int or None, got True"),
        ({"zero_init": 1}, TypeError, "zero_init must be True, False or None, got 1"),
        ({"type": "querries"}, ValueError, "type must be a BufferType or its name, one of query, key"),
        ({"type": 3}, TypeError, "type must be a BufferType or its name, one of query, key"),
    ],
)
def test_allocate_refuses(arguments: dict[str, Any], error: type[Exception], text: str):
    upstream = FailingAllocator()
    manager = AttentionBufferManager(upstream=upstream)
    with pytest.raises(error, match=re.escape(text)):
        manager.allocate(**{"type": Q, "shape": (2,), **arguments})
    stats = manager.get_stats()
    assert (stats["outstanding"], stats["cache_misses"], upstream.held_bytes) == (0, 0, 0)


@pytest.mark.parametrize("make", [AttentionBufferManager, MemoryPool])
def test_a_role_must_be_one_of_the_ten(make: type[AttentionBufferManager] | type[MemoryPool]):
    with pytest.raises(ValueError, match="role must be a BufferType or its name.*got 'scratch'"):
        make().empty((2,), torch.float32, torch.device("cpu"), "scratch")


@pytest.mark.parametrize(
    ("sizes", "error", "text"),
    [
        ((True, 4, 2, 8), TypeError, "batch_size must be a whole number of 0 or more, got True"),
        ((1, 4.0, 2, 8), TypeError, "seq_len must be a whole number of 0 or more, got 4.0"),
        ((1, 4, -2, 8), ValueError, "num_heads must be a whole number of 0 or more, got -2"),
        ((1, 4, 2, "8"), TypeError, "head_dim must be a whole number of 0 or more, got '8'"),
    ],
)
def test_preallocate_refuses(sizes: tuple[Any, ...], error: type[Exception], text: str):
    with pytest.raises(error, match=re.escape(text)):
        AttentionBufferManager().preallocate_buffers(*sizes)


@pytest.mark.parametrize("shape", [(2**44,), (2**31, 2**31), (2**62, 2**62)])
def test_absurd_sizes_are_a_clear_memory_error(shape: tuple[int, ...]):
    """Nothing is lost: what was cached and leased before is still there."""
    manager = AttentionBufferManager()
    held = manager.allocate(Q, (16,)).fill_(5)
    manager.deallocate(manager.allocate(Q, (8, 8)), Q)
    with pytest.raises(MemoryError, match=re.escape(f"a buffer of shape {shape}, torch.float32")):
        manager.allocate(Q, shape)
    stats = manager.get_stats()
    assert (stats["outstanding"], stats["cached_buffers"], held.tolist()) == (1, 1, [5.0] * 16)
    with pytest.raises(MemoryError):
        manager.preallocate_buffers(2**20, 2**20, 2**10, 2**10)


def test_absurd_meta_size():
    with pytest.raises(MemoryError, match="more than can be addressed"):
        AttentionBufferManager().allocate(Q, (2**62, 2**62), device="meta")


@pytest.mark.parametrize("value", [None, 3, [1.0]])
def test_only_tensors_can_be_released(value: Any):
    with pytest.raises(TypeError, match="tensor must be a tensor that allocate returned"):
        AttentionBufferManager().deallocate(value, Q)


def test_wrong_types_of_release():
    """A refused release changes nothing: the right one still works."""
    manager = AttentionBufferManager()
    tensor = manager.allocate(Q, (4,))
    with pytest.raises(ValueError, match="type must be QUERY, which this buffer was leased as, got KEY"):
        manager.deallocate(tensor, BufferType.KEY)
    with pytest.raises(ValueError, match="type must be a BufferType"):
        manager.deallocate(tensor, "querry")
    with pytest.raises(ValueError, match="a tensor from elsewhere"):
        AttentionBufferManager().deallocate(tensor, Q)
    manager.deallocate(tensor, "query")
    assert tensor.shape == (0,)


def test_clear_cache_of_an_unknown_type():
    with pytest.raises(ValueError, match="type must be a BufferType"):
        AttentionBufferManager().clear_cache("scratch")
