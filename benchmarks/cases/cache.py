"""The pattern cache beside other caches: what a hit costs, and a key. Times are for a million of them, so milliseconds read as nanoseconds.

What is no time (hit ratios, builds per key, threads) is in `benchmarks/figures.py`.
"""

import importlib.util
from collections.abc import Callable, Iterator
from itertools import repeat

from benchmarks.calls import Calls
from benchmarks.experiment import Labels, Targets
from benchmarks.peers.key_caches import OPTIONAL, PEERS, ROOM, Get
from longattn.patterncache import CacheView, Dilated, PatternCache, Rectangle, Span

MILLION = 1_000_000
HIT_NS = 350.0
KEY_NS = 1500.0

PATTERN = Dilated((2048, 4096, 8192), (1, 2, 4), causal=True)
KEY = (PATTERN.canonical(), (0, 8192, 1), (0, 8192, 1), (8, 0, 8, 1))
VALUE = "the plan"


def hits(quick: bool) -> Iterator[Calls]:
    """A hit with a prepared key, beside each peer that is installed; and a module's view of a cache beside the cache."""
    many = 1000 if quick else MILLION
    for peer, make in PEERS.items():
        if peer in OPTIONAL and importlib.util.find_spec(OPTIONAL[peer]) is None:
            continue
        yield Calls(
            name="hit",
            labels=_labels("hit, prepared key, s3fifo", peer, many),
            targets=Targets() if quick else Targets(most_ms=HIT_NS),
            ours=lambda: asked_often(ours_get(PatternCache(ROOM)), many),
            peer=lambda make=make: asked_often(make(KEY, VALUE), many),
            gate=lambda make=make: _wrong(ours_get(PatternCache(ROOM)), make(KEY, VALUE)),
        )
    for name, cache in (
        ("hit of a view", lambda: CacheView(PatternCache(ROOM))),
        ("hit, lru", lambda: PatternCache(ROOM, "lru")),
    ):
        yield Calls(
            name=name.replace(", ", "-").replace(" ", "-"),
            labels=_labels(f"{name}, prepared key", "s3fifo cache", many),
            targets=Targets(),
            ours=lambda cache=cache: asked_often(ours_get(cache()), many),
            peer=lambda: asked_often(ours_get(PatternCache(ROOM)), many),
            gate=lambda cache=cache: _wrong(ours_get(cache()), ours_get(PatternCache(ROOM))),
        )


def ours_get(cache: PatternCache | CacheView) -> Get:
    """The cache's own call, with KEY kept in it, as the peers have theirs."""
    cache.get_or_build(KEY, lambda: VALUE)
    ask = cache.get_or_build
    return lambda key: ask(key, _never)


def _never() -> object:
    raise AssertionError("a hit builds nothing")


def asked_often(get: Get, many: int) -> Callable[[], object]:
    """Ask for KEY so often."""

    def call() -> None:
        for key in repeat(KEY, many):
            get(key)

    return call


def keys(quick: bool) -> Iterator[Calls]:
    """The key as the attention op makes it, from a pattern's kept string and the spans' numbers; beside pattern and rectangle themselves."""
    many, heads, span = (1000 if quick else MILLION), [8, 0, 8, 1], [0, 8192, 1]

    def string_and_numbers() -> None:
        for pattern in repeat(PATTERN, many):
            hash((pattern.canonical(), tuple(span), tuple(span), tuple(heads)))

    def objects() -> None:
        for pattern in repeat(PATTERN, many):
            hash((pattern, Rectangle(8, Span(0, 8192), Span(0, 8192))))

    yield Calls(
        name="key",
        labels=_labels("key building and hash", "(pattern, rectangle)", many),
        targets=Targets() if quick else Targets(most_ms=KEY_NS),
        ours=lambda: string_and_numbers,
        peer=lambda: objects,
        gate=lambda: [] if PATTERN.canonical() == KEY[0] else ["ours: the canonical string is not the key's"],
    )


def _labels(variant: str, peer: str, many: int) -> Labels:
    # `seq_len` is the number of calls; dtype, mask and direction have no meaning here.
    return Labels("cache", variant, peer, "-", many, False, "forward")


def _wrong(ours: Get, peer: Get) -> list[str]:
    return [
        f"{name}: a hit returned {get(KEY)!r}" for name, get in (("ours", ours), ("peer", peer)) if get(KEY) != VALUE
    ]


def experiments(quick: bool) -> Iterator[Calls]:
    """Every row of the case."""
    yield from hits(quick)
    yield from keys(quick)
