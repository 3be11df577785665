"""How much a plan is, and of which form: what a row's expected time is made of.

Operations are those of visible pairs: two products of 2 * head_dim each in the forward, five in the backward. What a row computes
beside them (masked halves of tiles, copies) is part of its rate for that form.
"""

from __future__ import annotations

from dataclasses import dataclass

from longattn.patterncache import Plan
from longattn.patterncache.indices import Affine
from longattn.patterncache.plan import Branch

FORMS = ("dense", "causal", "band", "strided", "listed", "short")
"""dense: every query sees every key. causal: no key after it. band: a window. strided: rows at a distance, such as dilated branches.
listed: rows by lists, such as blocks. short: few query rows over many keys, where reading keys is the work."""

SHORT_ROWS = 64
"""Query rows up to which a call is short, where it has at least `_KEYS_A_ROW` times as many keys."""

_KEYS_A_ROW = 8
_KEY = "form and pairs"


@dataclass(frozen=True, slots=True)
class Work:
    """What a call asks for.

    Attributes:
        form: one of `FORMS`. pairs: (query, key) pairs seen, over heads and batch. head_dim: of q, k and v, their mean
            where v has its own.
    """

    form: str
    pairs: int
    head_dim: int

    def operations(self, direction: str) -> int:
        """Floating-point operations of "forward" or "backward"."""
        return (4 if direction == "forward" else 10) * self.pairs * self.head_dim


def work_of(plan: Plan, batch: int, head_dim: int) -> Work:
    """The work of a plan. Form and pairs stay with it."""
    known: tuple[str, int] | None = plan.derived.get(_KEY)
    if known is None:
        known = plan.derived[_KEY] = form_of(plan), sum(_pairs(b) * b.heads.length for b in plan.branches)
    return Work(known[0], known[1] * batch, head_dim)


def form_of(plan: Plan) -> str:
    """One of `FORMS`."""
    _, queries, keys = plan.rectangle.shape
    if queries <= SHORT_ROWS and keys >= _KEYS_A_ROW * queries:
        return "short"
    if plan.listed:
        return "listed"
    if not all(_is_whole(branch) for branch in plan.branches):
        return "strided"
    if any(branch.band is not None and branch.band.high is not None for branch in plan.branches):
        return "band"
    return "causal" if any(branch.band is not None for branch in plan.branches) else "dense"


def _is_whole(branch: Branch) -> bool:
    """Whether neighbouring rows of one tile are neighbours in memory."""
    return all(isinstance(i, Affine) and i.tiles == 1 and (i.step == 1 or i.count == 1) for i in (branch.q, branch.k))


def _pairs(branch: Branch) -> int:
    # Tiles of differing geometry are looked at pair by pair, which takes longer than it is worth: they count whole.
    if branch.band is not None and not branch.uniform:
        return branch.q.tiles * branch.q.count * branch.k.count
    return branch.pairs
