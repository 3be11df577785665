"""`StreamingAttention`: attention of a stream under any causal pattern, holding only the keys that queries to come still see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn

from longattn.attention.streaming.attending import attend_appended, attend_before
from longattn.attention.streaming.expiry import ExpiryTable
from longattn.attention.streaming.page_pool import PAGE_SIZE, PagePool
from longattn.attention.streaming.row_by_row import attend_row_by_row
from longattn.attention.streaming.slot_buffer import LARGEST, Storage
from longattn.attention.streaming.stream_state import StreamingState
from longattn.attention.validate import (
    check_bool,
    check_factory,
    check_integers,
    check_pattern_argument,
    check_positive,
    check_size,
)
from longattn.kernels.interface import autocast, check_qkv, dtype_name
from longattn.patterncache import Pattern, Rectangle, Span
from longattn.patterncache.spans import shortened


class StreamingAttention(nn.Module):
    """softmax(scale * q k^T + log counts) v of a stream: row t of the result is row t of the pattern over the whole sequence. No parameters.

    | tensor | shape |
    | --- | --- |
    | q, output | (batch, n, num_heads, head_dim), the output with value_head_dim |
    | k, v | (batch, n, kv_heads, head_dim), v with value_head_dim |
    | lse | (batch, n, num_heads), float32 (float64 for float64) |

    A call takes the next n tokens of each row: a prompt, a chunk or one token. The state then holds the keys that some later query sees by
    `Pattern.last_queries`, and no others: 8192 positions of `Dilated((2048, 4096, 8192), (1, 2, 4))` are at most 4096 keys of a head.

    Args:
        pattern: causal.
        num_heads, head_dim: of q.
        kv_heads: of k and v, dividing num_heads. Default num_heads.
        value_head_dim: of v and the output. Default head_dim.
        softmax_scale: a number > 0. Default head_dim ** -0.5.
        invariant: the same bits, whatever other rows the batch has and however a stream is cut into calls, on one machine with one number of
            threads. Each query is computed by itself, so long calls are slow. Default False: equal within rounding.
        max_rewind: tokens that `state.rewind` can take back. Keys that they see stay as long. Default 0.
        storage: "int8" or "fp8" (float8_e4m3fn): keys and values lie in 8 bits with a scale for each token and head, about half of bfloat16's bytes.
            An output is off by at most d + (exp(2 s n e) - 1) m: e and d are the largest errors of a key's and a value's number (see
            `slot_buffer`), s is softmax_scale, n the sum of the absolute numbers of a query, m the largest absolute number of v. Tokens of
            one call of several see one another unrounded. Default None: as they come.

    Raises:
        TypeError, ValueError: a bad argument, by name; or a pattern that is not causal.

    Example:
        >>> attention = StreamingAttention(Dilated((16, 64), (1, 4), causal=True), num_heads=2, head_dim=16)
        >>> prompt, token = torch.randn(1, 20, 2, 16), torch.randn(1, 1, 2, 16)
        >>> out, state = attention(prompt, prompt, prompt)
        >>> out, state = attention(token, token, token, state)
        >>> state.positions
        [21]
    """

    def __init__(
        self,
        pattern: Pattern,
        *,
        num_heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        value_head_dim: int | None = None,
        softmax_scale: float | None = None,
        invariant: bool = False,
        max_rewind: int = 0,
        storage: Storage | None = None,
    ) -> None:
        super().__init__()
        self.pattern = check_pattern_argument(pattern)
        if not pattern.causal:
            raise ValueError(f"pattern must be causal, so that no token waits for later ones, got {pattern}")
        self.num_heads, self.head_dim = check_size("num_heads", num_heads), check_size("head_dim", head_dim)
        self.kv_heads = num_heads if kv_heads is None else check_size("kv_heads", kv_heads)
        if num_heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide num_heads={num_heads}, got {kv_heads}")
        self.value_head_dim = head_dim if value_head_dim is None else check_size("value_head_dim", value_head_dim)
        self.softmax_scale = head_dim**-0.5 if softmax_scale is None else check_positive("softmax_scale", softmax_scale)
        self.invariant = check_bool("invariant", invariant)
        self.max_rewind = check_size("max_rewind", max_rewind, least=0)
        if storage is not None and (not isinstance(cast(object, storage), str) or storage not in LARGEST):
            raise ValueError(f"storage must be None, 'int8' or 'fp8', got {shortened(storage)}")
        if storage is not None and invariant:
            raise ValueError(
                f"storage must be None where invariant is True: within a call keys are not rounded yet, got {shortened(storage)}"
            )
        self.storage: Storage | None = storage
        self._expiry = ExpiryTable(pattern, num_heads, self.kv_heads)

    def new_state(
        self,
        batch_size: int,
        *,
        pool: PagePool | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StreamingState:
        """A state at position 0.

        Args:
            pool: where its pages come from; then dtype and device are the pool's. Default None: a pool of its own, which grows.
            dtype: default torch's. device: default the current one.

        Raises:
            TypeError, ValueError: a pool of another kind of module, by what differs.
        """
        if pool is None:
            pool = self.new_pool(dtype=dtype, device=device)
        else:
            self._check_pool(pool, dtype, device)
        return StreamingState(pool, self.kv_heads, check_size("batch_size", batch_size), self.max_rewind)

    def new_pool(
        self,
        pages: int | None = None,
        *,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> PagePool:
        """A pool of pages for states of this module, and of others with its head_dims and storage.

        A page has room for `page_size` keys and values of one kv head. States of one pool share the pages of a common beginning.

        Args:
            pages: how many there are, all at once; a call that needs more raises MemoryError, and its state is as it was. Default None: as many as needed.
            page_size: a power of two. Default 64. dtype: default torch's. device: default the current one.
        """
        like = torch.empty(0, **check_factory(device, dtype))
        return PagePool((self.head_dim, self.value_head_dim), like.dtype, like.device, self.storage, pages, page_size)

    def most_held(self, length: int) -> int:
        """Keys that a kv head holds at most while a stream of `length` tokens is read one by one.

        Raises:
            TypeError, ValueError: no length; or one at which the pattern means nothing.
        """
        return self._expiry.most_held(check_size("length", length, least=0), self.max_rewind)

    @overload
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: StreamingState | None = None,
        *,
        rows: Sequence[int] | None = None,
        return_lse: Literal[False] = False,
    ) -> tuple[Tensor, StreamingState]: ...

    @overload
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: StreamingState | None = None,
        *,
        rows: Sequence[int] | None = None,
        return_lse: Literal[True],
    ) -> tuple[tuple[Tensor, Tensor], StreamingState]: ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: StreamingState | None = None,
        *,
        rows: Sequence[int] | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Append the next n tokens, and attend with them.

        Args:
            q: (batch, n, num_heads, head_dim). k, v: (batch, n, kv_heads, head_dim), finite.
            state: what to continue; it is advanced in place. Default None: a new one.
            rows: which rows of the state's batch the call's rows are, each named once; the others stay as they are. Default: all.
            return_lse: also return lse. Default False.

        Returns:
            (out, state), with return_lse ((out, lse), state).

        Raises:
            TypeError, ValueError: a bad argument, by name; tensors that require gradients; positions at which the pattern means nothing.
                The state is as it was.
        """
        q, k, v = autocast(q, k, v)
        self._check_tensors(q, k, v)
        check_bool("return_lse", return_lse)
        if state is None:
            if rows is not None:
                raise ValueError(f"rows must be None without a state, got {shortened(rows)}")
            state = self.new_state(k.shape[0], dtype=k.dtype, device=k.device)
        chosen = self._check_state(state, k, rows)
        n = q.shape[1]
        if chosen is not None:
            state.split()
        tables = state.chosen(chosen)
        for position in sorted({table.position for table in tables}):
            # Refused here, before anything is written.
            span = Span(0, position + n)
            self.pattern.check_rectangle(Rectangle(self.num_heads, span, span))
        last = [self._expiry.last_queries(table.position, n) for table in tables]
        with torch.no_grad():
            # Keys of a long call take the slots of those that only its own queries still see.
            before = [table.clone() for table in tables] if self.invariant or n != 1 else None
            if self.invariant:
                computed = attend_row_by_row(self, state, chosen, q, k, v)
            elif n == 1:
                state.write(chosen, k, v, last)
                computed = attend_appended(self, state, chosen, q)
            else:
                computed = attend_before(self, state, chosen, q, k, v)
            if before is not None:
                for table in tables:
                    table.evict(table.position + n)
                try:
                    state.write(chosen, k, v, last)
                except MemoryError:
                    for table, old in zip(tables, before, strict=True):
                        table.restore(old)
                    raise
        for table in tables:
            table.evict(table.position)
        state.trim(chosen)
        out = computed.finalize(q.dtype)
        return ((out, computed.lse), state) if return_lse else (out, state)

    def extra_repr(self) -> str:
        """The pattern and the sizes."""
        return f"{self.pattern}, num_heads={self.num_heads}, head_dim={self.head_dim}, kv_heads={self.kv_heads}"

    def _check_tensors(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        check_qkv(q, k, v)
        for name, x, expected in (
            ("q", q, (self.num_heads, self.head_dim)),
            ("k", k, (self.kv_heads, self.head_dim)),
            ("v", v, (self.kv_heads, self.value_head_dim)),
        ):
            if tuple(x.shape[2:]) != expected:
                raise ValueError(f"{name} must have (heads, head_dim) = {expected}, got {tuple(x.shape[2:])}")
            if torch.is_grad_enabled() and x.requires_grad:
                raise ValueError(
                    f"{name} must not require gradients, which a stream does not keep: call under torch.no_grad(), got requires_grad=True"
                )
        if q.shape[1] != k.shape[1]:
            raise ValueError(f"q must have the length of k, {k.shape[1]}, got {q.shape[1]}")

    def _check_pool(self, pool: PagePool, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        if not isinstance(pool, PagePool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"pool must be None or a PagePool, got {type(pool).__name__}")
        for name, expected, got in (
            ("widths", (self.head_dim, self.value_head_dim), pool.widths),
            ("storage", self.storage, pool.storage),
            ("dtype", dtype, pool.dtype),
            ("device", None if device is None else torch.device(device), pool.device),
        ):
            if expected != got and not (expected is None and name != "storage"):
                raise ValueError(f"pool must have {name}={expected} of this module, got {got}")

    def _check_state(self, state: StreamingState, k: Tensor, rows: Sequence[int] | None) -> list[int] | None:
        if not isinstance(state, StreamingState):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"state must be None or a StreamingState, got {type(state).__name__}")
        for name, expected, got in (
            ("widths", (self.head_dim, self.value_head_dim), tuple(state.widths)),
            ("kv_heads", self.kv_heads, state.kv_heads),
            ("max_rewind", self.max_rewind, state.max_rewind),
            ("storage", self.storage, state.storage),
            ("dtype", dtype_name(k.dtype), dtype_name(state.dtype)),
            ("device", k.device, state.device),
        ):
            if expected != got:
                raise ValueError(f"state must have {name}={expected} of this module and its inputs, got {got}")
        if rows is None:
            if k.shape[0] != state.batch_size:
                raise ValueError(f"k must have the batch size of state, {state.batch_size}, got {k.shape[0]}")
            return None
        named = check_integers("rows", rows)
        if len(named) != k.shape[0] or len(set(named)) != len(named):
            raise ValueError(
                f"rows must name {k.shape[0]} different rows, one for each row of q, got {shortened(named)}"
            )
        if any(not 0 <= row < state.batch_size for row in named):
            raise ValueError(f"rows must lie between 0 and {state.batch_size - 1}, got {shortened(named)}")
        return named
