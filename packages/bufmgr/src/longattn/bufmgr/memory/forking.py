"""Locks that work under the garbage collector and across a fork.

The collector may run a finaliser between any two lines, also inside a locked region of the same thread. A Gate refuses
such a call, which would otherwise wait for ever, or work on data that is being changed.

Before a fork every lock of this module is taken, so that no other thread is in the middle of a change. Afterwards the parent
releases them. The child, where the other threads do not exist, gets new locks and then calls `after_fork_in_child`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable

# A thread may hold a lock during a system call; a fork waits for it at most this many seconds.
_FORK_WAIT_S = 1.0


class ForkableLock:
    """A re-entrant lock that is free in a forked child and in a copy."""

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
    """Admits one thread at a time, and the same thread only once."""

    def __init__(self) -> None:
        self._lock = ForkableLock()
        self._inside = False

    def enter(self, *, blocking: bool) -> bool:
        """Return whether the caller is inside now and must call `leave`.

        False: another thread is inside (only without `blocking`), or this thread is, in a caller of this call.
        """
        if not self._lock.acquire(blocking):
            return False
        if self._inside:
            self._lock.release()
            return False
        self._inside = True
        return True

    def leave(self) -> None:
        """Admit the next thread."""
        self._inside = False
        self._lock.release()

    def renew_in_child(self) -> None:
        """Empty the gate after a fork, in the child: the thread that was inside does not exist there."""
        self._inside = False


class ForkListener:
    """An object that changes its state in a forked child."""

    def after_fork_in_child(self) -> None:
        """Change the state; every lock is free."""
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
