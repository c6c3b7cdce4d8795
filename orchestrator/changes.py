"""What one plan asks for that another one does not, in words."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from orchestrator.planner import Plan, Planned

SHOWN_BUDGETS, SHOWN_WIDTHS = 3, 4
"""Examples in a sentence."""


@dataclass(frozen=True, kw_only=True)
class Changes:
    """The difference between two plans of one name."""

    gone: tuple[Planned, ...]
    """What the new one no longer asks for."""
    new: tuple[Planned, ...]
    """What the old one did not ask for."""

    @property
    def sentence(self) -> str:
        """What the new plan does, for the subject of a sentence."""
        parts = []
        if self.gone:
            parts.append(f"no longer asks for {_listed(self.gone)}")
        if self.new:
            parts.append(f"asks for {_listed(self.new)} in addition")
        return " and ".join(parts) or "asks for the same"


def changes(old: Plan, new: Plan) -> Changes:
    """What differs between two plans in what they ask for: observation, budget and role.

    Names of files, prices and whatever else a sweep may say do not count.
    """
    return Changes(gone=_lacking(old, new), new=_lacking(new, old))


def _lacking(one: Plan, other: Plan) -> tuple[Planned, ...]:
    there = {(p.id, p.budget, p.role) for p in other.planned}
    return tuple(p for p in one.planned if (p.id, p.budget, p.role) not in there)


def _listed(planned: Collection[Planned]) -> str:
    """How many, and examples by budget and width.

    As in "12 observations (4 at 1e+10 FLOPs of widths 16, 20, 24, ...; ...)".
    """
    by_budget: dict[float, list[Planned]] = {}
    for p in planned:
        by_budget.setdefault(p.budget, []).append(p)
    parts = []
    for budget in sorted(by_budget)[:SHOWN_BUDGETS]:
        widths = sorted({p.trial.shape.width for p in by_budget[budget]})
        shown = ", ".join(map(str, widths[:SHOWN_WIDTHS]))
        more = ", ..." if len(widths) > SHOWN_WIDTHS else ""
        word = "width" if len(widths) == 1 else "widths"
        parts.append(f"{len(by_budget[budget])} at {budget:.3g} FLOPs of {word} {shown}{more}")
    if len(by_budget) > SHOWN_BUDGETS:
        parts.append("...")
    noun = "observation" if len(planned) == 1 else "observations"
    return f"{len(planned)} {noun} ({'; '.join(parts)})"
