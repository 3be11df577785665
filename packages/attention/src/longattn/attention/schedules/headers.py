"""`Header`: the message of fixed size that each rank sends every other before data of a pass: what the call is, and which bytes follow.

| bytes | what |
| --- | --- |
| 0 to 199 | 25 integers: format, number of the pass, number of the call, session, 4 of the rank's own, and bytes of each message that follows |
| 200 to 4087 | the values of `FIELDS`, as text, with 0x1f between them; a long value is cut, and ends with the digest of all of it |
| 4088 to 4095 | format and number of the pass, added: the last bytes to arrive |

Texts are compared, so that an error can name the field and what each rank has. The size never changes: a rank of another version is
understood far enough to be named.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from longattn.attention.schedules.errors import GroupError
from longattn.patterncache.spans import shortened

FORMAT = 0x6C6F6E67_61747402
"""Of this layout of a header: "longat", and a number."""
HEADER_BYTES = 4096
OWN = 4
"""Integers that each rank says of itself."""
MESSAGES = 8
"""Messages of one kind that one rank sends another in a pass, at most."""
_NUMBERS = struct.Struct(f"<{5 + OWN + 2 * MESSAGES}q")
_LAST = struct.Struct("<q")
_LONGEST = {"pattern": 600, "schedule": 300}
_LONGEST_OTHER = 60


class Fields(NamedTuple):
    """What the ranks of a pass must have alike, as text. "" says nothing.

    Attributes:
        version: of the package, filled in by `GroupCalls`. phase, step: what of a call. caller: which module, by the order of first calls on the group.
        thread: its name, in a forward. schedule: without its group and timeout. pattern: canonical string.
        dtype, batch, heads, kv_heads, head_dim, value_head_dim: of q, k and v. q_lengths, k_lengths: rows of each rank.
        q_start: positions of the whole sequence's queries, where they were asked for. scale, dropout_p, softcap, score_terms, masks, sinks: options.
        gradients: of what they are wanted. seed: from which rank it comes.
    """

    version: str = ""
    phase: str = ""
    step: str = ""
    caller: str = ""
    thread: str = ""
    schedule: str = ""
    pattern: str = ""
    dtype: str = ""
    batch: str = ""
    heads: str = ""
    kv_heads: str = ""
    head_dim: str = ""
    value_head_dim: str = ""
    q_lengths: str = ""
    k_lengths: str = ""
    q_start: str = ""
    scale: str = ""
    dropout_p: str = ""
    softcap: str = ""
    score_terms: str = ""
    masks: str = ""
    sinks: str = ""
    gradients: str = ""


OPTIONAL = ("caller",)
"""Fields that ranks may leave out: a module is not known in traced code."""


@dataclass(frozen=True)
class Header:
    """What one rank says before a pass.

    Attributes:
        number: of the pass. call: of the call that it belongs to. own: integers that may differ from rank to rank.
        keys, gradients: bytes of each message that follows, to the rank that reads this.
        text: `Fields`, encoded. session: a number that this process drew for the group.
    """

    number: int
    call: int
    own: tuple[int, ...]
    keys: tuple[int, ...]
    gradients: tuple[int, ...]
    text: bytes
    session: int = 0

    def encode(self) -> bytearray:
        """HEADER_BYTES of it."""
        message = bytearray(HEADER_BYTES)
        own = (*self.own, *(0,) * (OWN - len(self.own)))
        counts = (len(self.keys), len(self.gradients))
        # Two counts in one integer.
        sizes = (*self.keys, *self.gradients)
        sizes += (0,) * (2 * MESSAGES - len(sizes))
        _NUMBERS.pack_into(
            message, 0, FORMAT, self.number, self.call, self.session, *own, counts[0] << 32 | counts[1], *sizes
        )
        message[_NUMBERS.size : _NUMBERS.size + len(self.text)] = self.text
        _LAST.pack_into(message, HEADER_BYTES - _LAST.size, FORMAT + self.number)
        return message

    @classmethod
    def decode(cls, message: bytes | bytearray, rank: int) -> Header:
        """From what rank `rank` sent.

        Raises:
            GroupError: it is of another format.
        """
        form, number, call, session, *rest = _NUMBERS.unpack_from(message)
        if form != FORMAT:
            raise GroupError(
                f"rank {rank} must send headers of the format {FORMAT:#x}, got {form:#x}: another version of longattn-attention",
                rank=rank,
                field="version",
            )
        own, counts, sizes = tuple(rest[:OWN]), rest[OWN], rest[OWN + 1 :]
        keys, gradients = counts >> 32, counts & 0xFFFFFFFF
        text = bytes(message[_NUMBERS.size : -_LAST.size]).rstrip(b"\0")
        return cls(number, call, own, tuple(sizes[:keys]), tuple(sizes[keys : keys + gradients]), text, session)

    def fields(self) -> dict[str, str]:
        """The text, by name."""
        values = self.text.decode(errors="replace").split("\x1f")
        return dict(zip(Fields._fields, values, strict=False)) | {"call": str(self.call), "pass": str(self.number)}


def installed_version() -> str:
    """Of this package; "" where it is not installed, but found by its path."""
    try:
        return version("longattn-attention")
    except PackageNotFoundError:
        return ""


@lru_cache(maxsize=1024)
def encoded(fields: Fields) -> bytes:
    """The text of a header."""
    parts = (
        _shortened(value, _LONGEST.get(name, _LONGEST_OTHER))
        for name, value in zip(Fields._fields, fields, strict=True)
    )
    text = "\x1f".join(parts).encode(errors="replace")
    assert len(text) <= HEADER_BYTES - _NUMBERS.size - _LAST.size
    return text


def _shortened(value: str, longest: int) -> str:
    value = value.replace("\0", " ").replace("\x1f", " ")
    if len(value) <= longest:
        return value
    digest = hashlib.blake2b(value.encode(errors="replace"), digest_size=8).hexdigest()
    return f"{value[: longest - 20]}... {digest}"


def has_arrived(message: bytearray, number: int) -> bool:
    """Whether a message that is being received is there to its last byte, if it is the header of that pass."""
    return _LAST.unpack_from(message, HEADER_BYTES - _LAST.size)[0] == FORMAT + number


def check_headers(headers: Sequence[Header], group: str) -> None:
    """Raise GroupError where a rank says something else than the first one; the same error on every rank."""
    first = headers[0]
    for rank, header in enumerate(headers):
        if header.text == first.text and header.call == first.call and header.number == first.number:
            continue
        expected, got = first.fields(), header.fields()
        # What of a call comes first: where ranks are in different calls, everything else differs with it.
        order = ("version", "pass", "phase", "call", *Fields._fields[2:])
        for field in order:
            values = expected.get(field, ""), got.get(field, "")
            if values[0] == values[1] or (field in OPTIONAL and "" in values):
                continue
            phase, step = first.fields()["phase"], first.fields()["step"]
            raise GroupError(
                f"ranks of group {group!r} must have the same {field} in call {first.call} ({_place(first)}), got {shortened(values[0])} on rank 0 "
                f"and {values[1]!r} on rank {rank} ({_place(header)})",
                rank=rank,
                call=first.call,
                phase=phase,
                step=step,
                field=field,
                values={0: values[0], rank: values[1]},
            )


def _place(header: Header) -> str:
    fields = header.fields()
    caller = f"{fields['caller']}, " if fields.get("caller") else ""
    return f"{caller}{fields['phase']} of call {header.call}" + (f", {fields['step']}" if fields.get("step") else "")
