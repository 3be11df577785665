"""Who sees whom: attention patterns, their plans in strides, and a thread-safe cache of plans. Needs numpy only."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

logging.getLogger("longattn").addHandler(logging.NullHandler())

if TYPE_CHECKING:
    __version__: str
    from longattn.patterncache.analysis.results import Gap, Lint, Reach, Shares
    from longattn.patterncache.caching.cache import PatternCache
    from longattn.patterncache.caching.device_tier import DeviceTier, IndexTensors
    from longattn.patterncache.caching.global_cache import (
        get_global_device_tier,
        get_global_pattern_cache,
        reset_global_pattern_cache,
    )
    from longattn.patterncache.caching.ranks import build_on_one, check_same_plan
    from longattn.patterncache.caching.view import CacheView
    from longattn.patterncache.caching.wire import plan_digest, plan_from_bytes, plan_to_bytes
    from longattn.patterncache.indices import Affine, Listed
    from longattn.patterncache.interop.block_masks import from_block_mask
    from longattn.patterncache.interop.csr import IndexArrays, index_arrays
    from longattn.patterncache.interop.flex import FlexMask
    from longattn.patterncache.interop.masks import from_mask_mod
    from longattn.patterncache.interop.model_configs import from_bigbird, from_hf
    from longattn.patterncache.interop.natten import from_natten
    from longattn.patterncache.pattern import Pattern
    from longattn.patterncache.patterns.block_layout import BlockLayout
    from longattn.patterncache.patterns.block_sparse import BlockSparse
    from longattn.patterncache.patterns.by_head import ByHead
    from longattn.patterncache.patterns.combined import Intersection, Sum, Union
    from longattn.patterncache.patterns.dilated import Dilated
    from longattn.patterncache.patterns.documents import Documents
    from longattn.patterncache.patterns.hierarchical import HierarchicalBlocks
    from longattn.patterncache.patterns.periodic import Periodic
    from longattn.patterncache.patterns.registry import parse_pattern
    from longattn.patterncache.patterns.restrict import Restrict
    from longattn.patterncache.patterns.scored_blocks import ScoredBlocks
    from longattn.patterncache.patterns.strided import Strided
    from longattn.patterncache.patterns.window import Full, Window
    from longattn.patterncache.plan import Band, Branch, Plan
    from longattn.patterncache.planning.bands import pieces
    from longattn.patterncache.spans import Rectangle, Span

_HOME = {
    "Affine": "indices",
    "Band": "plan",
    "BlockLayout": "patterns.block_layout",
    "BlockSparse": "patterns.block_sparse",
    "Branch": "plan",
    "ByHead": "patterns.by_head",
    "CacheView": "caching.view",
    "DeviceTier": "caching.device_tier",
    "Dilated": "patterns.dilated",
    "Documents": "patterns.documents",
    "FlexMask": "interop.flex",
    "Full": "patterns.window",
    "Gap": "analysis.results",
    "HierarchicalBlocks": "patterns.hierarchical",
    "IndexArrays": "interop.csr",
    "IndexTensors": "caching.device_tier",
    "Intersection": "patterns.combined",
    "Lint": "analysis.results",
    "Listed": "indices",
    "Pattern": "patterns.registry",
    "PatternCache": "caching.cache",
    "Periodic": "patterns.periodic",
    "Plan": "plan",
    "Reach": "analysis.results",
    "Rectangle": "spans",
    "Restrict": "patterns.restrict",
    "ScoredBlocks": "patterns.scored_blocks",
    "Shares": "analysis.results",
    "Span": "spans",
    "Strided": "patterns.strided",
    "Sum": "patterns.combined",
    "Union": "patterns.combined",
    "Window": "patterns.window",
    "build_on_one": "caching.ranks",
    "check_same_plan": "caching.ranks",
    "from_bigbird": "interop.model_configs",
    "from_block_mask": "interop.block_masks",
    "from_hf": "interop.model_configs",
    "from_mask_mod": "interop.masks",
    "from_natten": "interop.natten",
    "get_global_device_tier": "caching.global_cache",
    "get_global_pattern_cache": "caching.global_cache",
    "index_arrays": "interop.csr",
    "parse_pattern": "patterns.registry",
    "pieces": "planning.bands",
    "plan_digest": "caching.wire",
    "plan_from_bytes": "caching.wire",
    "plan_to_bytes": "caching.wire",
    "reset_global_pattern_cache": "caching.global_cache",
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
    "Shares",
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
        if name == "__version__":
            from importlib.metadata import version

            return version("longattn-patterncache")
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
