"""Public calls of attention, each with arguments that it serves; see `odd_calls`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

import longattn.attention as attention
from longattn.attention import Local, Ring
from longattn.attention.testing import MULTIHEAD_PRESETS, PRESET_FLAGS, PRESETS
from longattn.patterncache import Window
from tests.odd_calls import CALLS, OPTIONS, SHAPE, add, qkv, x

MORE: dict[str, Any] = {
    **OPTIONS, "return_lse": False, "schedule": None, "q_start": None, "seed": None, "sink_logits": None, "positions_start": None,
    "cu_seqlens": None, "cu_seqlens_q": None, "merge_grad": "exact", "head_start": None, "num_heads": None, "layout": "bnhd",
    "return_key_weights": False,
}  # fmt: skip
add("attention.pattern_attention", **qkv(), pattern=Window(3), **MORE)
add(
    "attention.pattern_attention ring",
    attention.pattern_attention,
    **qkv(),
    pattern=Window(3),
    **{**MORE, "schedule": Ring(size=2)},
)
WEIGHED: dict[str, Any] = {
    "softmax_scale": None, "attention_mask": None, "key_padding_mask": None, "head_start": None, "num_heads": None, "layout": "bnhd",
    "score_terms": None,
}  # fmt: skip
add("attention.attention_weights", **qkv("q", "k"), pattern=Window(3), **WEIGHED, distance=None)
add("attention.sparse_attention_weights", **qkv("q", "k"), pattern=Window(3), **WEIGHED)
add("attention.shard_sequence", x=x(1, 4, 2), schedule=Local(), dim=1)
add("attention.unshard_sequence", x=x(1, 4, 2), schedule=Local(), group=None, dim=1)
add(
    "attention.choose", group=2, pattern=Window(3), length=16, num_heads=2, kv_heads=None, head_dim=4, batch=1, dtype=torch.float32,
    value_head_dim=None,
)  # fmt: skip
add("attention.balanced_lengths", pattern=Window(3), length=16, ranks=2, num_heads=2)
add(
    "attention.StreamingAttention", pattern=Window(3), num_heads=2, head_dim=4, kv_heads=None, value_head_dim=None, softmax_scale=None,
    invariant=False, max_rewind=0, storage=None,
)  # fmt: skip
add("attention.Ring", group=None, size=2, layout="contiguous", lengths=None)
add(
    "attention.SparsePatternConfig", pattern_type="dilated_sparse", sparsity_ratio=0.1, block_size=2, local_window_size=4,
    num_global_tokens=1, seed=0,
)  # fmt: skip
add("attention.SparsePatternConfig.layout", attention.SparsePatternConfig().layout, causal=True)
add("attention.SparsePatternConfig.block_sparse", attention.SparsePatternConfig().block_sparse, length=8, causal=True)
add("attention.Wiring", **dict.fromkeys(attention.Wiring.__dataclass_fields__, False))
add("attention.AttentionConfig", name="dilated", dropout=0.0)
PATTERN_MODULE: dict[str, Any] = {
    "softmax_scale": None, "dropout": 0.0, "backend": None, "schedule": None, "wiring": None, "sparse_weights": False,
    "merge_grad": "exact", "head_start": None,
}  # fmt: skip
PROJECTED: dict[str, Any] = {
    "kv_heads": None, "bias": True, "fused_qkv": False, "layer_norm": True, "layer_norm_eps": 1e-5, "gamma_init": 1.0, "device": None,
    "dtype": None,
}  # fmt: skip
FORWARD: dict[str, Any] = {
    "is_causal": None, "attention_mask": None, "key_padding_mask": None, "need_weights": False, "q_start": None,
    "positions_start": None, "cu_seqlens": None, "cu_seqlens_q": None, "sink_logits": None, "score_terms": None,
}  # fmt: skip
add("attention.PatternAttention", pattern=Window(3), **PATTERN_MODULE, num_heads=None)
add(
    "attention.PatternAttention.forward",
    attention.PatternAttention(Window(3)),
    **qkv("query", "key", "value"),
    **FORWARD,
    layout="bnhd",
)
add(
    "attention.MultiheadPatternAttention", embed_dim=8, num_heads=2, pattern=Window(3), **PATTERN_MODULE, **PROJECTED,
    value_head_dim=None, rotary_base=None, local_heads=None,
)  # fmt: skip
add(
    "attention.MultiheadPatternAttention.forward", attention.MultiheadPatternAttention(8, 2, Window(3)),
    query=x(1, 4, 8), key=None, value=None, **FORWARD,
)  # fmt: skip
for _name, _preset in {**PRESETS, **MULTIHEAD_PRESETS}.items():
    _options: dict[str, Any] = {
        **SHAPE,
        "heads": "shared",
        "causal": False,
        **dict.fromkeys(PRESET_FLAGS[_name], False),
    }
    if _name in MULTIHEAD_PRESETS:
        _options |= {"embed_dim": 8, "num_heads": 2}
    if "Ring" in _name:
        _options |= {"ring_size": 2, "layout": "contiguous"}
    if "Sparse" in _name:
        _options |= {"sparse_config": None}
    add(f"attention.{_name}", _preset, **_options)
LAYER: dict[str, Any] = {
    "d_model": 8, "nhead": 2, **SHAPE, "dim_feedforward": 8, "dropout": 0.0, "activation": "gelu", "causal": True,
    "layer_norm_eps": 1e-5, "gamma_init": 1.0, "device": None, "dtype": None,
}  # fmt: skip
add("attention.DilatedTransformerEncoderLayer", **LAYER)
add("attention.DilatedTransformerDecoderLayer", **LAYER, memory_pattern=None)
add(
    "attention.DilatedTransformerEncoderLayer.forward", attention.DilatedTransformerEncoderLayer(8, 2, **SHAPE),
    src=x(1, 4, 8), is_causal=None, attention_mask=None, key_padding_mask=None,
)  # fmt: skip
add(
    "attention.DilatedTransformerDecoderLayer.forward", attention.DilatedTransformerDecoderLayer(8, 2, **SHAPE),
    tgt=x(1, 4, 8), memory=x(1, 4, 8), is_causal=None, attention_mask=None, key_padding_mask=None, memory_mask=None,
    memory_key_padding_mask=None,
)  # fmt: skip
add(
    "attention.LongNet", num_tokens=5, d_model=8, nhead=2, num_layers=1, **SHAPE, dim_feedforward=8, dropout=0.0, rotary_base=None,
    checkpointing=False, device=None, dtype=None,
)  # fmt: skip
add(
    "attention.LongNet.forward", attention.LongNet(5, 8, 2, 1, **SHAPE),
    tokens=torch.zeros(1, 4, dtype=torch.int64), key_padding_mask=None,
)  # fmt: skip
BUFFER = attention.RingBufferConfig(num_heads=2, head_dim=4, dropout=0.0, buffer_size=4, max_rewind=2)
add("attention.RingBufferConfig", **{name: getattr(BUFFER, name) for name in BUFFER.__dataclass_fields__})
add("attention.RingBufferAttention", config=BUFFER)
add(
    "attention.RingBufferAttention.forward", attention.RingBufferAttention(BUFFER), **qkv(), requires_grad=None, position=None,
    is_decoder=False, buffer_state=None, att_mask=None, key_padding_mask=None, needs_weights=False, output_attentions=False,
    attention_mask=None, sink_logits=None, score_terms=None, seed=None, layout="bnhd",
)  # fmt: skip
add(
    "attention.RingBufferAttention.new_state", attention.RingBufferAttention(BUFFER).new_state,
    batch_size=1, kv_heads=None, dtype=None, device=None,
)  # fmt: skip
add(
    "attention.RingBufferAttention.tune", attention.RingBufferAttention(BUFFER).tune, length=2, batch_size=1, dtype=None, device=None
)  # fmt: skip


def state() -> attention.RingBufferState:
    """Of six tokens, the last one decoded."""
    module = attention.RingBufferAttention(BUFFER)
    _, filled = module(**{name: x(1, 5, 2, 4) for name in "qkv"})
    module(**{name: x(1, 1, 2, 4) for name in "qkv"}, is_decoder=True, buffer_state=filled)
    return filled


for _name, _arguments in {
    "feedback": {"n": 1},
    "rewind": {"tokens": 1},
    "reorder": {"index": [0]},
    "fork": {"copies": 2},
    "to": {"device": None, "dtype": None},
}.items():
    CALLS[f"attention.RingBufferState.{_name}"] = lambda name=_name, arguments=_arguments: (
        getattr(state(), name), dict(arguments),
    )  # fmt: skip
CALLS["attention.RingBufferState.cat"] = lambda: (attention.RingBufferState.cat, {"states": [state()]})
CALLS["attention.RingBufferState.from_state_dict"] = lambda: (
    attention.RingBufferState.from_state_dict, {"saved": state().state_dict()},
)  # fmt: skip
STREAMING = attention.StreamingAttention(Window(3), num_heads=2, head_dim=4, max_rewind=2)
add("attention.StreamingAttention.forward", STREAMING, **qkv(), state=None, rows=None, return_lse=False)
add("attention.StreamingAttention.new_state", STREAMING.new_state, batch_size=1, pool=None, dtype=None, device=None)
add("attention.StreamingAttention.new_pool", STREAMING.new_pool, pages=2, page_size=4, dtype=None, device=None)
add("attention.StreamingAttention.most_held", STREAMING.most_held, length=5)


def stream() -> attention.StreamingState:
    """Two rows of four tokens."""
    return STREAMING(**{name: x(2, 4, 2, 4) for name in "qkv"})[1]


for _name, _arguments in {
    "positions_held": lambda: {"row": 0},
    "clear": lambda: {"row": 0},
    "admit": lambda: {"row": 0, "other": stream(), "source": 0},
    "reorder": lambda: {"index": [0]},
    "fork": lambda: {"copies": 2},
    "rewind": lambda: {"tokens": 1},
    "from_state_dict": lambda: {"saved": stream().state_dict()},
}.items():
    CALLS[f"attention.StreamingState.{_name}"] = lambda name=_name, arguments=_arguments: (
        getattr(stream(), name), arguments(),
    )  # fmt: skip
CALLS["attention.LongNet.generate"] = lambda: (
    attention.LongNet(5, 8, 2, 1, **SHAPE).eval().generate,
    {
        "tokens": torch.zeros(1, 4, dtype=torch.int64), "max_new_tokens": 1, "temperature": 0.0, "top_p": 1.0, "stop": None, "callback": None,
        "prefill_size": 4, "generator": None,
    },
)  # fmt: skip
GROUPED = {"layout": "contiguous", "lengths": None}
CALLS["attention.AllGather"] = lambda: (attention.AllGather, {"group": dist.group.WORLD, **GROUPED})
CALLS["attention.Ulysses"] = lambda: (attention.Ulysses, {"group": dist.group.WORLD, **GROUPED, "inner": None})
add("attention.build_attention", config={"name": "dilated", **SHAPE})
add("attention.create_attention", name="DilatedAttention")
add("attention.register_attention", name="odd_values", config=attention.AttentionConfig)
