"""The scheduler: every visible pair is computed once, SKIP tiles are not touched, and results depend on none of its settings."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from longattn.attention import RingBufferAttention, RingBufferConfig, TileOrder, TileType
from longattn.attention.ring_buffer import tuning
from longattn.attention.ring_buffer.parts import Part
from longattn.attention.ring_buffer.tiles import TilingProcessor
from longattn.patterncache import Band

SIZES = ("tile_size", "block_size", "head_tile_size", "prefill_size")


def part(start, count, kv_heads, band):
    """Keys whose value nobody reads."""
    nothing = torch.empty(1, count, kv_heads, 1)
    return Part(nothing, nothing, start, 0, band, False)


@given(
    position=st.integers(0, 20),
    queries=st.integers(1, 30),
    start=st.integers(0, 20),
    keys=st.integers(1, 30),
    band=st.sampled_from([Band(0, 3), Band(0, 9), Band(0, None), Band()]),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 5), st.integers(1, 40)),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    order=st.sampled_from(TileOrder),
)
def test_every_visible_pair_is_scheduled_once(position, queries, start, keys, band, sizes, heads, order):
    """DENSE work sees everything, the rest sees something, and tiles are counted as a look at each of them counts them."""
    tiling = TilingProcessor(RingBufferConfig(**dict(zip(SIZES, sizes, strict=True))))
    tiling.tile_order, tiling.least_rows = order, 1
    times = torch.zeros(heads[0], queries, keys, dtype=torch.int64)
    i, j = position + torch.arange(queries)[:, None], start + torch.arange(keys)
    seen = torch.from_numpy(band.sees((i - j).numpy()))
    counts = dict.fromkeys(TileType, 0)
    expected = dict.fromkeys(TileType, 0)
    whole = part(start, keys, heads[1], band)
    for first in range(0, queries, sizes[3]):
        rows = min(sizes[3], queries - first)
        groups = set()
        for work in tiling.schedule((first, rows), heads[0], position, [whole], counts):
            at = work.part.start - start + work.keys[0]
            area = (slice(work.queries[0], sum(work.queries)), slice(at, at + work.keys[1]))
            assert not work.dense or seen[area].all()
            assert seen[area].any()
            assert work.heads[0] // (heads[0] // heads[1]) == work.kv_heads[0]
            times[(slice(work.heads[0], sum(work.heads)), *area)] += seen[area]
            groups.add(work.heads)
        step = sizes[0]
        tiles = [
            seen[first + a : min(first + a + step, first + rows), b : b + step]
            for a in range(0, rows, step)
            for b in range(0, keys, step)
        ]
        kinds = [TileType.DENSE if t.all() else TileType.TRIANGLE if t.any() else TileType.SKIP for t in tiles]
        number = len(list(_groups(heads, sizes[2])))
        for kind in TileType:
            expected[kind] += kinds.count(kind) * number
    assert torch.equal(times, seen.long().expand_as(times))
    assert counts == expected


def _groups(heads, most):
    group = heads[0] // heads[1]
    if most < group:
        return [(kv, first) for kv in range(heads[1]) for first in range(0, group, most)]
    return range(0, heads[1], most // group)


@pytest.mark.parametrize("order", TileOrder)
@pytest.mark.parametrize("backend", [None, "tiled", "gather"])
def test_results_do_not_depend_on_order_sizes_or_backend(order, backend):
    """A long causal prefill in float32, tiled in any way, is the same to rounding."""
    x = torch.randn(3, 1, 300, 4, 8)
    plain = RingBufferAttention(RingBufferConfig(num_heads=4, head_dim=8, buffer_size=100, dropout=0.0))
    config = RingBufferConfig(
        num_heads=4,
        head_dim=8,
        buffer_size=100,
        dropout=0.0,
        tile_size=16,
        block_size=48,
        head_tile_size=3,
        prefill_size=128,
        backend=backend,
    )
    module = RingBufferAttention(config)
    module.tiling_processor.tile_order, module.tiling_processor.least_rows = order, 1
    torch.testing.assert_close(module(*x)[0], plain(*x)[0], atol=2e-5, rtol=2e-5)
    assert min(module.tiling_processor.counts.values()) > 0


def test_skipped_keys_cost_nothing():
    """Operations follow the window, not the length: prefill_size leaves out whole stretches of keys."""
    config = RingBufferConfig(num_heads=1, head_dim=8, buffer_size=64, dropout=0.0, prefill_size=64, tile_size=16)
    module = RingBufferAttention(config)

    def operations(n):
        with FlopCounterMode(display=False) as counter:
            module(*torch.randn(3, 1, n, 1, 8))
        return counter.get_total_flops()

    # 4 * head_dim operations a visible pair: 64 keys a query, fewer at the start.
    assert operations(1024) == 4 * 8 * (1024 * 64 - 64 * 63 // 2)
    assert operations(1024) - operations(512) == 4 * 8 * 512 * 64


def test_settings_are_checked_and_tuned(monkeypatch, tmp_path):
    """A setting that makes no sense is refused by name; tuning leaves settings that work, and results as they were."""
    monkeypatch.setenv("LONGATTN_CACHE", str(tmp_path / "cache"))
    module = RingBufferAttention(RingBufferConfig(num_heads=4, head_dim=8, buffer_size=64, dropout=0.0))
    with pytest.raises(TypeError, match="tile_order must be a TileOrder, got 'k'"):
        module.tiling_processor.tile_order = "k"
    module.tiling_processor.tile_size = 0
    x = torch.randn(3, 1, 100, 4, 8)
    with pytest.raises(ValueError, match="tile_size must be an integer >= 1, got 0"):
        module(*x)
    module.tiling_processor.tile_size = 16
    before = module(*x)[0]
    settings = module.tune(100)
    assert settings == {name: getattr(module.tiling_processor, name) for name in (*SIZES, "tile_order")}
    torch.testing.assert_close(module(*x)[0], before, atol=2e-5, rtol=2e-5)


def test_what_was_tuned_is_kept(monkeypatch, tmp_path):
    """The next module of these sizes tries nothing; another length or size does; where nothing can be kept, each time."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LONGATTN_CACHE", str(folder))
    config = RingBufferConfig(num_heads=2, head_dim=8, buffer_size=32, dropout=0.0, tile_size=8)
    tried = []
    quickest = tuning.quickest

    def watched(*arguments, **options):
        tried.append(arguments[2])
        return quickest(*arguments, **options)

    monkeypatch.setattr(tuning, "quickest", watched)
    first = RingBufferAttention(config).tune(40)
    assert RingBufferAttention(config).tune(40) == first and tried == [40]
    RingBufferAttention(config).tune(41)
    RingBufferAttention(dataclasses.replace(config, buffer_size=33)).tune(40)
    assert tried == [40, 41, 40] and len(list(folder.glob("tiles-*.json"))) == 3
    folder.chmod(0o777)
    monkeypatch.setenv("LONGATTN_CACHE", str(folder / "below"))
    (folder / "below").symlink_to(folder)
    RingBufferAttention(config).tune(40)
    assert tried == [40, 41, 40, 40]


@pytest.mark.parametrize("said", [{}, {"tile_size": 0}, {"tile_order": "x"}, {"tile_size": True}, [1]])
def test_settings_that_make_no_sense_are_not_believed(said):
    """A damaged file is no choice."""
    good = {**dict.fromkeys(SIZES, 8), "tile_order": "k_major"}
    assert tuning._checked(good) == good
    assert tuning._checked({**good, **said} if said and isinstance(said, dict) else said) is None
