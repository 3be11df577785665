"""Long-context attention modules for torch: one forward over patterns, schedules and presets."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

logging.getLogger("longattn").addHandler(logging.NullHandler())

if TYPE_CHECKING:
    __version__: str
    from longattn.attention.functional import (
        pattern_attention,
    )
    from longattn.attention.integrations.attention_config import (
        AttentionConfig,
    )
    from longattn.attention.integrations.factory import (
        build_attention,
        create_attention,
        register_attention,
    )
    from longattn.attention.integrations.huggingface import (
        register_with_transformers,
        streaming_cache,
    )
    from longattn.attention.integrations.transformers_models import (
        use_pattern,
    )
    from longattn.attention.integrations.xformers import (
        register_with_xformers,
    )
    from longattn.attention.models.layers import (
        DilatedTransformerDecoderLayer,
        DilatedTransformerEncoderLayer,
    )
    from longattn.attention.models.longnet import (
        LongNet,
    )
    from longattn.attention.modules import (
        PatternAttention,
    )
    from longattn.attention.multihead import (
        MultiheadPatternAttention,
    )
    from longattn.attention.multihead_presets import (
        BlockSparseRingMultiheadDilatedAttention,
        ImprovedMultiheadDilatedAttention,
        ImprovedMultiheadDilatedAttentionV2,
        MultiheadDilatedAttention,
        RingMultiheadDilatedAttentionV2,
        RingMultiheadDilatedAttentionV3,
    )
    from longattn.attention.presets import (
        BlockSparseRingDilatedAttention,
        DilatedAttention,
        ImprovedDilatedAttention,
        ImprovedDilatedAttentionV2,
        RingDilatedAttentionV2,
        RingDilatedAttentionV3,
    )
    from longattn.attention.reaching import (
        ReachWarning,
    )
    from longattn.attention.ring_buffer.config import (
        RingBufferConfig,
        TileOrder,
        TileType,
    )
    from longattn.attention.ring_buffer.module import (
        RingBufferAttention,
    )
    from longattn.attention.ring_buffer.state import (
        RingBufferState,
    )
    from longattn.attention.schedules.all_gather import (
        AllGather,
    )
    from longattn.attention.schedules.balance import (
        balanced_lengths as balanced_lengths,
    )
    from longattn.attention.schedules.base import (
        Schedule,
    )
    from longattn.attention.schedules.errors import (
        GroupError as GroupError,
    )
    from longattn.attention.schedules.local import (
        Local,
    )
    from longattn.attention.schedules.ring import (
        Ring,
    )
    from longattn.attention.schedules.sharding import (
        shard_sequence,
        unshard_sequence,
    )
    from longattn.attention.schedules.traffic import (
        choose,
    )
    from longattn.attention.schedules.ulysses import (
        Ulysses,
    )
    from longattn.attention.sparse_config import (
        SparsePatternConfig,
    )
    from longattn.attention.streaming.module import (
        StreamingAttention,
    )
    from longattn.attention.streaming.page_pool import (
        PagePool,
    )
    from longattn.attention.streaming.stream_state import (
        StreamingState,
    )
    from longattn.attention.weights import (
        attention_weights,
        sparse_attention_weights,
    )
    from longattn.attention.wiring import (
        Wiring,
    )

_HOME = {
    "AllGather": "schedules.all_gather",
    "AttentionConfig": "integrations.attention_config",
    "BlockSparseRingDilatedAttention": "presets",
    "BlockSparseRingMultiheadDilatedAttention": "multihead_presets",
    "DilatedAttention": "presets",
    "DilatedTransformerDecoderLayer": "models.layers",
    "DilatedTransformerEncoderLayer": "models.layers",
    "GroupError": "schedules.errors",
    "ImprovedDilatedAttention": "presets",
    "ImprovedDilatedAttentionV2": "presets",
    "ImprovedMultiheadDilatedAttention": "multihead_presets",
    "ImprovedMultiheadDilatedAttentionV2": "multihead_presets",
    "Local": "schedules.local",
    "LongNet": "models.longnet",
    "MultiheadDilatedAttention": "multihead_presets",
    "MultiheadPatternAttention": "multihead",
    "PagePool": "streaming.page_pool",
    "PatternAttention": "modules",
    "ReachWarning": "reaching",
    "Ring": "schedules.ring",
    "RingBufferAttention": "ring_buffer.module",
    "RingBufferConfig": "ring_buffer.config",
    "RingBufferState": "ring_buffer.state",
    "RingDilatedAttentionV2": "presets",
    "RingDilatedAttentionV3": "presets",
    "RingMultiheadDilatedAttentionV2": "multihead_presets",
    "RingMultiheadDilatedAttentionV3": "multihead_presets",
    "Schedule": "schedules.base",
    "SparsePatternConfig": "sparse_config",
    "StreamingAttention": "streaming.module",
    "StreamingState": "streaming.stream_state",
    "TileOrder": "ring_buffer.config",
    "TileType": "ring_buffer.config",
    "Ulysses": "schedules.ulysses",
    "Wiring": "wiring",
    "attention_weights": "weights",
    "balanced_lengths": "schedules.balance",
    "build_attention": "integrations.factory",
    "choose": "schedules.traffic",
    "create_attention": "integrations.factory",
    "pattern_attention": "functional",
    "register_attention": "integrations.factory",
    "register_with_transformers": "integrations.huggingface",
    "register_with_xformers": "integrations.xformers",
    "shard_sequence": "schedules.sharding",
    "sparse_attention_weights": "weights",
    "streaming_cache": "integrations.huggingface",
    "unshard_sequence": "schedules.sharding",
    "use_pattern": "integrations.transformers_models",
}

__all__ = [
    "AllGather",
    "AttentionConfig",
    "BlockSparseRingDilatedAttention",
    "BlockSparseRingMultiheadDilatedAttention",
    "DilatedAttention",
    "DilatedTransformerDecoderLayer",
    "DilatedTransformerEncoderLayer",
    "GroupError",
    "ImprovedDilatedAttention",
    "ImprovedDilatedAttentionV2",
    "ImprovedMultiheadDilatedAttention",
    "ImprovedMultiheadDilatedAttentionV2",
    "Local",
    "LongNet",
    "MultiheadDilatedAttention",
    "MultiheadPatternAttention",
    "PagePool",
    "PatternAttention",
    "ReachWarning",
    "Ring",
    "RingBufferAttention",
    "RingBufferConfig",
    "RingBufferState",
    "RingDilatedAttentionV2",
    "RingDilatedAttentionV3",
    "RingMultiheadDilatedAttentionV2",
    "RingMultiheadDilatedAttentionV3",
    "Schedule",
    "SparsePatternConfig",
    "StreamingAttention",
    "StreamingState",
    "TileOrder",
    "TileType",
    "Ulysses",
    "Wiring",
    "attention_weights",
    "balanced_lengths",
    "build_attention",
    "choose",
    "create_attention",
    "pattern_attention",
    "register_attention",
    "register_with_transformers",
    "register_with_xformers",
    "shard_sequence",
    "sparse_attention_weights",
    "streaming_cache",
    "unshard_sequence",
    "use_pattern",
]

if not TYPE_CHECKING:

    def __getattr__(name):
        if name == "__version__":
            from importlib.metadata import version

            return version("longattn-attention")
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
