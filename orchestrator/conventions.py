"""The same observations under every convention of N and C: what the choice alone does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.errors import InputError
from analysis.fitting import Method
from analysis.intervals import Interval
from analysis.study import Study
from analysis.study_json import ends
from analysis.wording import CONVENTIONS, count
from orchestrator.reading import Convention
from orchestrator.source import Source

WHY = (
    "Embedding and output head are a large share of small models and a small one of large models, "
    "and so is attention in exact FLOPs: N without them grows faster along the same models, so "
    "that its exponent is another one. An exponent holds under its own convention only (Pearce and "
    "Song 2024, arXiv 2406.12907; Porian et al. 2024, arXiv 2406.19146)."
)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One study a convention, the source's usual one first."""

    studies: tuple[Study, ...]

    @property
    def sentence(self) -> str:
        """How far the exponents are apart, and why."""
        found = [
            (said.exponent.estimate, seen)
            for seen in self.studies
            for said in seen.at_top
            if said.law == "hoffmann"
        ]
        if len(found) < 2:
            return WHY
        (low, least), (high, most) = (end(found, key=lambda pair: pair[0]) for end in (min, max))
        return (
            f"Hoffmann's a goes from {low:.3f} ({_named(least)}) to {high:.3f} ({_named(most)}) on "
            f"the same observations. {WHY}"
        )


def compare(source: Source, *, level: float, method: Method) -> Compared:
    """Study a source under each of its conventions.

    Raises
    ------
    InputError
        If it has one convention only, or nothing can be fitted.
    """
    pairs = source.conventions.pairs
    if len(pairs) < 2:
        params, flops = pairs[0]
        raise InputError(
            f"{source.name} has one convention only (N {CONVENTIONS[params]}, C "
            f"{CONVENTIONS[flops]}): there is nothing to compare"
        )
    conventions = [Convention(params=n, flops=c, level=level) for n, c in pairs]
    # One held-out budget, the fewest there are: they are not shown.
    return Compared(studies=tuple(source.study(c, method=method, heldout=0) for c in conventions))


def conventions_json(found: Compared) -> dict[str, Any]:
    """The contract of `isoflop fit --conventions --json`; numbers that are missing are null."""
    return {
        "conventions": [_row(seen) for seen in found.studies],
        "sentence": found.sentence,
        "warnings": list(dict.fromkeys(note for seen in found.studies for note in seen.notes)),
    }


def _row(seen: Study) -> dict[str, Any]:
    line = seen.isoflop.exponent
    return {
        "params": seen.obs.params_convention,
        "flops": seen.obs.flops_convention,
        "observations": seen.obs.rows,
        "a": {said.law: _finite(said.exponent.estimate) for said in seen.at_top}
        | {"isoflop": _finite(line.estimate) if line else None},
        "a_interval": {said.law: ends(said.exponent) for said in seen.at_top}
        | {"isoflop": ends(line) if line else [None, None]},
        "top_flops": seen.top_flops,
        "params_at_top": {said.law: _finite(said.params.estimate) for said in seen.at_top}
        | {"isoflop": seen.isoflop.vertices[-1].params if seen.isoflop.vertices else None},
    }


def show_conventions(console: Console, found: Compared) -> None:
    """A row a convention: exponents by each law and by parabolas, and N_opt at the top budget."""
    laws = list(dict.fromkeys(said.law for seen in found.studies for said in seen.at_top))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("N", "C"):
        table.add_column(column)
    for column in (*(f"a, {law}" for law in laws), "a, parabolas", "top C", "N_opt there"):
        table.add_column(column, justify="right")
    for seen in found.studies:
        by_law = {said.law: said for said in seen.at_top}
        cells = [_exponent(by_law[law].exponent if law in by_law else None) for law in laws]
        top = by_law["hoffmann"].params.estimate if "hoffmann" in by_law else None
        table.add_row(
            CONVENTIONS[seen.obs.params_convention],
            CONVENTIONS[seen.obs.flops_convention],
            *cells,
            _exponent(seen.isoflop.exponent),
            f"{seen.top_flops:.3g}",
            count(top),
        )
    first = found.studies[0]
    title = f"{len(first.obs)} observations under every convention, N_opt by Hoffmann's law"
    console.print(Text(title, style="bold"))
    console.print(table)
    console.print()
    console.print(Text(found.sentence))


def _exponent(part: Interval | None) -> str:
    return "–" if part is None or not math.isfinite(part.estimate) else f"{part.estimate:.3f}"


def _named(seen: Study) -> str:
    obs = seen.obs
    return f"N: {CONVENTIONS[obs.params_convention]}; C: {CONVENTIONS[obs.flops_convention]}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
