"""What one plan asks for that another one does not, in words."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

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

    keys: tuple[str, ...] = ()
    """Keys of the sweep that are to blame, each with its values."""

    @property
    def sentence(self) -> str:
        """What the new plan does, for the subject of a sentence."""
        if self.keys:
            return f"differs in {', '.join(self.keys)}"
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
    # A probe that is not wanted any more is in nobody's way: no fit takes it.
    gone = tuple(p for p in _lacking(old, new) if p.role != "probe")
    added = _lacking(new, old)
    # Budgets, sizes and seeds are told by what they ask for.
    keys = _keys(old, new) if _cells(gone) == _cells(added) else ()
    return Changes(gone=gone, new=added, keys=keys)


def _cells(planned: Collection[Planned]) -> set[tuple[float, int, int]]:
    return {(p.budget, p.trial.shape.width, p.trial.seed) for p in planned}


def _keys(old: Plan, new: Plan) -> tuple[str, ...]:
    """Keys of two sweeps that differ, as in "simulated.gpus (2.0, was 0.0)"."""
    before, after = _flat(old.spec.model_dump(mode="json")), _flat(new.spec.model_dump(mode="json"))
    names = [name for name in {**after, **before} if after.get(name) != before.get(name)]
    found = [f"{name} ({after.get(name)}, was {before.get(name)})" for name in names]
    return (*found, *_hashes(old, new))


def _hashes(old: Plan, new: Plan) -> list[str]:
    """What a sweep names and is told by content: its text, files and rules have changed."""
    before, after = _contents(old), _contents(new)
    return [
        f"{what} ({after.get(what, 'gone')}, was {before.get(what, 'not there')}, by hash)"
        for what in {**before, **after}
        if before.get(what) != after.get(what)
    ]


def _contents(plan: Plan) -> dict[str, str]:
    """What all trials of a plan share, by hash."""
    trial = plan.trials[0]
    files = trial.command.files if trial.command else ()
    return {
        "the corpus's text": trial.corpus.combined_hash,
        "the recipe's rules": trial.recipe.hash,
        **{f"the command's file {name}": digest for name, digest in files},
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


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
