"""Both laws' numbers at a budget as one, with intervals: the arithmetic of a headline.

What is said of it in words is `headline.py`'s; how it did where the answer is known is for
`heldout.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from analysis.discrepancy import Discrepancy, Shares, quantile, widened
from analysis.forecast import Forecast, forecast, intervals, natural_values
from analysis.intervals import Interval
from analysis.optimum import FlopsPerToken
from analysis.pair import Basis


class Combined(NamedTuple):
    """A headline's numbers, see `Headline`; intervals of noise alone, or with discrepancy."""

    params: Interval
    loss: Interval
    new_run: Interval
    exponent: Interval
    forecasts: tuple[Forecast, ...]


def combine(basis: Basis, flops: float, cost: FlopsPerToken, level: float) -> Combined:
    """The numbers of a headline at `flops`, from fits alone: intervals cover noise only."""
    by_recent = [forecast(item, flops, cost, level) for item in basis.recent.fits]
    same = basis.recent is basis.all
    by_all = by_recent if same else [forecast(f, flops, cost, level) for f in basis.all.fits]
    params, _, _, exponent, _ = _blend(by_recent, basis.recent.weight, level)
    loss = _blend(by_all, basis.all.weight, level)[2]
    new_run = _widened(by_all[-1 if basis.all.weight else 0].new_run, loss.estimate)
    both = zip(by_recent, by_all, strict=False)
    said = tuple(replace(near, loss=far.loss, new_run=far.new_run) for near, far in both)
    return Combined(params, loss, new_run, exponent, said)


def with_discrepancy(found: Combined, discrepancy: Discrepancy, distance: float) -> Combined:
    """The same numbers, with what the law is off by beyond noise in the intervals of N_opt and L.

    Parameters
    ----------
    found
        Numbers whose intervals cover noise.
    discrepancy
        How far the law is off.
    distance
        ln C outside the budgets fitted.
    """
    by_law = discrepancy.at(distance)
    return found._replace(
        params=widened(found.params, by_law.params),
        loss=widened(found.loss, by_law.loss),
        new_run=widened(found.new_run, by_law.loss),
    )


def noise_of(found: Combined) -> Shares:
    """Return the standard deviations of ln N_opt and ln L due to noise, from their intervals.

    Infinite where an interval is open.
    """
    return Shares(*(_half(part) / quantile(part.level) for part in (found.params, found.loss)))


def _half(part: Interval) -> float:
    ends = part.low > 0.0 and part.high < math.inf
    return 0.5 * math.log(part.high / part.low) if ends else math.inf


def _blend(found: list[Forecast], weight: float, level: float) -> tuple[Interval, ...]:
    """Weighted mean of both laws' values; the interval of the law that allows for more."""
    if weight == 0.0:
        return intervals(found[0].errors, level)
    narrow, wide = found[0].errors, found[1].errors
    values = natural_values((1.0 - weight) * narrow.values + weight * wide.values)
    own = intervals(wide, level)
    return tuple(_widened(part, float(v)) for part, v in zip(own, values, strict=True))


def _widened(own: Interval, estimate: float) -> Interval:
    return Interval(estimate, min(own.low, estimate), max(own.high, estimate), own.level)
