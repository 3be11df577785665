"""Environments: whose cache and whose memory a call uses, how long the name lives, and that a live output is nobody else's."""

import copy
import gc
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longattn.kernels import Environment, attend, backends
from longattn.kernels.dispatch.environment import TorchAllocator, find_environment
from longattn.kernels.testing import Case, assert_near, poisoned_memory
from longattn.patterncache import Dilated, Full, PatternCache, Restrict, Strided, Window, get_global_pattern_cache

T = TypeVar("T")
LONGNET = Dilated((8, 16), (1, 2), causal=True)
ROWS = pytest.mark.parametrize("name", backends("cpu"))


class CountingCache:
    """A cache that keeps every key it was asked for."""

    def __init__(self) -> None:
        self.asked: list[Hashable] = []
        self._upstream = PatternCache()

    def get_or_build(self, key: Hashable, build: Callable[[], T]) -> T:
        self.asked.append(key)
        return self._upstream.get_or_build(key, build)


class RecyclingAllocator(TorchAllocator):
    """Counts, and gives released memory out again at once, last one first, full of what it was."""

    def __init__(self) -> None:
        self.lent: list[tuple[tuple[int, ...], torch.dtype, str]] = []
        self.given_back: list[str] = []
        self._free: dict[tuple[tuple[int, ...], torch.dtype], list[torch.Tensor]] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, role: str) -> torch.Tensor:
        key = (tuple(shape), dtype)
        self.lent.append((*key, role))
        free = self._free.get(key)
        return free.pop() if free else super().empty(shape, dtype, device, role)

    def release(self, tensor: torch.Tensor, role: str) -> None:
        self.given_back.append(role)
        self._free.setdefault((tuple(tensor.shape), tensor.dtype), []).append(tensor)


@ROWS
def test_a_call_asks_its_environment(name: str):
    """One plan look-up each for forward and backward, none in the global cache; out is an "output" of the right size."""
    cache, allocator = CountingCache(), RecyclingAllocator()
    environment = Environment(cache, allocator)
    before = get_global_pattern_cache().get_stats()
    q = torch.randn(2, 20, 2, 4, requires_grad=True)
    out = attend(q, q, q, LONGNET, backend=name, environment=environment, out_dtype=torch.float32).out
    assert len(cache.asked) == 1 and ((2, 20, 2, 4), torch.float32, "output") in allocator.lent
    out.sum().backward()
    assert len(cache.asked) == 2 and len(set(cache.asked)) == 1
    assert get_global_pattern_cache().get_stats() == before


@ROWS
@pytest.mark.parametrize(
    "pattern", [LONGNET, Full(), Restrict(Restrict(Window(9), Dilated((4,), (2,))), Strided(4))], ids=str
)
@pytest.mark.parametrize("options", [{}, {"padding": True, "mask": "+k"}, {"prior": True}], ids=str)
def test_memory_that_comes_again_changes_nothing(name: str, pattern: Any, options: dict[str, Any]):
    """A live output never aliases another one, nor an input, however eagerly memory is recycled; values are plain torch's."""
    case = Case(pattern, (20, 20), batch=1, dtype=torch.bfloat16, **options)
    environment = Environment(allocator=RecyclingAllocator())
    kept = []
    for seed in range(3):
        data = Case(**{**vars(case), "seed": seed}).tensors()
        call = {"attention_mask": data.mask, "key_padding_mask": data.padding, "prior": data.prior, "backend": name}
        call["out_dtype"] = torch.bfloat16
        plain = attend(data.q, data.k, data.v, pattern, **call)
        kept.append((plain, attend(data.q, data.k, data.v, pattern, **call, environment=environment), data))
    memory = [x.untyped_storage().data_ptr() for _, got, d in kept for x in (got.out, got.lse, d.q, d.k, d.v)]
    assert len(memory) == len(set(memory))
    for plain, got, _ in kept:
        assert torch.equal(got.out, plain.out) and torch.equal(got.lse, plain.lse)


@ROWS
def test_gradients_from_recycled_memory(name: str):
    """Two graphs alive at once, backward in the other order."""
    environment = Environment(allocator=RecyclingAllocator())
    graphs = []
    for seed in (1, 2):
        data = Case(LONGNET, (20, 20), dtype=torch.bfloat16, padding=True, seed=seed).tensors()
        q, k, v = (x.requires_grad_() for x in (data.q, data.k, data.v))
        states = [
            attend(q, k, v, LONGNET, key_padding_mask=data.padding, backend=name, environment=e, out_dtype=q.dtype)
            for e in (None, environment)
        ]
        graphs.append(([s.out for s in states], (q, k, v), data.grad_out.to(q.dtype)))
    for outs, leaves, cotangent in graphs[::-1]:
        expected, got = (torch.autograd.grad(out, leaves, cotangent) for out in outs)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@ROWS
def test_scratch_goes_back_to_its_owner(name: str):
    """Two branches write the same rows: their sum is float32 until it is rounded, once, and the accumulator is released once a call."""
    allocator = RecyclingAllocator()
    environment = Environment(allocator=allocator)
    q = torch.randn(1, 20, 2, 4).bfloat16()
    expected = attend(q, q, q, LONGNET, backend=name).out.bfloat16()
    for calls in (1, 2, 3):
        out = attend(q, q, q, LONGNET, backend=name, environment=environment, out_dtype=torch.bfloat16).out
        assert torch.equal(out, expected) and allocator.given_back == ["temp"] * calls
    assert [(q.shape, q.dtype)] * 3 == [(*lent,) for *lent, role in allocator.lent if role == "output"]


def test_a_name_dies_with_its_holder():
    """Held, it is found; dropped, the name raises; the nameless one is always there."""
    environment = Environment()
    name = environment.name
    assert find_environment(name) is environment and name != Environment().name
    assert find_environment("").allocator.__class__ is TorchAllocator
    assert find_environment("").cache is get_global_pattern_cache()
    del environment
    gc.collect()
    with pytest.raises(ValueError, match=f"env must name a living environment, got '{name}'"):
        find_environment(name)


def test_a_backward_may_come_after_its_environment():
    """A module that was only made for one call: its loss still has a gradient."""
    q = torch.randn(1, 20, 2, 4, requires_grad=True)
    out = attend(q, q, q, LONGNET, environment=Environment(CountingCache(), RecyclingAllocator())).out
    gc.collect()
    (got,) = torch.autograd.grad(out.square().sum(), q)
    (expected,) = torch.autograd.grad(attend(q, q, q, LONGNET).out.square().sum(), q)
    assert_near(got, expected, 0, 0, "gradient")


def test_traced_code_has_no_environment():
    """Compiled, the name in the graph is '': layers with other environments share it, and the cache of neither is asked."""
    caches = CountingCache(), CountingCache()
    environments = [Environment(cache) for cache in caches]
    graphs = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([arg for node in graph.graph.nodes for arg in node.args if isinstance(arg, str)])
        return graph.forward

    def layer(q: torch.Tensor, environment: Environment) -> torch.Tensor:
        return attend(q, q, q, LONGNET, environment=environment).out

    compiled = torch.compile(layer, backend=look, fullgraph=True)
    q = torch.randn(1, 20, 2, 4)
    for environment in environments:
        assert torch.equal(compiled(q, environment), layer(q, environments[0]))
    assert graphs and all("" in names and not any("environment" in n for n in names) for names in graphs)
    assert len(caches[0].asked) == 2 and not caches[1].asked


def test_copies_have_names_of_their_own():
    """deepcopy of a module that holds one must not leave two holders of one name, of which the first to go takes it along."""
    environment = Environment(allocator=RecyclingAllocator())
    twin = copy.deepcopy(environment)
    assert twin.name != environment.name
    assert find_environment(twin.name) is twin and find_environment(environment.name) is environment
    name = environment.name
    del environment
    gc.collect()
    assert find_environment(twin.name) is twin
    with pytest.raises(ValueError, match="living environment"):
        find_environment(name)


@given(
    shape=st.lists(st.integers(0, 3), max_size=4), dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64])
)
def test_plain_torch_gives_what_torch_empty_gives(shape: list[int], dtype: torch.dtype):
    """Shape, strides, dtype and device; new memory each time, under any default device, and NaN where memory is poisoned."""
    allocate = partial(TorchAllocator().empty, shape, dtype, torch.device("cpu"), "output")
    with torch.device("meta"):
        first, second = allocate(), allocate()
    expected = torch.empty(shape, dtype=dtype)
    for x in (first, second):
        assert (x.shape, x.stride(), x.dtype, x.device.type) == (expected.shape, expected.stride(), dtype, "cpu")
    assert not expected.numel() or first.data_ptr() != second.data_ptr()
    with poisoned_memory():
        assert allocate().isnan().all()
