"""Which of the rows that can serve is preferred: by evidence, or in the table's fixed order.

Expected time = work of the plan / the row's rate + what a call costs. The choice depends on shapes, plan and kept figures alone, never on
what is timed during a call, so that the same machine always chooses the same row; of equal times the first in the table wins.
LONGATTN_CHOICE=fixed and deterministic=True give the fixed order.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from longattn.kernels.dispatch.probing import probe
from longattn.kernels.dispatch.rates import DIRECTIONS, Numbers, figures_of
from longattn.kernels.dispatch.settings import CHOICE
from longattn.kernels.dispatch.table import Explanation, RowFailure, TableRow, explain_problem, refusals, row, standings
from longattn.kernels.dispatch.work import Work, work_of
from longattn.kernels.problem import AttentionProblem
from longattn.patterncache import Plan
from longattn.patterncache.spans import shortened

logger = logging.getLogger("longattn.kernels")


def select(problem: AttentionProblem, backend: str | None = None, plan: Plan | None = None, batch: int = 1) -> TableRow:
    """The row that serves: the named one, or of those without a reason the one with the least expected time.

    Args:
        plan: who sees whom; None: the fixed order. batch: elements.

    Raises:
        ValueError: no row fits, or the named one does not; the message gives each row's reasons.
    """
    while (name := _preferred(problem, backend, plan, batch)) is not None:
        chosen = row(name)
        able = chosen.prepare is None or chosen.prepare() is None
        if able and (chosen.standing is None or not chosen.standing(problem, True).startswith("failed")):
            return chosen  # else the row has one more reason now
    explanation = explain_choice(problem, backend, plan, batch, measure=True)
    subject = "no backend" if backend is None else f"backend={backend!r} cannot"
    raise ValueError(f"{subject} {'fits' if backend is None else 'serve'} this problem: {explanation}")


def _preferred(problem: AttentionProblem, backend: str | None, plan: Plan | None, batch: int) -> str | None:
    """The row that `explain_choice` prefers, without a word about the others where figures do not decide."""
    if _why_fixed(problem, backend, plan) is None:
        return explain_choice(problem, backend, plan, batch, measure=True).backend
    return _suited(explain_problem(problem, backend, refusals(problem)), backend, plan)


def explain_choice(
    problem: AttentionProblem, backend: str | None, plan: Plan | None, batch: int, *, measure: bool
) -> Explanation:
    """The table read for one problem, with expected times where they decide.

    measure: measure now what has no figures yet; else rows say so, and the order is fixed.
    """
    explanation = explain_problem(problem, backend, refusals(problem))
    explanation = replace(explanation, standings=standings(problem), backend=_suited(explanation, backend, plan))
    why_fixed = _why_fixed(problem, backend, plan)
    if why_fixed is not None or plan is None:
        return replace(explanation, order=f"fixed: {why_fixed}")
    work = work_of(plan, batch, (problem.head_dim + problem.value_width + 1) // 2)
    expected = []
    for at in [row(name) for name, reasons in explanation.rows if not reasons]:
        with suppress(RowFailure):  # it could not be made to run, and says so from now on
            expected.append((at.name, *_expected(at, problem, work, measure)))
    explanation = replace(explain_problem(problem, backend, refusals(problem)), standings=explanation.standings)
    if any(seconds is None for _, seconds, _ in expected):
        return replace(explanation, expected=tuple(expected), order="fixed: not every row has figures")
    chosen = min(expected, key=lambda row: row[1] or 0.0, default=(None,))[0]
    return replace(explanation, backend=chosen, expected=tuple(expected), order=f"by expected time, as {work.form}")


def _suited(explanation: Explanation, backend: str | None, plan: Plan | None) -> str | None:
    """The first row that can serve and that the plan suits; where it suits none, the first that can."""
    if backend is not None or plan is None or explanation.backend is None:
        return explanation.backend
    able = [row(name) for name, reasons in explanation.rows if not reasons]
    return next((at.name for at in able if at.unsuited is None or at.unsuited(plan) is None), explanation.backend)


def _why_fixed(problem: AttentionProblem, backend: str | None, plan: Plan | None) -> str | None:
    """Why figures do not decide, or None."""
    setting = CHOICE.value()
    if setting not in ("", "evidence", "fixed"):
        raise ValueError(f"LONGATTN_CHOICE must be evidence (the default) or fixed, got {shortened(setting)}")
    if backend is not None:
        return "backend is named"
    if setting == "fixed":
        return "LONGATTN_CHOICE=fixed"
    if problem.deterministic:
        return "deterministic=True"
    if problem.device != "cpu":
        return f"no figures are kept for {problem.device}"
    return "the plan is not built" if plan is None else None


def _expected(of: TableRow, problem: AttentionProblem, work: Work, measure: bool) -> tuple[float | None, str]:
    """(seconds, where the figure is from), or (None, why there is none)."""
    level, revision = ("", _own_version()) if of.revision is None else of.revision()

    def measured() -> Numbers:
        if of.prepare is not None and (failed := of.prepare()) is not None:
            raise RowFailure(failed)
        logger.info("row %s is measured for %s, once on this machine", of.name, problem.dtype)
        return probe(of, problem.dtype)

    figures = figures_of(f"{of.name} {level}".rstrip(), revision, problem.dtype, measured if measure else None)
    if isinstance(figures, str):
        return None, figures
    directions = DIRECTIONS if problem.backward else DIRECTIONS[:1]
    return sum(figures.seconds(work, direction) for direction in directions), figures.source


@lru_cache
def _own_version() -> str:
    """Of this package; figures of rows that need nothing else are known by it."""
    try:
        return version("longattn-kernels")
    except PackageNotFoundError:
        return "not installed"
