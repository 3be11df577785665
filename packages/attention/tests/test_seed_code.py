"""The Python blocks of the documents that this project grew from run, from copies in `seed_code/`.

What a block gets: its import lines mapped by `HOMES`, the names that it leaves free bound by a prologue, "cuda" read as "cpu" without a
GPU. Every other edit stands beside the block, in `BLOCKS`.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from longattn.attention import ImprovedDilatedAttentionV2, RingDilatedAttentionV3

HOMES = {
    "AttentionBufferManager": "longattn.bufmgr",
    "BufferConfig": "longattn.bufmgr",
    "BufferType": "longattn.bufmgr",
    "create_attention_buffer_manager": "longattn.bufmgr",
    "get_global_memory_pool": "longattn.bufmgr",
    "reset_global_memory_pool": "longattn.bufmgr",
    "get_global_pattern_cache": "longattn.patterncache",
    "reset_global_pattern_cache": "longattn.patterncache",
    "DilatedAttention": "longattn.attention",
    "ImprovedDilatedAttention": "longattn.attention",
    "ImprovedDilatedAttentionV2": "longattn.attention",
    "RingDilatedAttentionV2": "longattn.attention",
    "RingDilatedAttentionV3": "longattn.attention",
}
"""Where each name that the blocks import from `dilated_attention_pytorch...` lives."""

IMPORT = re.compile(r"^from dilated_attention_pytorch[.\w]* import (\([^)]*\)|.*)$", re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

Names = dict[str, Any]


@dataclass
class Block:
    """One block: what it leaves free, what is edited, and what must be true afterwards."""

    page: str
    number: int
    prologue: str
    check: Callable[[Names], object]
    edits: tuple[tuple[str, str], ...] = ()


QKV = "query, key, value = torch.randn(3, 2, 1024, 8, 64)"
MANAGED = "attention = ImprovedDilatedAttentionV2([64, 128], [1, 2], enable_buffer_manager=True)"
CREATE = "from longattn.bufmgr import BufferType, create_attention_buffer_manager"
RING = "model = RingDilatedAttentionV3([64], [1], use_pattern_cache=True, enable_memory_pool=True)"


def attends(name: str) -> Callable[[Names], object]:
    """The module that a block left under `name` attends."""

    def check(names: Names) -> bool:
        x = torch.randn(1, 100, 2, 8)
        return names[name](x, x, x).shape == x.shape

    return check


def completed(cache: str) -> tuple[tuple[str, str], ...]:
    """The edits that complete a MyAttention sketch: no ellipsis among the arguments, nn.Module's constructor, and a forward."""
    flag, held, role = {
        "cache": ("use_pattern_cache", "self._pattern_cache = get_global_pattern_cache()", "cache=self._pattern_cache"),
        "pool": ("enable_memory_pool", "self._memory_pool = get_global_memory_pool()", "allocator=self._memory_pool"),
    }[cache]
    last = f"        {held} if {flag} else None\n"
    forward = (
        "    def forward(self, query, key, value):\n"
        f"        environment = Environment({role})\n"
        "        return pattern_attention(query, key, value, Dilated((64,), (1,)), environment=environment)\n"
    )
    return (
        (
            f"def __init__(self, ..., {flag}=False):\n",
            f"def __init__(self, {flag}=False):\n        super().__init__()\n",
        ),
        (last, last + forward),
    )


MY_ATTENTION = """
from torch import nn
from longattn.attention import pattern_attention
from longattn.kernels.dispatch.environment import Environment
from longattn.patterncache import Dilated
"""

RING_BUFFER = """
from longattn.attention import RingBufferAttention, RingBufferConfig, TileOrder
model = RingBufferAttention(RingBufferConfig())
"""
PROMPT = "query, key, value = torch.randn(3, 2, 40, 8, 64).requires_grad_()"
STEP = """
current_pos, (decoder_query, decoder_key, decoder_value) = 40, torch.randn(3, 2, 1, 8, 64)
attention_mask, padding_mask = torch.ones(1, 41, dtype=torch.bool), torch.zeros(2, 41, dtype=torch.bool)
encoder_output, buffer_state = model(query, key, value)
"""
FED = """
pos, (dec_query, dec_key, dec_value) = 40, torch.randn(3, 2, 1, 8, 64)
output, state = model(query, key, value)
"""


def streams(order: str) -> Callable[[Names], object]:
    """The model that a block left attends in that order of tiles."""

    def check(names: Names) -> bool:
        x = torch.randn(3, 1, 9, 8, 64)
        return names["model"].tiling_processor.tile_order.name == order and names["model"](*x)[0].shape == x[0].shape

    return check


BLOCKS = [
    Block(
        "000", 1, "", lambda n: n["manager"].get_stats()["cache_hits"] == 1 and n["query2"].shape == (2, 1024, 8, 64)
    ),
    Block("000", 2, QKV, lambda n: n["output"].shape == n["query"].shape and n["stats"]["cache_misses"] > 0),
    Block("000", 3, "", lambda n: n["manager"].configs[n["BufferType"].SCORES].typical_size_mb == 16.0),
    Block("000", 4, CREATE, lambda n: n["manager"].enable_reuse),
    Block("000", 5, CREATE, lambda n: n["manager"].lightweight),
    Block(
        "000",
        6,
        f"{CREATE}\nmanager = create_attention_buffer_manager()",
        lambda n: n["manager"].get_stats()["cached_buffers"] == 4,
    ),
    Block(
        "000",
        7,
        f"{CREATE}\nmanager = create_attention_buffer_manager()\nmanager.preallocate_buffers(1, 8, 2, 4)",
        lambda n: n["manager"].get_stats()["cached_buffers"] == 0,
    ),
    Block("001", 1, "from longattn.attention import ImprovedDilatedAttention", attends("attention")),
    Block("001", 2, "", attends("attention")),
    Block(
        "001",
        3,
        f"{MANAGED}\nbatch_size, seq_len, num_heads, head_dim = 1, 32, 2, 8",
        lambda n: n["attention"].get_buffer_stats()["cached_buffers"] == 4,
    ),
    Block("001", 4, MANAGED, lambda n: n["stats"]["cache_hit_rate"] == 0.0),
    Block("002", 1, "", lambda n: attends("model")(n) and n["model"]._pattern_cache.get_stats()["misses"] == 1),
    Block("002", 2, "", lambda n: n["cache"].get_stats()["size"] == 0),
    Block("002", 3, "", attends("model")),
    Block("002", 4, "", lambda n: attends("model")(n) and n["model"]._memory_pool.get_stats()["profile"]),
    Block("002", 5, "", lambda n: n["pool"].get_stats()["allocation_count"] == 0),
    Block("002", 6, "from longattn.attention import RingDilatedAttentionV2", attends("model")),
    Block("002", 7, "", lambda n: attends("model")(n) and "resident_bytes" in n["model"]._pattern_cache.get_stats()),
    Block(
        "002",
        8,
        MY_ATTENTION,
        lambda n: (
            all(attends("made")({"made": n["MyAttention"](flag)}) for flag in (False, True))
            and n["MyAttention"](True)._pattern_cache.get_stats()["hits"] == 1
        ),
        completed("cache"),
    ),
    Block(
        "002",
        9,
        MY_ATTENTION,
        lambda n: (
            all(attends("made")({"made": n["MyAttention"](flag)}) for flag in (False, True))
            and n["MyAttention"](True)._memory_pool.get_stats()["allocation_count"] > 0
        ),
        completed("pool"),
    ),
    Block(
        "002",
        10,
        "from longattn.attention import RingDilatedAttentionV3\nx = torch.randn(1, 64, 2, 8)",
        lambda n: n["cache_stats"]["hit_rate"] == 0.5 and 0 < n["pool_stats"]["reuse_rate"] < 1,
        (
            (
                "# After running some forward passes\n",
                "# After running some forward passes\nfor _ in range(2):\n    model(x, x, x)\n",
            ),
        ),
    ),
    Block(
        "002",
        11,
        RING,
        lambda n: logging.getLogger("longattn").level == logging.DEBUG,
        (('getLogger("dilated_attention_pytorch")', 'getLogger("longattn")'),),
    ),
    Block("003", 1, RING_BUFFER, lambda n: (n["config"].prefill_size, n["config"].causal) == (512, True)),
    Block("003", 2, f"{RING_BUFFER}\nconfig = RingBufferConfig()", streams("Q_MAJOR"), ((".cuda()", ""),)),
    Block("003", 3, RING_BUFFER, streams("Q_MAJOR")),
    Block(
        "003",
        4,
        f"{RING_BUFFER}\n{PROMPT}",
        lambda n: n["encoder_output"].requires_grad and n["buffer_state"].position == 40,
    ),
    Block(
        "003",
        5,
        f"{RING_BUFFER}\n{PROMPT}\n{STEP}",
        lambda n: n["decoder_output"].shape == (2, 1, 8, 64) and n["buffer_state"].position == 41,
    ),
    Block("003", 6, RING_BUFFER, streams("Q_MAJOR")),
    Block("003", 7, RING_BUFFER, streams("K_MAJOR")),
    Block("003", 8, RING_BUFFER, lambda n: n["config"] == n["RingBufferConfig"]()),
    Block("003", 9, RING_BUFFER, lambda n: n["model"].training and streams("Q_MAJOR")(n)),
    Block("003", 10, f"{RING_BUFFER}\n{PROMPT}", lambda n: n["output"].requires_grad and n["state"].position == 40),
    Block("003", 11, f"{RING_BUFFER}\n{PROMPT}", lambda n: not n["output"].requires_grad),
    Block(
        "003",
        12,
        f"{RING_BUFFER}\n{PROMPT}\n{FED}",
        lambda n: torch.equal(n["state"].feedback(1), n["decoder_output"]) and n["state"].position == 41,
    ),
    Block("003", 13, RING_BUFFER, lambda n: not n["model"].training and streams("Q_MAJOR")(n)),
]


def written(page: str) -> list[str]:
    """The blocks of a page as they were written."""
    return BLOCK.findall((Path(__file__).parent / "seed_code" / f"{page}.md").read_text(encoding="utf-8"))


def mapped_import(found: re.Match[str]) -> str:
    """An import line with each name from where it lives."""
    names = re.findall(r"\w+", found[1])
    return "\n".join(f"from {HOMES[name]} import {name}" for name in names)


def ready(block: Block) -> str:
    """The block as it runs."""
    text = written(block.page)[block.number - 1]
    for old, new in block.edits:
        assert text.count(old) == 1, f"an edit that edits nothing: {old!r}"
        text = text.replace(old, new)
    text = IMPORT.sub(mapped_import, text)
    return text if torch.cuda.is_available() else text.replace('"cuda"', '"cpu"')


@pytest.fixture
def _quiet_again():
    logger = logging.getLogger("longattn")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("_quiet_again")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}-{block.number}")
def test_the_block_runs_and_does_what_it_says(block):
    """In a namespace of its own."""
    names: Names = {
        "__name__": "block",
        "torch": torch,
        "ImprovedDilatedAttentionV2": ImprovedDilatedAttentionV2,
        "RingDilatedAttentionV3": RingDilatedAttentionV3,
    }
    exec(compile(block.prologue, "prologue", "exec"), names)
    exec(compile(ready(block), f"{block.page}.md block {block.number}", "exec"), names)
    assert block.check(names)


def test_every_block_is_run():
    """None is left out, and nothing but mapped imports still names the old package."""
    assert [(b.page, b.number) for b in BLOCKS] == [
        (page, number + 1) for page in ("000", "001", "002", "003") for number in range(len(written(page)))
    ]
    assert not any("dilated_attention_pytorch" in ready(block) for block in BLOCKS)


def test_an_edit_that_edits_nothing_is_an_error():
    """So that the list of edits stays true."""
    with pytest.raises(AssertionError, match="edits nothing"):
        ready(Block("000", 1, "", bool, (("no such text", ""),)))
