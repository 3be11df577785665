"""`Flight`: one build that others wait for, and what a fork does to it."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import os
import threading
from collections.abc import Hashable
from typing import Any, Protocol
from weakref import WeakSet


class Flight:
    """One build under way. It ends in one of three ways: built, failed (`error`), or interrupted, after which a waiting thread builds.

    Attributes:
        owner: the thread that builds.
        value: what was built, once `built`.
        error: the exception that the build raised.
    """

    __slots__ = ("built", "done", "error", "key", "owner", "value")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.owner = threading.get_ident()
        self.done = threading.Event()
        self.built = False
        self.value: Any = None
        self.error: Exception | None = None


def check_no_circle(flight: Flight, waiting: dict[int, Flight]) -> None:
    """Refuse to wait for a build that waits, itself or over other threads, for this thread.

    Args:
        flight: the build that this thread is about to wait for.
        waiting: which build each waiting thread waits for.

    Raises:
        RuntimeError: the wait would never end.
    """
    other: Flight | None = flight
    while other is not None and not other.done.is_set():
        if other.owner == threading.get_ident():
            raise RuntimeError(
                f"the build of {flight.key!r} needs its own value: it, or a build it asks for, asks for that key"
            )
        other = waiting.get(other.owner)


class Forkable(Protocol):
    """What has a lock that must be free, and builds that other threads will never end, in a forked child."""

    _lock: threading.Lock

    def _after_fork_in_child(self) -> None: ...


_LIVING: WeakSet[Any] = WeakSet()
_LIVING_LOCK = threading.Lock()
_HELD: list[Forkable] = []


def survive_forks(cache: Forkable) -> None:
    """From now on a fork waits for the lock of `cache`, and the child's cache gets a lock of its own."""
    with _LIVING_LOCK:
        _LIVING.add(cache)


def _before_fork() -> None:
    _LIVING_LOCK.acquire()
    _HELD.extend(_LIVING)
    for cache in _HELD:
        cache._lock.acquire()


def _after_fork_in_parent() -> None:
    for cache in _HELD:
        cache._lock.release()
    _HELD.clear()
    _LIVING_LOCK.release()


def _after_fork_in_child() -> None:
    for cache in _HELD:
        cache._after_fork_in_child()
    _HELD.clear()
    # The thread that took it is the one that lives on.
    _LIVING_LOCK.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
