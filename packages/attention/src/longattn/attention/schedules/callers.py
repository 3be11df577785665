"""Which calls are whose: the one `GroupCalls` of each group in this process, and the module that a thread calls for."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from longattn.attention.schedules.group_calls import GroupCalls
from longattn.attention.schedules.place import Place

_CALLS: dict[str, tuple[weakref.ref[Any], GroupCalls]] = {}
_LOCK = threading.Lock()


def calls_over(place: Place) -> GroupCalls:
    """The one object of a group. A group that was made anew under an old name has its own."""
    group = place.group
    known = _CALLS.get(place.name)
    if known is not None and known[0]() is group:
        return known[1]
    with _LOCK:
        known = _CALLS.get(place.name)
        if known is None or known[0]() is not group:
            calls = GroupCalls(place)
            weakref.finalize(group, calls.close).atexit = False
            known = _CALLS[place.name] = weakref.ref(group), calls
        return known[1]


def _close_all() -> None:
    """What is in flight when the interpreter ends has failed, and a thread that waits for it must not outlive the interpreter."""
    for _, calls in list(_CALLS.values()):
        if calls.unfinished:
            calls.close()


atexit.register(_close_all)


class _Calling(threading.local):
    module: object = None


_CALLING = _Calling()


@contextmanager
def calling(module: object) -> Generator[None]:
    """Calls of this thread are the module's, as long as the context is open."""
    outer, _CALLING.module = _CALLING.module, module
    try:
        yield
    finally:
        _CALLING.module = outer


def caller_fields(calls: GroupCalls) -> dict[str, str]:
    """Who calls: the fields caller and thread."""
    thread = threading.current_thread()
    return {
        "caller": calls.caller(_CALLING.module),
        "thread": "main" if thread is threading.main_thread() else thread.name,
    }
