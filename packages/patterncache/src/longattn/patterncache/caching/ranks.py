"""One plan on every rank of a process group: one rank builds, the others receive, and a digest proves that all have the same.

Torch is imported only here, when asked. These are collectives: every rank of the group calls them, in the same order, as it would
all_reduce; so at set-up or between steps, not in every forward, whose plans are then hits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from importlib import import_module
from typing import Any, cast

import numpy as np

from longattn.patterncache.caching.cache import PatternCache
from longattn.patterncache.caching.view import CacheView
from longattn.patterncache.caching.wire import plan_digest, plan_from_bytes, plan_to_bytes
from longattn.patterncache.pattern import Pattern
from longattn.patterncache.plan import Plan
from longattn.patterncache.spans import shortened

_MISSING = "0" * 64


def build_on_one(
    cache: PatternCache | CacheView, key: Hashable, build: Callable[[], Plan], *, group: Any = None
) -> Plan:
    """The plan of `key` on every rank, kept in each rank's cache; built by one rank, and only where no rank has it.

    Args:
        cache: this rank's.
        key: the same on every rank, and made of patterns, numbers, strings and tuples.
        build: makes the plan; the first rank calls it, unless another has the plan already.
        group: a torch.distributed process group. Default None: all ranks.

    Raises:
        ValueError: ranks ask for different keys, or hold different plans; they are named. All ranks raise.
        RuntimeError: on the ranks that wait for a build that failed; the rank that builds raises what its build raised.
    """
    if not isinstance(cache, (PatternCache, CacheView)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"cache must be a PatternCache or a CacheView, got {shortened(cache)} ({type(cache).__name__})")
    mine = cache._cache.get(key)  # pyright: ignore[reportPrivateUsage]
    answers = _gather([_key_digest(key), _MISSING if mine is None else plan_digest(mine)], group)
    _check_equal("key", [keys for keys, _ in answers])
    holders = [rank for rank, (_, digest) in enumerate(answers) if digest != _MISSING]
    _check_equal("plan", [digest for _, digest in answers if digest != _MISSING], holders)
    if len(holders) == len(answers):
        return cache.get_or_build(key, build)
    plan = _spread(cache, key, build, holders[0] if holders else 0, group)
    check_same_plan(plan, group=group)
    return plan


def check_same_plan(plan: Plan, *, group: Any = None) -> str:
    """Return the digest that all ranks' plans have.

    Raises:
        ValueError: ranks hold different plans; they are named. All ranks raise.
    """
    digests = [digest for (digest,) in _gather([plan_digest(plan)], group)]
    _check_equal("plan", digests)
    return digests[0]


def _spread(cache: PatternCache | CacheView, key: Hashable, build: Callable[[], Plan], source: int, group: Any) -> Plan:
    """From the rank `source` to all; a build that fails there ends all ranks' wait."""
    if _rank(group) != source:
        data = _broadcast(None, source, group)
        if not data:
            raise RuntimeError(f"rank {source} failed to build the plan of {_shown(key)}")
        received = plan_from_bytes(data)
        return cache.get_or_build(key, lambda: received)
    sent = b""
    try:
        plan = cache.get_or_build(key, build)
        sent = plan_to_bytes(plan)
    finally:
        _broadcast(sent, source, group)
    return plan


def _gather(texts: list[str], group: Any) -> list[list[str]]:
    """Every rank's texts of 64 characters."""
    torch, dist = import_module("torch"), import_module("torch.distributed")
    mine = torch.frombuffer(bytearray("".join(texts).encode()), dtype=torch.uint8).to(_device(group))
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    gathered = [bytes(part.cpu().numpy()).decode() for part in parts]
    return [[text[at : at + 64] for at in range(0, len(text), 64)] for text in gathered]


def _broadcast(data: bytes | None, source: int, group: Any) -> bytes:
    torch, dist = import_module("torch"), import_module("torch.distributed")
    device = _device(group)
    sender = source if group is None else dist.get_global_rank(group, source)
    length = torch.tensor([0 if data is None else len(data)], dtype=torch.int64, device=device)
    dist.broadcast(length, src=sender, group=group)
    if data is None:
        content = torch.empty(int(length), dtype=torch.uint8, device=device)
    else:
        content = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)].to(device)
    if len(content):
        dist.broadcast(content, src=sender, group=group)
    return bytes(np.asarray(content.cpu()))


def _device(group: Any) -> Any:
    torch, dist = import_module("torch"), import_module("torch.distributed")
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _rank(group: Any) -> int:
    return import_module("torch.distributed").get_rank(group)


def _check_equal(name: str, digests: list[str], ranks: list[int] | None = None) -> None:
    by_digest: dict[str, list[int]] = {}
    for rank, digest in zip(ranks or range(len(digests)), digests, strict=True):
        by_digest.setdefault(digest, []).append(rank)
    if len(by_digest) > 1:
        sides = "; ".join(f"ranks {', '.join(map(str, some))}: {digest[:12]}" for digest, some in by_digest.items())
        raise ValueError(f"{name} must be the same on all ranks, got digests {sides}")


def _key_digest(key: Hashable) -> str:
    return hashlib.sha256(_shown(key).encode()).hexdigest()


def _shown(key: object) -> str:
    """A key as text that says everything: a pattern's repr may be short."""
    if isinstance(key, Pattern):
        return key.canonical()
    if isinstance(key, tuple):
        return f"({','.join(map(_shown, cast('tuple[object, ...]', key)))})"
    return repr(key)
