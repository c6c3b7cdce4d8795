"""Which sizes to train at the next budget.

Sizes are chosen among buildable ones, around a forecast, within a spend. What a forecast is, and
which budget comes next, the caller knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from analysis.errors import InputError
from analysis.observations import FloatArray
from analysis.wording import plural

MIN_SIZES = 3
"""Sizes that a budget needs to show a valley at all."""
GOOD_SIZES = 5
"""Below this a budget's parabola has a vertex but hardly a standard error."""
MIN_STEP = 1.2
"""Smallest step above the largest measured budget: less tells little that is new."""
MAX_SPAN = 64.0
"""Largest factor between the sizes of one budget; far out the valley is no parabola, and the
smallest sizes of a wider grid would see hundreds of times the tokens of the best one."""


@dataclass(frozen=True)
class Centre:
    """Where a forecast puts N_opt, in parameters."""

    params: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The sizes to train at the next budget, each once."""

    flops: float
    """The budget of each trial, in FLOPs."""
    indices: tuple[int, ...]
    """Which of the buildable sizes, ascending."""
    spend: float
    """FLOPs of all trials together."""
    centre: float
    """Forecast N_opt at `flops`, in parameters."""
    low: float
    high: float
    """The range of N that the sizes were spread over, in parameters."""
    reason: str | None
    """In what the proposal is less than was asked for, and why; else None."""


def propose(
    *,
    forecast_at: Callable[[float], Centre],
    next_flops: float,
    spend: float | None,
    params: FloatArray,
    sizes: int = 7,
    min_span: float = 8.0,
    top_flops: float | None = None,
) -> Proposal:
    """Sizes in equal steps of ln N around the forecast, covering at least its interval.

    A spend that does not allow `sizes` trials first takes away sizes, down to three, then lowers
    the budget: three trials at the budget that was asked for say more of it than seven below it.

    Parameters
    ----------
    forecast_at
        From a budget in FLOPs to the forecast N_opt and its interval; asked again if the budget is
        lowered.
    next_flops
        Budget of each trial, in FLOPs.
    spend
        FLOPs allowed for all trials together; None for no limit.
    params
        Buildable N, ascending, shape (m,); repeats count as one size.
    sizes
        How many distinct sizes, at least three.
    min_span
        Factor between the largest and the smallest size, at least.
    top_flops
        Largest budget measured so far, in FLOPs; a lowered budget must stay 1.2 times above it.

    Raises
    ------
    InputError
        If the spend buys no three trials above `top_flops`, or fewer than three sizes can be built,
        or the forecast is not among them or has no interval.

    Examples
    --------
    >>> buildable = np.geomspace(1e4, 1e7, 31)
    >>> found = propose(forecast_at=lambda flops: Centre(3e5, 2e5, 4e5), next_flops=1e13,
    ...                 spend=6e13, params=buildable)
    >>> len(found.indices), found.spend <= 6e13, found.reason
    (6, True, '6 sizes instead of 7: the spend of 6e+13 FLOPs allows no more at 1e+13 FLOPs')
    """
    if sizes < MIN_SIZES:
        raise InputError(f"a budget needs at least {MIN_SIZES} sizes, not {sizes}")
    if min_span <= 1.0:
        raise InputError(f"the span of sizes is a factor above 1, not {min_span}")
    distinct = len(np.unique(params))
    if distinct < MIN_SIZES:
        raise InputError(
            f"only {plural(distinct, 'size')} can be built, and a budget needs {MIN_SIZES}: "
            "allow more widths or depths"
        )
    notes: list[str] = []
    count = min(sizes, distinct)
    if count < sizes:
        notes.append(f"{count} sizes instead of {sizes}: no more can be built")
    flops, count = _afford(next_flops, spend, count, top_flops, notes)
    centre = forecast_at(flops)
    low, high = _window(centre, min_span, notes)
    low, high = max(low, float(params[0])), min(high, float(params[-1]))
    indices = spread(params, low, high, count)
    chosen = params[list(indices)]
    if not chosen[0] < centre.params < chosen[-1]:  # also where clipping left low above high
        raise InputError(
            f"the forecast optimum at {flops:.3g} FLOPs, {centre.params:.3g} parameters, is not "
            f"between the sizes that can be built ({params[0]:.3g} to {params[-1]:.3g}): "
            "allow other sizes or another budget"
        )
    if chosen[-1] / chosen[0] < 0.8 * min_span:
        notes.append(
            f"sizes span {chosen[-1] / chosen[0]:.1f}x instead of {min_span:g}x: "
            "no others can be trained"
        )
    return Proposal(
        flops=flops,
        indices=indices,
        spend=count * flops,
        centre=centre.params,
        low=low,
        high=high,
        reason="; ".join(notes) or None,
    )


def _afford(
    next_flops: float, spend: float | None, sizes: int, top_flops: float | None, notes: list[str]
) -> tuple[float, int]:
    """The budget and number of sizes that the spend allows."""
    if spend is None or sizes * next_flops <= spend:
        return next_flops, sizes
    count = math.floor(spend / next_flops)
    if count >= MIN_SIZES:
        notes.append(
            f"{count} sizes instead of {sizes}: the spend of {spend:.3g} FLOPs allows no more "
            f"at {next_flops:.3g} FLOPs"
        )
        if count < GOOD_SIZES:
            notes.append(f"fewer than {GOOD_SIZES} sizes leave its parabola without a check")
        return next_flops, count
    # The next double down, so that rounding never takes three trials over the spend.
    flops = math.nextafter(spend / MIN_SIZES, 0.0)
    least = MIN_STEP * (top_flops or 0.0)
    if flops <= least:
        raise InputError(
            f"the spend of {spend:.3g} FLOPs buys {MIN_SIZES} trials of {flops:.3g} FLOPs, and the "
            f"largest measured budget is already {top_flops:.3g}: allow at least "
            f"{MIN_SIZES * least:.3g}"
        )
    notes.append(
        f"{MIN_SIZES} sizes at {flops:.3g} FLOPs instead of {sizes} at {next_flops:.3g}: "
        f"the spend of {spend:.3g} FLOPs allows no more"
    )
    return flops, MIN_SIZES


def _window(centre: Centre, min_span: float, notes: list[str]) -> tuple[float, float]:
    """Range of N: the interval and at least `min_span` around the centre, at most `MAX_SPAN`."""
    if not (math.isfinite(centre.params) and centre.params > 0):
        raise InputError(f"the forecast optimum, {centre.params} parameters, is no size to build")
    if centre.low <= 0.0 or math.isinf(centre.high):
        raise InputError(
            f"the forecast has no interval: N_opt, {centre.params:.3g} parameters, may be anywhere "
            f"from {centre.low:.3g} to {centre.high:.3g}; measure more sizes or another budget, "
            "and look at the fit's warnings"
        )
    least, most = math.sqrt(min_span), math.sqrt(max(MAX_SPAN, min_span))
    low = min(centre.low, centre.params / least)
    high = max(centre.high, centre.params * least)
    if low < centre.params / most or high > centre.params * most:
        notes.append(
            f"the forecast's interval, {centre.low:.3g} to {centre.high:.3g} parameters, "
            f"is wider than the {most * most:g}x that one budget covers"
        )
    return max(low, centre.params / most), min(high, centre.params * most)


def spread(params: FloatArray, low: float, high: float, count: int) -> tuple[int, ...]:
    """Distinct sizes that lie, all together, nearest to equal steps of ln N."""
    targets = np.linspace(math.log(low), math.log(high), count)
    # Shapes of one and the same N are one size here: the first of them stands for all.
    sizes, first = np.unique(params, return_index=True)
    distance = (np.log(sizes)[None, :] - targets[:, None]) ** 2
    _, columns = linear_sum_assignment(distance)
    return tuple(sorted(int(first[column]) for column in columns))
