"""Rows that are points of training curves: which run each belongs to, and which is its last.

Only the last point of a run was trained to its end. Those before it lie above the law, since their
learning rate has not decayed, and they share the noise of their run.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analysis.arrow_types import counts_rows, labels
from analysis.errors import InputError
from analysis.files import numbers
from analysis.observations import FloatArray, IntArray
from analysis.statuses import plain_leaf, words

RUNS = words("run runid runname runs runkey trialid uuid wandbid file filename log logfile logname")
"""Names, in small letters and digits alone, of columns that tell runs apart."""
LABELS = words(
    "id trial trialname wandbname name model modelname config configname slug label key checkpoint "
    "experiment experimentid experimentname exp expid expname job jobid jobname"
)
"""Names of columns that may do so, or only name a size."""
STEPS = words(
    "step iter iteration itr globalstep trainerglobalstep trainstep optimizerstep update it"
)
"""Names of columns that count what a run has done so far, not what it was planned to do."""
SAME_SIZE = 1e-3
"""Largest relative difference of N within one run."""
LEAST_POINTS = 3.0
"""Mean number of points of a run, where only the order of rows tells runs apart."""
MANY_RUNS = 8
"""Runs of three points each that can show a decay."""
LEAST_SHARE = 0.8
"""Share of rows, or of runs, that must look like curves."""
STEEPER = 1.15
"""Median ratio of a curve's last slope to the one before, from which it says that the rate decayed:
along the runs of a law the slope of ln L in ln D only falls."""
HORIZONS_APART = 1.2
"""Least ratio between the last D of two runs of one size, for these to be two horizons."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The runs that rows belong to."""

    run: IntArray
    """Label of each row's run, shape (n,)."""
    last: NDArray[np.bool_]
    """Whether a row is the last point of its run, shape (n,)."""
    by: str
    """The column or the order that tells the runs apart, in words."""
    columns: frozenset[str] = frozenset()
    """Columns that name runs, or count their steps."""

    @property
    def runs(self) -> int:
        """Number of runs."""
        return len(np.unique(self.run))


class _Sorted(NamedTuple):
    """Rows in the order of their runs, and within a run in the order of progress."""

    order: IntArray
    first: NDArray[np.bool_]
    """Whether a row, in that order, is the first of its run."""

    @property
    def within(self) -> NDArray[np.bool_]:
        """Whether a row, in that order, follows one of the same run."""
        return ~self.first


def find_curves(
    table: pa.Table,
    params: FloatArray,
    tokens: FloatArray,
    loss: FloatArray,
    taken: Collection[str],
    run: str | None = None,
) -> Curves | None:
    """Tell whether rows are points of training curves; None where each is a run of its own.

    Parameters
    ----------
    table
        The rows, with all their columns, of the plain types of `arrow_types.plain_types`.
    params, tokens, loss
        N in parameters, D in tokens and L, positive, shape (n,).
    taken
        Columns that are N, D, C or L, which name no run.
    run
        The column that tells runs apart, where somebody said so.

    Raises
    ------
    InputError
        If rows of one run by that column are of several N.

    Notes
    -----
    Within a run N is constant and D or a step rises. A column says which run a row belongs to if it
    has a name that people give to such columns. A column that may only label sizes, and the order
    of rows, need a sign that the rows are not a grid of finished runs: a column that counts steps,
    several runs of one size with different horizons, or a loss that falls faster at the end of
    runs than before, as it does when the rate decays and as no law has it.
    """
    if len(params) < 2:
        return None
    step, steps = _steps(table, taken)
    if run is not None:
        return _by_column(table, run, params, tokens, steps, step)
    alone = False
    for name in _named(table, RUNS | LABELS, taken):
        label = labels(table[name], blank_alone=True)
        if len(np.unique(label)) == len(label):
            # A column of row numbers says nothing; any other says that no run has two rows.
            alone |= not counts_rows(table[name])
            continue
        strong = plain_leaf(name) in RUNS
        for progress in _progress(tokens, steps):
            rows = _by_run(label, progress)
            curve = _is_curve(rows, params, progress)
            if curve and (strong or _undecayed(rows, params, tokens, loss, steps)):
                return _curves(label, rows, name, step)
        if strong and _repeats(label, params):
            return _curves(label, None, name, step)
    return None if alone else _by_order(params, tokens, loss, steps, step)


def ask_for_runs(table: pa.Table, params: FloatArray, taken: Collection[str]) -> list[str]:
    """Ask for the column of runs, where rows of one N have other steps and nothing tells of curves.

    Parameters are those of `find_curves`, which found nothing.
    """
    step, steps = _steps(table, taken)
    if step is None or steps is None:
        return []
    named = _named(table, RUNS | LABELS, taken)
    every = [
        labels(table[name], blank_alone=True) for name in named if not counts_rows(table[name])
    ]
    if any(len(np.unique(label)) == len(label) for label in every):
        return []
    order = np.lexsort((steps, params))
    same = np.abs(np.diff(np.log(params[order]))) <= SAME_SIZE
    if np.mean(same & (np.diff(steps[order]) > 0)) < 0.5:
        return []
    return [
        f"rows of one N have different values of {step!r} and are taken for finished runs: if they "
        "are points of training curves, name the column of their runs with --columns run=..."
    ]


def without_end(
    table: pa.Table,
    progress: FloatArray,
    measured: NDArray[np.bool_],
    taken: Collection[str],
    run: str | None = None,
) -> NDArray[np.bool_]:
    """Tell the rows of runs that have several rows, and no loss at the last one; shape (n,).

    Parameters
    ----------
    table, taken, run
        As of `find_curves`.
    progress
        D or C, shape (n,); a column of steps counts for more.
    measured
        Whether a row has a loss, shape (n,).
    """
    _, steps = _steps(table, taken)
    progress = progress if steps is None else steps
    cut = np.zeros(len(progress), dtype=bool)
    for name in [run] if run is not None else _named(table, RUNS, taken):
        label = labels(table[name], blank_alone=True)
        rows = _by_run(label, progress)
        if rows.first.all():
            continue
        last = rows.order[np.concatenate([rows.first[1:], [True]])]
        cut |= np.isin(label, label[last[~measured[last]]])
    return cut


def _by_column(
    table: pa.Table,
    name: str,
    params: FloatArray,
    tokens: FloatArray,
    steps: FloatArray | None,
    step: str | None,
) -> Curves:
    """Return the runs of the column that somebody named."""
    label = labels(table[name], blank_alone=True)
    if not _repeats(label, params) and len(np.unique(label)) < len(label):
        raise InputError(
            f"run={name}: rows of one run have different N, so that {name!r} does not name runs; "
            "choose another column, or leave run=... out"
        )
    progress = next(
        (p for p in _progress(tokens, steps) if _is_curve(_by_run(label, p), params, p)), None
    )
    return _curves(label, None if progress is None else _by_run(label, progress), name, step)


def _by_order(
    params: FloatArray,
    tokens: FloatArray,
    loss: FloatArray,
    steps: FloatArray | None,
    step: str | None,
) -> Curves | None:
    """Return the runs that the order of rows shows, if something says that they are unfinished."""
    for progress in _progress(tokens, steps):
        for way in (slice(None), slice(None, None, -1)):  # newest points may come first
            label = _blocks(params[way], progress[way])[way]
            rows = _by_run(label, progress)
            long = len(label) >= LEAST_POINTS * (label.max() + 1)
            if not long or not _is_curve(rows, params, progress):
                continue
            if _undecayed(rows, params, tokens, loss, steps):
                return _curves(label, rows, None, step)
    return None


def _named(table: pa.Table, names: frozenset[str], taken: Collection[str]) -> list[str]:
    """Columns that have one of these names, those that surely name runs first."""
    once = [
        name
        for name in table.column_names
        if plain_leaf(name) in names and name not in taken and table.column_names.count(name) == 1
    ]
    return sorted(once, key=lambda name: plain_leaf(name) not in RUNS)


def _steps(table: pa.Table, taken: Collection[str]) -> tuple[str | None, FloatArray | None]:
    """Return the column that counts steps, if there is one, and its numbers."""
    for name in _named(table, STEPS, taken):
        try:
            steps = numbers(table, name)
        except InputError:
            continue
        if np.isfinite(steps).all() and np.ptp(steps) > 0:
            return name, steps
    return None, None


def _progress(tokens: FloatArray, steps: FloatArray | None) -> list[FloatArray]:
    return [tokens] if steps is None else [steps, tokens]


def _by_run(label: IntArray, progress: FloatArray) -> _Sorted:
    order = np.lexsort((progress, label))
    return _Sorted(order, np.concatenate([[True], np.diff(label[order]) != 0]))


def _is_curve(rows: _Sorted, params: FloatArray, progress: FloatArray) -> bool:
    """Whether within runs N is constant and progress rises, with hardly an exception."""
    follows = rows.within[1:]
    if not follows.any():
        return False
    same = np.abs(np.diff(np.log(params[rows.order])))[follows] <= SAME_SIZE
    rises = np.diff(progress[rows.order])[follows] > 0
    return bool(same.all() and rises.mean() >= LEAST_SHARE)


def _repeats(label: IntArray, params: FloatArray) -> bool:
    """Whether some runs have several rows, all of one N."""
    rows = _by_run(label, params)
    follows = rows.within[1:]
    same = np.abs(np.diff(np.log(params[rows.order])))[follows] <= SAME_SIZE
    return bool(follows.any() and same.all())


def _blocks(params: FloatArray, progress: FloatArray) -> IntArray:
    """Label consecutive rows of one N along which progress rises."""
    other = np.abs(np.diff(np.log(params))) > SAME_SIZE
    return np.concatenate([[0], np.cumsum(other | (np.diff(progress) <= 0))])


def _undecayed(
    rows: _Sorted,
    params: FloatArray,
    tokens: FloatArray,
    loss: FloatArray,
    steps: FloatArray | None,
) -> bool:
    """Whether something beside their order says that rows are points of curves.

    Steps that rise say it only where one size has several runs: those of a grid of finished runs
    in order rise, too.
    """
    runs, sizes = int(rows.first.sum()), len(np.unique(np.round(np.log(params) / SAME_SIZE)))
    if steps is not None and runs > sizes:
        rises = np.diff(steps[rows.order])[rows.within[1:]] > 0
        if rises.mean() >= 0.95 and not _one_grid(rows, params, tokens):
            return True
    return _several_horizons(rows, params, tokens) or _steeper_at_the_end(rows, tokens, loss)


def _one_grid(rows: _Sorted, params: FloatArray, tokens: FloatArray) -> bool:
    """Whether all runs of one size have the same points in D, as replicates of a grid do."""
    starts = np.flatnonzero(rows.first)
    size = np.round(np.log(params[rows.order][starts]) / SAME_SIZE)
    shapes: dict[float, set[bytes]] = {}
    for key, points in zip(size, np.split(tokens[rows.order], starts[1:]), strict=True):
        shapes.setdefault(float(key), set()).add(points.tobytes())
    return all(len(points) == 1 for points in shapes.values())


def _several_horizons(rows: _Sorted, params: FloatArray, tokens: FloatArray) -> bool:
    """Whether nearly every run has one of the same size beside it with another last D."""
    ends = np.flatnonzero(np.concatenate([rows.first[1:], [True]]))
    points = np.diff(ends, prepend=-1)
    ends = ends[points >= LEAST_POINTS]
    if len(ends) < 4 or points[points >= LEAST_POINTS].sum() < LEAST_SHARE * len(rows.order):
        return False
    last = rows.order[ends]
    n, d = np.log(params[last]), np.log(tokens[last])
    order = np.lexsort((d, np.round(n / SAME_SIZE)))
    same = np.abs(np.diff(n[order])) <= SAME_SIZE
    apart = np.diff(d[order]) >= np.log(HORIZONS_APART)
    beside = np.zeros(len(last), dtype=bool)
    beside[1:] |= same & apart
    beside[:-1] |= same & apart
    return bool(beside.mean() >= LEAST_SHARE and not np.any(same & ~apart))


def _steeper_at_the_end(rows: _Sorted, tokens: FloatArray, loss: FloatArray) -> bool:
    """Whether in nearly every run ln L falls faster in ln D at the end, and hardly before."""
    x, y = np.log(tokens[rows.order]), np.log(loss[rows.order])
    run = np.cumsum(rows.first) - 1
    points = np.bincount(run)
    if np.sum(points >= LEAST_POINTS) < 4:
        return False
    step = np.diff(x)
    within = rows.within[1:]
    if np.any(step[within] <= 0):
        return False
    slope = np.where(within, -np.diff(y) / np.where(within, step, 1.0), np.nan)
    # Slopes of one run that follow each other, and whether the second is the last of its run.
    pair = within[1:] & within[:-1]
    steeper = (slope[1:] > STEEPER * slope[:-1]) & (slope[1:] > 0)
    last = np.append(rows.first[3:], True)
    at_end, before = steeper[pair & last], steeper[pair & ~last]
    if len(before) == 0:  # three points a run: nothing but their number tells chance apart
        return bool(len(at_end) >= MANY_RUNS and at_end.mean() >= 0.9)
    return bool(at_end.mean() >= LEAST_SHARE and before.mean() <= 1.0 - LEAST_SHARE)


def _curves(label: IntArray, rows: _Sorted | None, name: str | None, step: str | None) -> Curves:
    """The runs; where rows show no progress each is the last point of its own."""
    last = np.ones(len(label), dtype=bool)
    if rows is not None:
        last[:] = False
        last[rows.order[np.concatenate([rows.first[1:], [True]])]] = True
    return Curves(
        run=label,
        last=last,
        by=f"column {name!r}" if name else "the order of rows",
        columns=frozenset(part for part in (name, step) if part),
    )
