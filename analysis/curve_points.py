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
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.errors import InputError
from analysis.files import numbers
from analysis.observations import FloatArray, IntArray
from analysis.statuses import plain_name, words

RUNS = words(
    "run runid runname runs trial trialid trialname experiment experimentid experimentname exp "
    "expid expname job jobid jobname uuid id wandbid wandbname runkey"
)
"""Names, in small letters and digits alone, of columns that tell runs apart."""
LABELS = words(
    "name model modelname config configname label key checkpoint experiment experimentid "
    "experimentname exp expid expname job jobid jobname"
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
MANY_POINTS = 5.0
"""Mean number of points from which rows of one size in the order of their steps are a run."""
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
    """What told the runs apart, in words."""
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
        label = _labels(table[name])
        strong = plain_name(name.rsplit(".", 1)[-1]) in RUNS
        if strong and len(np.unique(label)) == len(label):
            # A column of row numbers says nothing; any other says that no run has two rows.
            alone |= not _counts(table[name])
            continue
        for progress in _progress(tokens, steps):
            rows = _by_run(label, progress)
            curve = _is_curve(rows, params, progress)
            if curve and (strong or _undecayed(rows, params, tokens, loss, steps)):
                return _curves(label, rows, name, step)
        if strong and _repeats(label, params):
            return _curves(label, None, name, step)
    return None if alone else _by_order(params, tokens, loss, steps, step)


def _by_column(
    table: pa.Table,
    name: str,
    params: FloatArray,
    tokens: FloatArray,
    steps: FloatArray | None,
    step: str | None,
) -> Curves:
    """The runs of the column that somebody named."""
    label = _labels(table[name])
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
    """The runs that the order of rows shows, if there are signs that rows are no finished runs."""
    for progress in _progress(tokens, steps):
        label = _blocks(params, progress)
        rows = _by_run(label, progress)
        points = len(label) / (label.max() + 1)
        if points < LEAST_POINTS or not _is_curve(rows, params, progress):
            continue
        # A few finished runs of one size, in order, have rising steps too.
        sizes = len(np.unique(np.round(np.log(params) / SAME_SIZE)))
        counted = steps if points >= MANY_POINTS or label.max() >= sizes else None
        if _undecayed(rows, params, tokens, loss, counted):
            return _curves(label, rows, None, step)
    return None


def _named(table: pa.Table, names: frozenset[str], taken: Collection[str]) -> list[str]:
    """Columns that have one of these names, those that surely name runs first."""

    def plain(name: str) -> str:
        return plain_name(name.rsplit(".", 1)[-1])

    found = [name for name in table.column_names if plain(name) in names and name not in taken]
    once = [name for name in found if table.column_names.count(name) == 1]
    return sorted(once, key=lambda name: plain(name) not in RUNS)


def _counts(column: pa.ChunkedArray) -> bool:
    """Whether values are whole numbers without a gap, as of rows."""
    if not pa.types.is_integer(column.type):
        return False
    ends = pc.min_max(column).as_py()
    return bool(ends["max"] - ends["min"] == len(column) - 1)


def _steps(table: pa.Table, taken: Collection[str]) -> tuple[str | None, FloatArray | None]:
    """The column that counts steps, if there is one, and its numbers."""
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


def _labels(column: pa.ChunkedArray) -> IntArray:
    """One label a value; a row without one stands alone."""
    encoded = pc.dictionary_encode(column.combine_chunks())
    alone = len(encoded.dictionary) + np.arange(len(encoded), dtype=np.int64)
    codes = pc.fill_null(encoded.indices, 0).to_numpy(zero_copy_only=False)
    return np.where(pc.is_null(column).to_numpy(zero_copy_only=False), alone, codes)


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
    """Whether something beside their order says that rows are points of curves."""
    if steps is not None and np.mean(np.diff(steps[rows.order])[rows.within[1:]] > 0) >= 0.95:
        return True
    return _several_horizons(rows, params, tokens) or _steeper_at_the_end(rows, tokens, loss)


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
