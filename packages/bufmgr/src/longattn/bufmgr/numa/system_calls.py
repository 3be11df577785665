"""Linux's calls for the placement of memory, through ctypes: glibc has no functions for them.

Source: the manual pages mbind(2), set_mempolicy(2), get_mempolicy(2), move_pages(2) and getcpu(2), include/uapi/linux/mempolicy.h,
and the tables of system calls of x86-64 and of aarch64 (include/uapi/asm-generic/unistd.h).
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Policy = Literal["bind", "prefer", "interleave"]
"""bind: only on these nodes. prefer: there while there is room. interleave: page by page, round the nodes."""

_MODES = {"default": 0, "prefer": 1, "bind": 2, "interleave": 3}
_MOVE = 1 << 1  # MPOL_MF_MOVE: also pages that are there already, of this process alone
_LONG_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)
_MOST_NODES = 1024  # MAX_NUMNODES of the largest kernel configuration
_PAGES_PER_CALL = 1 << 16


class _Numbers(NamedTuple):
    mbind: int
    get_mempolicy: int
    set_mempolicy: int
    move_pages: int
    getcpu: int


_NUMBERS = {"x86_64": _Numbers(237, 239, 238, 279, 309), "aarch64": _Numbers(235, 236, 237, 239, 168)}


class ThreadPolicy(NamedTuple):
    """A thread's policy as the kernel holds it: mode and node mask."""

    mode: int
    mask: tuple[int, ...]


class SystemCalls:
    """The calls; each raises OSError with the kernel's error. libc: what has `syscall`, for tests."""

    def __init__(self, libc: Any, machine: str) -> None:
        self._libc = libc
        self._numbers = _NUMBERS[machine]

    def _call(self, number: int, *arguments: Any) -> None:
        if self._libc.syscall(ctypes.c_long(number), *arguments) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def bind_range(self, address: int, nbytes: int, policy: Policy | None, nodes: Sequence[int]) -> None:
        """Set the policy of whole pages, and move those that are elsewhere; None sets the default policy and moves nothing."""
        mask, bits = (None, 0) if policy is None else (_mask(nodes), _MOST_NODES)
        mode = ctypes.c_int(_MODES[policy or "default"])
        flags = ctypes.c_uint(0 if policy is None else _MOVE)
        where = (ctypes.c_void_p(address), ctypes.c_ulong(nbytes))
        self._call(self._numbers.mbind, *where, mode, mask, ctypes.c_ulong(bits), flags)

    def thread_policy(self) -> ThreadPolicy:
        """Return the policy of the calling thread."""
        mode, mask = ctypes.c_int(), _mask(())
        pointer, bits = ctypes.byref(mode), ctypes.c_ulong(_MOST_NODES)
        self._call(self._numbers.get_mempolicy, pointer, mask, bits, ctypes.c_void_p(), ctypes.c_ulong(0))
        return ThreadPolicy(mode.value, tuple(mask))

    def set_thread_policy(self, policy: Policy | ThreadPolicy, nodes: Sequence[int] = ()) -> None:
        """Set the policy for pages that the calling thread touches first, or set again what `thread_policy` returned."""
        if isinstance(policy, ThreadPolicy):
            mode, mask = policy.mode, (ctypes.c_ulong * len(policy.mask))(*policy.mask)
        else:
            mode, mask = _MODES[policy], _mask(nodes)
        bits = ctypes.c_ulong(_MOST_NODES)
        self._call(self._numbers.set_mempolicy, ctypes.c_int(mode), mask if any(mask) else None, bits)

    def page_nodes(self, pages: Sequence[int], targets: Sequence[int] | None = None) -> list[int]:
        """Return the node of each page by its address, or a negative error number: -ENOENT or -EFAULT where no page is yet.

        targets: first move each page to this node; what is returned is then the kernel's answer for each.
        """
        statuses: list[int] = []
        for start in range(0, len(pages), _PAGES_PER_CALL):
            part = pages[start : start + _PAGES_PER_CALL]
            addresses = (ctypes.c_void_p * len(part))(*part)
            status = (ctypes.c_int * len(part))()
            goals = None
            if targets is not None:
                goals = (ctypes.c_int * len(part))(*targets[start : start + _PAGES_PER_CALL])
            count, flags = ctypes.c_ulong(len(part)), ctypes.c_int(0 if targets is None else _MOVE)
            self._call(self._numbers.move_pages, ctypes.c_int(0), count, addresses, goals, status, flags)
            statuses += status
        return statuses

    def current_node(self) -> int:
        """Return the node of the processor that the calling thread runs on."""
        node = ctypes.c_uint()
        self._call(self._numbers.getcpu, None, ctypes.byref(node), None)
        return node.value


def _mask(nodes: Sequence[int]) -> ctypes.Array[ctypes.c_ulong]:
    mask = (ctypes.c_ulong * (_MOST_NODES // _LONG_BITS))()
    for node in nodes:
        mask[node // _LONG_BITS] |= 1 << node % _LONG_BITS
    return mask


@functools.cache
def system_calls() -> SystemCalls | None:
    """Return this system's calls, or None where it is no Linux on x86-64 or aarch64."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _NUMBERS:
        return None
    return SystemCalls(ctypes.CDLL(None, use_errno=True), machine)
