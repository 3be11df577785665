"""What users import, listed, so that a new export or a lost one shows in review. Edit the table with the package."""

import importlib
import tomllib

import pytest

from tests.workspace import PACKAGES, source

EXPECTED = {
    "bufmgr": """
        BufferType BufferConfig DEFAULT_CONFIGS
        AttentionBufferManager create_attention_buffer_manager
        MemoryPool get_global_memory_pool reset_global_memory_pool
        Allocator TensorAllocator Block SystemAllocator StatisticsAllocator LimitingAllocator Statistics
        ArenaAllocator LoggingAllocator FailureCallbackAllocator PoisoningAllocator RecordingAllocator
        AllocationTrace TraceEvent prometheus_text
        NumaAllocator Placement migrate numa_policy read_placement NumaNode NumaTopology numa_topology
        plan_memory MemoryPlan Lifetime TieredBuffers TieredBuffer StepLearner ExpectedRequest
        PreparedSlot BufferScope OutstandingBuffer Strategy MemoryReading read_device_memory
        """,
    "patterncache": """
        Full Window Dilated Strided HierarchicalBlocks Documents BlockSparse BlockLayout
        Restrict Union Intersection Sum Pattern parse_pattern from_mask_mod from_block_mask
        Span Rectangle Affine Listed
        Plan Branch Band pieces
        Lint Gap Reach Shares
        PatternCache CacheView get_global_pattern_cache reset_global_pattern_cache
        FlexMask IndexArrays ScoredBlocks index_arrays
        from_bigbird from_hf from_natten
        build_on_one check_same_plan plan_digest plan_from_bytes plan_to_bytes
        DeviceTier IndexTensors get_global_device_tier
        Periodic
        ByHead
        """,
    "kernels": """
        Softcap Alibi RelativeBias
        attend AttentionState merge reference_attention fused_attention Environment
        explain Explanation AttentionProblem backends Capability build_native installation
        prepare PreparedAttention prepared_stats LayoutWarning
        """,
    "attention": """
        pattern_attention PatternAttention MultiheadPatternAttention attention_weights
        GroupError balanced_lengths
        Schedule Local Ring AllGather Ulysses choose shard_sequence unshard_sequence SparsePatternConfig Wiring
        RingBufferAttention RingBufferConfig RingBufferState TileOrder TileType
        StreamingAttention StreamingState PagePool streaming_cache
        DilatedAttention ImprovedDilatedAttention ImprovedDilatedAttentionV2
        RingDilatedAttentionV2 RingDilatedAttentionV3 BlockSparseRingDilatedAttention
        MultiheadDilatedAttention ImprovedMultiheadDilatedAttention ImprovedMultiheadDilatedAttentionV2
        RingMultiheadDilatedAttentionV2 RingMultiheadDilatedAttentionV3 BlockSparseRingMultiheadDilatedAttention
        DilatedTransformerEncoderLayer
        DilatedTransformerDecoderLayer
        LongNet
        ReachWarning
        create_attention
        build_attention
        register_attention
        AttentionConfig
        register_with_transformers use_pattern
        register_with_xformers
        sparse_attention_weights
        """,
}


@pytest.mark.parametrize("package", PACKAGES)
def test_all_lists_what_the_table_lists(package: str) -> None:
    """`__all__` holds exactly the table's names, each once."""
    listed = importlib.import_module(f"longattn.{package}").__all__
    assert sorted(EXPECTED[package].split()) == sorted(listed)


@pytest.mark.parametrize("package", PACKAGES)
def test_each_name_leads_somewhere(package: str) -> None:
    """Every listed name can be had, and `dir()` shows it."""
    module = importlib.import_module(f"longattn.{package}")
    missing = [name for name in EXPECTED[package].split() if not hasattr(module, name) or name not in dir(module)]
    assert missing == []


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_knows_its_version(package: str) -> None:
    """`__version__` is what pyproject.toml says, read where the package is installed."""
    declared = tomllib.loads((source(package).parents[2] / "pyproject.toml").read_text())["project"]["version"]
    assert importlib.import_module(f"longattn.{package}").__version__ == declared


@pytest.mark.parametrize("package", PACKAGES)
def test_a_misspelt_name_is_an_attribute_error(package: str) -> None:
    """A lazy package still says that a name does not exist."""
    module = importlib.import_module(f"longattn.{package}")
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name


@pytest.mark.parametrize("package", PACKAGES)
def test_no_submodule_is_spelt_like_a_public_name(package: str) -> None:
    """A module `attend.py` would shadow the function `attend` once it is imported."""
    submodules = {path.stem for path in source(package).glob("*.py")}
    assert set() == submodules & set(EXPECTED[package].split())
