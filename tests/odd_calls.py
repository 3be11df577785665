"""Public calls of patterncache, kernels and attention, each with arguments that it serves: what `test_odd_values` puts odd values into.

bufmgr has a table of its own beside its tests, which run where the other packages are missing.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import longattn.attention as attention
import longattn.kernels as kernels
import longattn.patterncache as patterncache
from longattn.patterncache import Dilated, Full, PatternCache, Rectangle, Span, Window

Call = Callable[[], tuple[Callable[..., Any], dict[str, Any]]]
CALLS: dict[str, Call] = {}
"""{name: makes (the callable, arguments that it serves)}, made anew for each call."""

SQUARE = Rectangle(2, Span(0, 4), Span(0, 4))
SHAPE: dict[str, Any] = {"segment_lengths": (2, 4), "dilation_rates": (1, 2)}


def add(name: str, function: Callable[..., Any] | None = None, /, **arguments: Any) -> None:
    """A call whose arguments no call changes. `name` is PACKAGE.NAME or PACKAGE.NAME.METHOD, `function` where it is another."""
    package, attribute = name.split(".")[:2]
    modules = {"patterncache": patterncache, "kernels": kernels, "attention": attention}
    called: Callable[..., Any] = getattr(modules[package], attribute) if function is None else function
    CALLS[name] = lambda: (called, dict(arguments))


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers from 0 to 1, the same each time."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def qkv(*names: str) -> dict[str, Any]:
    """(1, 4, 2, 4) tensors by name."""
    return {name: x(1, 4, 2, 4) for name in names or ("q", "k", "v")}


# patterncache
add("patterncache.Span", start=0, length=3, step=1)
add("patterncache.Rectangle", num_heads=2, queries=Span(0, 3), keys=Span(0, 3), heads=None)
add("patterncache.Full", causal=True)
add("patterncache.Window", size=3, sinks=1, causal=True)
add("patterncache.Dilated", **SHAPE, heads="shared", queries="dilated", causal=False)
add("patterncache.Dilated.for_length", Dilated.for_length, N=16, layers=2, budget=None, num_heads=2, causal=True)
add("patterncache.Strided", stride=2, local=None, heads="merged", causal=True)
add("patterncache.HierarchicalBlocks", block_size=2, levels=2, fanout=2, causal=False)
add("patterncache.Periodic", period=2, runs=[(0, 1, None, 0)], length=8, causal=False)
add("patterncache.Documents", cu_seqlens=[0, 2, 4], pattern=Full())
add("patterncache.ByHead", parts=[(Span(0, 1), Full())])
add("patterncache.BlockSparse", block_size=2, mask=np.ones((2, 2), bool), causal=False)
add(
    "patterncache.BlockSparse.from_scores", patterncache.BlockSparse.from_scores,
    scores=x(2, 2, 2), block_size=2, topk=1, topp=None, causal=False, keep_diagonal=True,
)  # fmt: skip
add(
    "patterncache.BlockLayout",
    layout="dilated_sparse", block_size=2, ratio=0.5, window=2, num_global=1, seed=0, causal=False,
)  # fmt: skip
add("patterncache.Union", parts=(Full(), Window(2)))
add("patterncache.Intersection", parts=(Full(), Window(2)))
add("patterncache.Sum", parts=(Full(), Window(2)))
add("patterncache.Restrict", a=Full(), b=Window(2))
add("patterncache.Pattern.plan", Window(2).plan, rectangle=SQUARE, listed=None)
add("patterncache.Pattern.counts", Window(2).counts, rectangle=SQUARE)
add("patterncache.Pattern.with_causal", Window(2).with_causal, causal=True)
add("patterncache.Pattern.reach", Window(2).reach, layers=2, N=8, num_heads=2)
add("patterncache.Pattern.lint", Window(2).lint, N=8, num_heads=2, head_dim=4, dtype="float32")
add("patterncache.Pattern.describe", Window(2).describe, N=8, num_heads=2, head=0, png=None)
add("patterncache.Pattern.to_dense", Window(2).to_dense, N=8, num_heads=2)
add("patterncache.Pattern.to_block_mask", Window(2).to_block_mask, N=8, num_heads=2, block_size=4, device="cpu")
add("patterncache.parse_pattern", text=Window(2).canonical())
add("patterncache.PatternCache", max_size=4, policy="s3fifo", max_bytes=None, enable_profiling=False, grow_to=None)
add("patterncache.CacheView", upstream=None)
for _name, _arguments in {
    "configure": {"max_size": 4, "max_bytes": None, "enable_profiling": False, "grow_to": None},
    "get_or_build": {"key": 1, "build": lambda: 2},
    "ask": {"key": 1, "build": lambda: 2},
    "resize": {"max_size": 3},
    "suggest_size": {"gain": 0.1},
}.items():
    CALLS[f"patterncache.PatternCache.{_name}"] = lambda name=_name, arguments=_arguments: (
        getattr(PatternCache(4), name), dict(arguments),
    )  # fmt: skip
PLAN = Window(2).plan(SQUARE)
add("patterncache.DeviceTier", max_bytes=None)
add("patterncache.DeviceTier.configure", patterncache.DeviceTier().configure, max_bytes=None)
add("patterncache.DeviceTier.resident", patterncache.DeviceTier().resident, plan=PLAN, device="cpu", transposed=False)
add(
    "patterncache.DeviceTier.index_tensors",
    patterncache.DeviceTier().index_tensors,
    plan=PLAN,
    device="cpu",
    transposed=False,
)
add("patterncache.build_on_one", cache=PatternCache(4), key=1, build=lambda: PLAN)
add("patterncache.check_same_plan", plan=PLAN)
add("patterncache.index_arrays", plan=PLAN, transposed=False)
add("patterncache.pieces", plan=PLAN, strip=256)
add("patterncache.plan_digest", plan=PLAN)
add("patterncache.plan_to_bytes", plan=PLAN)
add("patterncache.plan_from_bytes", data=patterncache.plan_to_bytes(PLAN))
add("patterncache.from_hf", config=SimpleNamespace(model_type="mistral", sliding_window=4), layer=0)
add("patterncache.from_block_mask", block_mask=Window(2).to_block_mask(8, 2, block_size=4).block_mask)
add(
    "patterncache.from_mask_mod",
    mask_mod=lambda b, h, q, k: q >= k, N=4, num_heads=None, batch=1, compact=False, listed=None, verify="every",
)  # fmt: skip
add("patterncache.from_natten", shape=(4, 4), kernel_size=3, stride=1, dilation=1, is_causal=False)

BIGBIRD = SimpleNamespace(attention_type="block_sparse", block_size=2, num_random_blocks=1)
add("patterncache.from_bigbird", config=BIGBIRD, N=32, rand_attn=None)

# kernels
OPTIONS: dict[str, Any] = {
    "is_causal": None, "softmax_scale": None, "attention_mask": None, "key_padding_mask": None, "score_terms": None, "dropout_p": 0.0,
    "backend": None, "deterministic": None, "environment": None,
}  # fmt: skip
STATE = kernels.attend(**qkv(), pattern=Full())
add(
    "kernels.attend", **qkv(), pattern=Window(3), **OPTIONS, prior=None, q_spans=None, k_spans=None, heads=None, num_heads=None,
    seed=None, sink_logits=None, out_dtype=None, layout="bnhd",
)  # fmt: skip
add("kernels.build_native", part="native")
add("kernels.prepare", **qkv(), pattern=Window(3), **OPTIONS, out_dtype=None)
add("kernels.PreparedAttention", kernels.prepare(Window(3), **qkv()), **qkv())
add("kernels.fused_attention", **qkv(), causal=True, sm_scale=None)
add("kernels.merge", first=STATE, second=STATE)
add(
    "kernels.reference_attention", **qkv(), counts=Full().counts(SQUARE), softmax_scale=None, bias=None, key_padding_mask=None,
    keep=None, score_terms=None, distance=None,
)  # fmt: skip
add(
    "kernels.explain", pattern=Window(3), q_shape=(1, 4, 2, 4), k_shape=None, dtype=None, device=None, architecture=None,
    is_causal=None, attention_mask=False, bias=False, dropout=False, key_padding_mask=False, score_terms=None, requires_grad=False,
    deterministic=False, backend=None, value_head_dim=None, verbose=False, machine=None, verify=False, decode=False,
)  # fmt: skip
add("kernels.AttentionState", out=STATE.out, lse=STATE.lse)
add("kernels.AttentionState.empty", kernels.AttentionState.empty, out=STATE.out)
add("kernels.AttentionState.finalize", STATE.finalize, dtype=torch.float32)
add("kernels.Softcap", value=3.0)
add("kernels.Alibi", slopes=x(2))
add("kernels.RelativeBias", table=x(8, 2), bidirectional=True, max_distance=16)
add("kernels.RelativeBias.buckets", kernels.RelativeBias(x(8, 2)).buckets, distance=torch.arange(3))
add("kernels.backends", device=None)
add("kernels.Environment", cache=None, allocator=None)
