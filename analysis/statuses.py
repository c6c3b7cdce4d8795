"""Rows of runs that did not finish, told by a column such as W&B's `State` or MLflow's status."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.errors import InputError


def words(text: str) -> frozenset[str]:
    """The words of a text, for tables of names that are to be read."""
    return frozenset(text.split())


COLUMNS = words("state status runstate runstatus jobstate jobstatus trialstate trialstatus")
"""Names, in small letters and digits alone, of columns that say how a run ended."""
FLAGS = {
    **dict.fromkeys(
        ["finished", "isfinished", "completed", "complete", "done", "success", "succeeded"], True
    ),
    **dict.fromkeys(
        ["failed", "crashed", "diverged", "killed", "aborted", "preempted", "isrunning"], False
    ),
}
"""Names of Boolean columns that say it, with the value that a finished run has."""
FINISHED = words(
    "finished finish complete completed done success succeeded successful ok terminated"
)
"""Values of a run that finished: those of MLflow, W&B, Ray Tune (TERMINATED), SLURM and Optuna."""
UNFINISHED = words(
    "running failed fail failure crashed crash killed error errored aborted stopped interrupted "
    "cancelled canceled timeout preempted preempting pending scheduled queued waiting paused "
    "suspended started starting unfinished incomplete diverged nan oom outofmemory nodefail pruned"
)
"""Values of a run that did not, or has not yet."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Which rows are of finished runs."""

    kept: NDArray[np.bool_]
    """Shape (n,)."""
    excluded: dict[str, int]
    """Rows of other runs, by their status."""
    columns: frozenset[str]
    """The columns that said so."""
    notes: tuple[str, ...]
    """Values that are not understood, a sentence a column."""


def finished(table: pa.Table, chosen: Collection[str]) -> Finished:
    """Tell the rows of finished runs from all others.

    Parameters
    ----------
    table
        Any columns, of the plain types of `arrow_types.plain_types`.
    chosen
        Columns that the caller uses for something else or has selected by; they are not asked.

    Raises
    ------
    InputError
        If no run finished.

    Notes
    -----
    A column counts only if some of its values are words for how a run ended, so that a `state` with
    names of places means nothing. A row whose status is blank or not understood stays.
    """
    kept = np.ones(table.num_rows, dtype=bool)
    excluded: Counter[str] = Counter()
    columns, notes = set(), []
    for name in table.column_names:
        plain = plain_name(name)
        if name in chosen or not (plain in COLUMNS or plain in FLAGS):
            continue
        column = table[name]
        if plain in FLAGS and pa.types.is_boolean(column.type):
            bad, unknown = {str(not FLAGS[plain]).lower()}, []
        elif plain in COLUMNS and pa.types.is_string(column.type):
            values = [v for v in pc.unique(column).to_pylist() if v is not None and v.strip()]
            bad = {value for value in values if plain_name(value) in UNFINISHED}
            unknown = [v for v in values if v not in bad and plain_name(v) not in FINISHED]
            if len(unknown) == len(values):
                continue
        else:
            continue
        columns.add(name)
        if unknown:
            shown = ", ".join(repr(value) for value in sorted(unknown)[:5])
            notes.append(
                f"{name!r} has values that do not say whether a run finished ({shown}): their rows "
                f"are kept; select with --where if they should not be"
            )
        for value in sorted(bad):
            text = pc.cast(column, pa.string()) if pa.types.is_boolean(column.type) else column
            rows = np.asarray(pc.fill_null(pc.equal(text, value), False).to_numpy(), dtype=bool)
            excluded[f"unfinished: {name} is {value}"] += int(np.sum(kept & rows))
            kept &= ~rows
    if table.num_rows and not kept.any():
        reasons = ", ".join(f"{n} {reason}" for reason, n in excluded.items())
        raise InputError(
            f"none of {table.num_rows} runs finished ({reasons}): wait for them, or select them "
            "all the same with --where"
        )
    return Finished(
        kept=kept,
        excluded={reason: n for reason, n in excluded.items() if n},
        columns=frozenset(columns),
        notes=tuple(notes),
    )


def plain_name(name: str) -> str:
    """A name in small letters and digits alone, as names are compared.

    Examples
    --------
    >>> plain_name("Val. Loss"), plain_name("NODE_FAIL")
    ('valloss', 'nodefail')
    """
    return re.sub(r"[^a-z0-9]", "", name.lower())
