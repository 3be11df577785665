"""What planning costs: a million tokens, a million block cells, lint, and its share of a forward."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from benchmarks.calls import Calls
from benchmarks.cases.attention import RATES, SEGMENTS, branch_names
from benchmarks.comparison import Inputs
from benchmarks.experiment import Labels, Targets
from longattn.attention import pattern_attention
from longattn.patterncache import (
    BlockSparse,
    Dilated,
    Documents,
    Full,
    HierarchicalBlocks,
    Pattern,
    Rectangle,
    Span,
    Strided,
    Window,
    get_global_pattern_cache,
)
from longattn.patterncache.testing import check_plan

MILLION = 1 << 20
_TINY = 1024


def square(length: int, num_heads: int = 8) -> Rectangle:
    """The rectangle of a whole sequence."""
    return Rectangle(num_heads, Span(0, length), Span(0, length))


def plans(quick: bool) -> Iterator[Calls]:
    """Dilated attention of a million tokens, beside index arrays as the seeds' caches hold them: a list of positions per branch."""
    length = _TINY if quick else MILLION
    pattern = Dilated(SEGMENTS, RATES, causal=True)

    def index_lists() -> list[np.ndarray]:
        whole = length // SEGMENTS[0] * SEGMENTS[0] if length >= SEGMENTS[-1] else 0
        return [
            np.arange(whole).reshape(-1, s)[:, h % r :: r].copy()
            for s, r in zip(SEGMENTS, RATES, strict=True)
            for h in range(r)
        ]

    def gate() -> list[str]:
        check_plan(Dilated((8, 16, 32), RATES, causal=True).plan(square(100)), Dilated((8, 16, 32), RATES, causal=True))
        return [] if pattern.plan(square(length)).nbytes <= 10_000 else ["ours: the plan holds more than 10 KB"]

    yield Calls(
        name="plan",
        labels=_labels(f"plan of dilated {branch_names(SEGMENTS, RATES)} h8", "index arrays", length, causal=True),
        targets=Targets() if quick else Targets(most_ms=1.0),
        ours=lambda: lambda: pattern.plan(square(length)),
        peer=lambda: index_lists,
        gate=gate,
    )


def block_masks(quick: bool) -> Iterator[Calls]:
    """A million block cells, a tenth of them seen, beside the ordered block lists of FlexAttention's create_block_mask."""
    blocks = 32 if quick else 1024
    mask = np.random.default_rng(0).random((blocks, blocks)) < 0.1
    tensor = torch.from_numpy(mask)

    def flex_lists() -> tuple[torch.Tensor, torch.Tensor]:
        # As FlexAttention orders a dense block mask, forward and transposed.
        return tuple(
            torch.argsort(side.int(), dim=-1, descending=True, stable=True) for side in (tensor, tensor.T.contiguous())
        )  # type: ignore[return-value]

    def gate() -> list[str]:
        small = BlockSparse(4, mask[:16, :16])
        check_plan(small.plan(square(60)), small)
        return []

    for causal in (False, True):
        yield Calls(
            name=f"blocks-{'causal' if causal else 'full'}",
            labels=_labels(
                "mask of block cells to plan, 10 % seen", "FlexAttention's lists", blocks * 64, causal=causal
            ),
            targets=Targets() if quick else Targets(most_ms=15.0),
            ours=lambda causal=causal: lambda: BlockSparse(64, mask, causal).plan(square(blocks * 64)),
            peer=lambda: flex_lists,
            gate=gate,
        )


def lints(quick: bool) -> Iterator[Calls]:
    """`lint` of a million tokens, beside dense counts of 2048 tokens in one head, which say less; of block masks, of an eighth as many."""
    length = _TINY if quick else MILLION
    third, eighth = length // 3, length // 8
    mask = _random_blocks(-(-eighth // 128))
    patterns: dict[str, tuple[Pattern, int]] = {
        "full": (Full(causal=True), length),
        "window": (Window(512), length),
        "window-sinks": (Window(512, sinks=4), length),
        "dilated": (Dilated(SEGMENTS, RATES, causal=True), length),
        "strided": (Strided(1024), length),
        "hierarchical": (HierarchicalBlocks(128, 4, 8, causal=True), length),
        "documents": (Documents([0, third, 2 * third, length], Window(512)), length),
        "blocks": (BlockSparse(128, mask), eighth),
        "blocks-causal": (BlockSparse(128, mask, causal=True), eighth),
        "blocks-per-head": (BlockSparse(128, np.stack([np.roll(mask, h, 1) for h in range(8)])), eighth),
    }
    for name, (pattern, tokens) in patterns.items():
        yield Calls(
            name=f"lint-{name}",
            labels=_labels(f"lint of {name} h8", "dense counts of 2048", tokens, causal="blocks" not in name),
            targets=Targets() if quick else Targets(most_ms=100.0),
            ours=lambda pattern=pattern, tokens=tokens: lambda: pattern.lint(tokens, num_heads=8),
            peer=lambda pattern=pattern, tokens=tokens: (
                lambda: pattern.counts(_one_head(min(2048, tokens))).sum(axis=2)
            ),
            gate=lambda pattern=pattern, tokens=tokens: _wrong_lint(pattern, min(tokens, 300)),
        )


def _one_head(length: int) -> Rectangle:
    """The whole sequence in the first of eight heads."""
    return Rectangle(8, Span(0, length), Span(0, length), Span(0, 1))


def _random_blocks(blocks: int) -> np.ndarray:
    """(blocks, blocks) bool: every tenth, and the diagonal."""
    mask = np.random.default_rng(0).random((blocks, blocks)) < 0.1
    np.fill_diagonal(mask, True)
    return mask


def _wrong_lint(pattern: Pattern, length: int) -> list[str]:
    keys = pattern.counts(square(length)).sum(axis=2)
    said = pattern.lint(length)
    true = (int(keys.sum()), int(keys.min()), int(keys.max()))
    return [] if (said.pairs, said.fewest_keys, said.most_keys) == true else [f"ours: lint says {said}, counts {true}"]


def forwards(quick: bool) -> Iterator[Calls]:
    """A forward whose plan is cached, beside the same forward that plans anew: the ratio is what the cache saves."""
    patterns = {"dilated": Dilated(SEGMENTS, RATES, causal=True), "blocks": None}
    for length in (256, 512) if quick else (256, 1024, 4096, 8192, 32768):
        for name, pattern in patterns.items():
            blocks = -(-length // 128)
            chosen = pattern or BlockSparse(128, _random_blocks(blocks), causal=True)
            yield Calls(
                name=f"forward-{name}",
                labels=_labels(
                    f"forward of {name} h8 d64, plan cached", "plan anew", length, causal=True, dtype="float32"
                ),
                targets=Targets(),
                ours=lambda chosen=chosen, length=length: _forward(chosen, length, anew=False),
                peer=lambda chosen=chosen, length=length: _forward(chosen, length, anew=True),
                gate=lambda chosen=chosen, length=length: _wrong_forward(chosen, length),
            )


def _forward(pattern: Pattern, length: int, anew: bool) -> Callable[[], object]:
    q, k, v, _ = Inputs(length, "float32").tensors()
    cache = get_global_pattern_cache()

    def call() -> object:
        if anew:
            cache.clear()
        return pattern_attention(q, k, v, pattern)

    return call


def _wrong_forward(pattern: Pattern, length: int) -> list[str]:
    cached, anew = (_forward(pattern, length, anew)() for anew in (False, True))
    assert isinstance(cached, torch.Tensor) and isinstance(anew, torch.Tensor)
    return [] if torch.equal(cached, anew) else ["ours: a cached plan gives another result than a new one"]


def packings(quick: bool) -> Iterator[Calls]:
    """A forward over a packing of 64 documents that nobody saw before, beside the same of one whose plan is there: the difference is what
    planning and lowering cost.
    """
    total, documents = (512, 8) if quick else (8192, 64)
    patterns: dict[str, Pattern] = {
        "full": Full(causal=True),
        "window": Window(128),
        "dilated": Dilated((512, 2048), (1, 4), causal=True),
    }
    for name, pattern in patterns.items():
        yield Calls(
            name=f"packing-{name}",
            labels=_labels(
                f"forward of {name} h8 d64, {documents} documents, a new packing",
                "the same packing again",
                total,
                causal=True,
                dtype="float32",
            ),
            targets=Targets(),
            ours=lambda pattern=pattern: _packed(pattern, total, documents, anew=True),
            peer=lambda pattern=pattern: _packed(pattern, total, documents, anew=False),
            gate=lambda pattern=pattern: _wrong_packed(pattern),
        )


def _packed(pattern: Pattern, total: int, documents: int, anew: bool) -> Callable[[], object]:
    q, k, v, _ = Inputs(total, "float32").tensors()
    random = np.random.default_rng(0)

    def cuts() -> torch.Tensor:
        inner = np.sort(random.choice(np.arange(1, total), documents - 1, replace=False))
        return torch.from_numpy(np.concatenate([[0], inner, [total]]))

    known = cuts()
    return lambda: pattern_attention(q, k, v, pattern, cu_seqlens=cuts() if anew else known)


def _wrong_packed(pattern: Pattern) -> list[str]:
    packed = Documents([0, 9, 9, 40, 64], pattern)
    check_plan(packed.plan(square(64, 4)), packed)
    return []


def _labels(variant: str, peer: str, length: int, *, causal: bool, dtype: str = "-") -> Labels:
    return Labels("planning", variant, peer, dtype, length, causal, "forward")


def experiments(quick: bool) -> Iterator[Calls]:
    """Every row of the case."""
    for group in (plans, block_masks, lints, forwards, packings):
        yield from group(quick)
