"""Nominal budgets where nobody names them: groups of equal C, or of nearly equal C among others.

Only what is plainly a budget is called one. A design without budgets has none.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import bdtrc

from analysis.observations import FloatArray, IntArray
from analysis.wording import plural

MIN_SIZES = 3
"""Distinct sizes that a group needs, for its valley to have a bottom."""
GAP = 0.1
"""Step in ln C that parts two groups; trials of one budget miss it by 3% where steps are whole."""
LARGEST_SPREAD = 0.1
"""Standard deviation of ln C within a group, at most."""
SEPARATION = 0.15
"""The same over the distance to the nearest other group, at most."""
LEAST_SHARE = 0.5
"""Share of all observations that must lie in such groups; fewer come together by chance."""
TOLERANCE = 0.1
"""Largest distance in ln C from a crowd's middle, where C was digitised or runs end as they may."""
_FLANK = 3.0  # width of the window that a crowd is compared with, over its own
_CHANCE = 0.01  # that so many of a window's rows come together by chance
LEAST_CROWDS = 3
LEAST_CROWDED = 0.4
"""Share of all observations that must lie in crowds: of 2400 designs with ln C uniform .28 was
passed by one in a hundred, and .4 by one."""
_MOST = 5000
_SHOWN = 20


def find_budgets(flops: FloatArray, params: FloatArray) -> FloatArray:
    """Nominal budget of each observation, three digits of its group's median C.

    Parameters
    ----------
    flops, params
        C in FLOPs and N in parameters, positive, shape (n,).

    Returns
    -------
    Budgets in FLOPs, shape (n,); NaN where an observation belongs to none.

    Notes
    -----
    First one-dimensional clustering of ln C at gaps, in the time of a sort. Of 2400 designs of 20
    to 245 runs with ln C uniform over 5 or 9 none was said to have budgets; of six budgets of nine
    sizes, 1.67 or 3 times apart, 97 to 100% of the runs were found where C misses the budget by 5%
    (standard deviation), 43 to 77% where it misses by 8%.

    Where there are no such groups crowds are looked for: windows of 10% about some C in which there
    are more rows than chance brings there out of a window three times as wide (a binomial test), so
    many together that it is no accident. Rows outside of all crowds belong to none. All nine
    budgets of Hoffmann et al.'s Figure 4, as digitised, are found so, with 59% of its points.

    Examples
    --------
    >>> c = np.repeat([1e18, 3e18], 4) * [1, 1.02, 0.99, 1.01, 1, 0.98, 1, 1.03]
    >>> find_budgets(c, np.tile([1e7, 2e7, 3e7, 4e7], 2))
    array([1.e+18, 1.e+18, 1.e+18, 1.e+18, 3.e+18, 3.e+18, 3.e+18, 3.e+18])
    """
    if len(flops) == 0:
        return np.empty(0)
    order = np.argsort(flops, kind="stable")
    log_c = np.log(flops[order])
    group = np.concatenate([[0], np.cumsum(np.diff(log_c) > GAP)])
    first = np.flatnonzero(np.diff(group, prepend=-1))
    count = np.diff(first, append=len(group))
    median = 0.5 * (log_c[first + (count - 1) // 2] + log_c[first + count // 2])
    spread = np.sqrt(np.add.reduceat((log_c - median[group]) ** 2, first) / count)
    step = np.concatenate([[np.inf], np.diff(median), [np.inf]])
    nearest = np.minimum(step[:-1], step[1:])
    tight = spread <= np.minimum(LARGEST_SPREAD, SEPARATION * nearest)
    tight &= count >= MIN_SIZES
    tight[tight] = _sizes(group, params[order], tight) >= MIN_SIZES
    budgets = np.full(len(flops), np.nan)
    if count[tight].sum() >= LEAST_SHARE * len(flops):
        nominal = np.full(len(count), np.nan)
        nominal[tight] = [_nominal(value) for value in median[tight]]
        budgets[order] = nominal[group]
    else:
        budgets[order] = _crowds(log_c, params[order])
    return budgets


def _nominal(log_c: float) -> float:
    return float(f"{math.exp(log_c):.3g}")


def _crowds(log_c: FloatArray, params: FloatArray) -> FloatArray:
    """Budget of each row, by ascending ln C, where many lie near one C among others elsewhere."""
    some = log_c[:: max(1, len(log_c) // _MOST)]  # of many as many as tell where they crowd
    first = np.searchsorted(some, some - TOLERANCE)
    last = np.searchsorted(some, some + TOLERANCE, side="right")
    wide = np.searchsorted(some, some + _FLANK * TOLERANCE, side="right")
    wide -= np.searchsorted(some, some - _FLANK * TOLERANCE)
    chance = bdtrc(last - first - 1, wide, 1.0 / _FLANK)
    budgets = np.full(len(log_c), np.nan)
    middles: list[float] = []
    for i in np.lexsort((first - last, chance)):
        if chance[i] > _CHANCE:
            break
        middle = float(np.median(some[first[i] : last[i]]))
        if any(abs(middle - other) <= 2.0 * TOLERANCE for other in middles):
            continue
        near = np.abs(log_c - middle) <= TOLERANCE
        if len(np.unique(params[near])) >= MIN_SIZES:
            middles.append(middle)
            budgets[near] = _nominal(middle)
    crowded = np.isfinite(budgets).sum() >= LEAST_CROWDED * len(log_c)
    return budgets if crowded and len(middles) >= LEAST_CROWDS else np.full(len(log_c), np.nan)


def _sizes(group: IntArray, params: FloatArray, wanted: np.ndarray) -> IntArray:
    """Distinct sizes of each wanted group, in order."""
    rows = wanted[group]
    pairs = np.lexsort((params[rows], group[rows]))
    label, n = group[rows][pairs], params[rows][pairs]
    new = np.concatenate([[True], (np.diff(label) > 0) | (np.diff(n) > 0)]) if len(n) else rows[:0]
    return np.asarray(np.bincount(label[new], minlength=len(wanted))[wanted], dtype=np.int64)


def name_budgets(flops: FloatArray, params: FloatArray) -> tuple[FloatArray, str]:
    """What `find_budgets` finds, and a sentence that shows it."""
    budget = find_budgets(flops, params)
    distinct, count = np.unique(budget[np.isfinite(budget)], return_counts=True)
    if len(distinct) == 0:
        return budget, (
            f"no budgets: C does not come in groups of at least {MIN_SIZES} sizes; if trials share "
            "nominal budgets, name their column with --columns budget=..."
        )
    named = np.isfinite(budget)
    miss = math.ceil(100.0 * float(np.abs(np.log(flops[named] / budget[named])).max()) - 0.01)
    few = zip(distinct[:_SHOWN], count[:_SHOWN], strict=True)
    shown = ", ".join(f"{value:.3g} ({k})" for value, k in few)
    more = f" and {len(distinct) - _SHOWN} more" if len(distinct) > _SHOWN else ""
    alone = len(budget) - int(count.sum())
    rest = f"; {plural(alone, 'row')} of no budget" if alone else ""
    return budget, (
        f"budgets found from C, within {max(miss, 1)}%, with their rows: {shown}{more}{rest}; "
        "--budgets none does without"
    )
