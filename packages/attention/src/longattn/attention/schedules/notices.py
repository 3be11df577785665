"""Notices: a rank that fails in the middle of a pass says so in the group's store, where ranks that wait look.

A message cannot carry it: a receive that was posted for data takes nothing else. The store is that of the rendezvous (`torchrun`'s, or the file's);
its client may block, because the process that serves it is stopped, so it is asked in threads that nobody waits for. Where the store is
gone, or was given none, ranks notice by closed connections and timeouts alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import torch.distributed as dist

from longattn.attention.schedules.place import Place

_INTERVAL = 0.1
"""Seconds between two looks."""
_PATIENCE = 1.0
"""Seconds that a failing rank waits for its notice to be written."""


class Lookout:
    """Looks for a notice while this process waits.

    Life: 1. made: a thread asks the store again and again; 2. `seen` is the notice as soon as there is one; 3. `stop`.
    """

    def __init__(self, place: Place, key: str) -> None:
        self.seen: str | None = None
        self._ended = threading.Event()
        _in_thread(lambda: self._look(place, key))

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()

    def _look(self, place: Place, key: str) -> None:
        store = _store_of(place)
        while not store.check([key]):
            if self._ended.wait(_INTERVAL):
                return
        self.seen = bytes(store.get(key)).decode(errors="replace")


def leave_notice(place: Place, key: str, text: str) -> None:
    """Write a notice, unless another rank has written one under that key."""
    _in_thread(lambda: _store_of(place).compare_set(key, "", text)).join(_PATIENCE)


def _in_thread(action: Callable[[], object]) -> threading.Thread:
    def run() -> None:
        try:
            action()
        except (RuntimeError, ValueError, KeyError):
            # The store, or the group, is gone: what other ranks see of that says enough.
            return

    thread = threading.Thread(target=run, name="longattn notices", daemon=True)
    thread.start()
    return thread


def _store_of(place: Place) -> Any:
    """A connection of its own: another one may be held by a call that waits."""
    return cast(Any, dist.distributed_c10d)._get_process_group_store(place.group).clone()
