"""Locks that survive the two things a memory manager meets: the collector, and fork.

The collector may run a finaliser between any two lines, also inside a locked region of the same thread. A Gate lets
such a visitor know that it is not alone, instead of blocking for ever or seeing half a change.

Before a fork every lock here is taken, so that no other thread is halfway through a change; afterwards the parent
releases them and the child, where those threads do not exist, gets new ones and then calls `after_fork_in_child`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable

# A thread may sit in a system call under a lock; a fork does not wait for it longer than this many seconds.
_FORK_WAIT_S = 1.0


class ForkableLock:
    """A re-entrant lock that a forked child finds free, and so does a copy."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held_for_fork = False
        _LOCKS.add(self)

    def __reduce__(self) -> tuple[type[ForkableLock], tuple[()]]:
        return type(self), ()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def acquire(self, blocking: bool) -> bool:
        """Take the lock; without blocking, return False when another thread has it."""
        return self._lock.acquire(blocking)

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def hold_for_fork(self) -> None:
        """Take the lock before a fork."""
        self._held_for_fork = self._lock.acquire(timeout=_FORK_WAIT_S)

    def free_in_parent(self) -> None:
        """Release after a fork, in the parent."""
        if self._held_for_fork:
            self._held_for_fork = False
            self._lock.release()

    def renew_in_child(self) -> None:
        """Start anew after a fork, in the child."""
        self._held_for_fork = False
        self._lock = threading.RLock()


class Gate:
    """Lets one visitor in at a time, and never the same thread twice."""

    def __init__(self) -> None:
        self._lock = ForkableLock()
        self._inside = False

    def enter(self, *, blocking: bool) -> bool:
        """Return whether the caller is inside now and must call `leave`.

        False: another thread is inside (only without `blocking`), or this thread is, further up its stack.
        """
        if not self._lock.acquire(blocking):
            return False
        if self._inside:
            self._lock.release()
            return False
        self._inside = True
        return True

    def leave(self) -> None:
        """Let the next one in."""
        self._inside = False
        self._lock.release()

    def renew_in_child(self) -> None:
        """Empty the gate after a fork, in the child: whoever was inside does not exist here."""
        self._inside = False


class ForkListener:
    """Something that changes its state in a forked child."""

    def after_fork_in_child(self) -> None:
        """Do it; every lock is free."""
        raise NotImplementedError


_LOCKS: weakref.WeakSet[ForkableLock] = weakref.WeakSet()
_CHILD_CALLS: weakref.WeakSet[ForkListener] = weakref.WeakSet()


def listen_to_forks(listener: ForkListener) -> None:
    """Call `listener.after_fork_in_child()` in every forked child, as long as the listener lives."""
    _CHILD_CALLS.add(listener)


def _before_fork() -> None:
    for lock in list(_LOCKS):
        lock.hold_for_fork()


def _after_fork_in_parent() -> None:
    for lock in list(_LOCKS):
        lock.free_in_parent()


def _after_fork_in_child() -> None:
    for lock in list(_LOCKS):
        lock.renew_in_child()
    for listener in list(_CHILD_CALLS):
        listener.after_fork_in_child()


def _register(**hooks: Callable[[], None]) -> None:
    if hasattr(os, "register_at_fork"):  # no fork, nothing to do
        os.register_at_fork(**hooks)


_register(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
