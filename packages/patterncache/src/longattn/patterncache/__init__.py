"""Who sees whom: attention patterns, their plans in strides, and a thread-safe cache of plans. Needs numpy only."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

logging.getLogger("longattn").addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from longattn.patterncache.algebra import Intersection, Restrict, Sum, Union
    from longattn.patterncache.band import pieces
    from longattn.patterncache.block_layout import BlockLayout
    from longattn.patterncache.block_sparse import BlockSparse
    from longattn.patterncache.by_head import ByHead
    from longattn.patterncache.cache import PatternCache
    from longattn.patterncache.compressed_rows import IndexArrays, index_arrays
    from longattn.patterncache.device_tier import DeviceTier, IndexTensors
    from longattn.patterncache.dilated import Dilated
    from longattn.patterncache.documents import Documents
    from longattn.patterncache.flex_export import FlexMask
    from longattn.patterncache.foreign import from_block_mask, from_mask_mod
    from longattn.patterncache.global_cache import (
        get_global_device_tier,
        get_global_pattern_cache,
        reset_global_pattern_cache,
    )
    from longattn.patterncache.hierarchical import HierarchicalBlocks
    from longattn.patterncache.index import Affine, Listed, Rectangle, Span
    from longattn.patterncache.lint import Gap, Lint
    from longattn.patterncache.model_configs import from_bigbird, from_hf, from_natten
    from longattn.patterncache.pattern import Pattern, parse_pattern
    from longattn.patterncache.periodic import Periodic
    from longattn.patterncache.plan import Band, Branch, Plan
    from longattn.patterncache.ranks import build_on_one, check_same_plan
    from longattn.patterncache.reach import Reach
    from longattn.patterncache.scored import ScoredBlocks
    from longattn.patterncache.strided import Strided
    from longattn.patterncache.view import CacheView
    from longattn.patterncache.window import Full, Window
    from longattn.patterncache.wire import plan_digest, plan_from_bytes, plan_to_bytes

_HOME = {
    "Affine": "index",
    "Band": "plan",
    "BlockLayout": "block_layout",
    "BlockSparse": "block_sparse",
    "Branch": "plan",
    "ByHead": "by_head",
    "CacheView": "view",
    "DeviceTier": "device_tier",
    "Dilated": "dilated",
    "Documents": "documents",
    "FlexMask": "flex_export",
    "Full": "window",
    "Gap": "lint",
    "HierarchicalBlocks": "hierarchical",
    "IndexArrays": "compressed_rows",
    "IndexTensors": "device_tier",
    "Intersection": "algebra",
    "Lint": "lint",
    "Listed": "index",
    "Pattern": "pattern",
    "PatternCache": "cache",
    "Periodic": "periodic",
    "Plan": "plan",
    "Reach": "reach",
    "Rectangle": "index",
    "Restrict": "algebra",
    "ScoredBlocks": "scored",
    "Span": "index",
    "Strided": "strided",
    "Sum": "algebra",
    "Union": "algebra",
    "Window": "window",
    "build_on_one": "ranks",
    "check_same_plan": "ranks",
    "from_bigbird": "model_configs",
    "from_block_mask": "foreign",
    "from_hf": "model_configs",
    "from_mask_mod": "foreign",
    "from_natten": "model_configs",
    "get_global_device_tier": "global_cache",
    "get_global_pattern_cache": "global_cache",
    "index_arrays": "compressed_rows",
    "parse_pattern": "pattern",
    "pieces": "band",
    "plan_digest": "wire",
    "plan_from_bytes": "wire",
    "plan_to_bytes": "wire",
    "reset_global_pattern_cache": "global_cache",
}

__all__ = [
    "Affine",
    "Band",
    "BlockLayout",
    "BlockSparse",
    "Branch",
    "ByHead",
    "CacheView",
    "DeviceTier",
    "Dilated",
    "Documents",
    "FlexMask",
    "Full",
    "Gap",
    "HierarchicalBlocks",
    "IndexArrays",
    "IndexTensors",
    "Intersection",
    "Lint",
    "Listed",
    "Pattern",
    "PatternCache",
    "Periodic",
    "Plan",
    "Reach",
    "Rectangle",
    "Restrict",
    "ScoredBlocks",
    "Span",
    "Strided",
    "Sum",
    "Union",
    "Window",
    "build_on_one",
    "check_same_plan",
    "from_bigbird",
    "from_block_mask",
    "from_hf",
    "from_mask_mod",
    "from_natten",
    "get_global_device_tier",
    "get_global_pattern_cache",
    "index_arrays",
    "parse_pattern",
    "pieces",
    "plan_digest",
    "plan_from_bytes",
    "plan_to_bytes",
    "reset_global_pattern_cache",
]

if not TYPE_CHECKING:

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
