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
from analysis.observations import equals
from analysis.wording import where_option, written


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
    """The rows of finished runs, and why the others are excluded."""

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
    example = ""
    for name in table.column_names:
        plain = plain_leaf(name)
        if name in chosen or not (plain in COLUMNS or plain in FLAGS):
            continue
        values = {written(v) for v in pc.unique(table[name]).drop_null().to_pylist()} - {""}
        if plain in FLAGS:
            bad = {value for value in values if _YES.get(value.lower()) is (not FLAGS[plain])}
            unknown = {value for value in values if value.lower() not in _YES}
        else:
            bad = {value for value in values if _ended(value) is False}
            unknown = {value for value in values if _ended(value) is None}
        if len(unknown) == len(values):
            continue
        if unknown:
            shown = ", ".join(repr(value) for value in sorted(unknown)[:5])
            notes.append(
                f"{name!r} has values that do not say whether a run finished ({shown}): their rows "
                "are kept; select with --where if they should not be"
            )
        else:
            columns.add(name)
        for value in sorted(bad):
            rows = np.asarray(equals(table[name], value).to_numpy(), dtype=bool)
            excluded[f"unfinished: {name} is {value}"] += int(np.sum(kept & rows))
            kept &= ~rows
            example = where_option(name, value)
    if table.num_rows and not kept.any():
        reasons = ", ".join(f"{n} {reason}" for reason, n in excluded.items())
        raise InputError(
            f"no run of {table.num_rows} finished ({reasons}): wait for them, or select them all "
            f"the same with {example}"
        )
    return Finished(
        kept=kept,
        excluded={reason: n for reason, n in excluded.items() if n},
        columns=frozenset(columns),
        notes=tuple(notes),
    )


_YES = {
    **dict.fromkeys(("true", "yes", "1"), True),
    **dict.fromkeys(("false", "no", "0"), False),
}
"""Ways of writing true and false."""


def _ended(value: str) -> bool | None:
    """Whether a run with this status finished; None where the word is not known.

    The first word counts, as in "CANCELLED by 1000", and of a Python enumeration the last part, as
    in "TrialState.PRUNED".
    """
    for text in (value, (value.split() or [""])[0], value.rpartition(".")[2]):
        plain = plain_name(text)
        if plain in FINISHED or plain in UNFINISHED:
            return plain in FINISHED
    return None


def plain_leaf(name: str) -> str:
    """The last part of a column's name, such as `lr` of `config.lr`, as `plain_name` has it.

    Examples
    --------
    >>> plain_leaf("config.optimizer.Learning_Rate")
    'learningrate'
    """
    return plain_name(name.rsplit(".", 1)[-1])


def plain_name(name: str) -> str:
    """A name in small letters and digits alone, as names are compared.

    Examples
    --------
    >>> plain_name("Val. Loss"), plain_name("NODE_FAIL")
    ('valloss', 'nodefail')
    """
    return re.sub(r"[^a-z0-9]", "", name.lower())
