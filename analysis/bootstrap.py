"""Bootstrap intervals, by pairs or by cluster: for comparison with what others publish.

On few points they cover less than they say, and pairs know nothing of what budgets share;
`intervals.py` has what a forecast uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from analysis.errors import InputError
from analysis.fitting import Fit
from analysis.intervals import Interval, require_level
from analysis.laws import NAMES
from analysis.minimise import CHUNK, minimise
from analysis.observations import FloatArray, IntArray, Observations
from analysis.problem import prepare

_FEWEST_CLUSTERS = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Bootstrap:
    """Constants fitted again to resampled rows."""

    fit: Fit
    theta: FloatArray
    """One estimate a replicate, shape (R, 6)."""
    objective: FloatArray
    """Its objective, shape (R,)."""
    failed: int
    """Replicates that found no minimum; they are not in `theta`."""

    def interval(
        self, function: Callable[[FloatArray], FloatArray], level: float = 0.9
    ) -> Interval:
        """Percentile interval of `function`, which maps thetas, shape (R, 6), to values, (R,)."""
        return percentile(float(function(self.fit.theta[None])[0]), function(self.theta), level)

    def constants(self, level: float = 0.9) -> dict[str, Interval]:
        """Percentile interval of each free constant, by name."""
        return {
            name: self.interval(partial(_constant, NAMES.index(name)), level)
            for name in self.fit.law.names
        }

    def exponent(self, level: float = 0.9) -> Interval:
        """Percentile interval of a = beta / (alpha + beta)."""
        return self.interval(lambda theta: theta[:, 4] / (theta[:, 3] + theta[:, 4]), level)


def percentile(estimate: float, values: FloatArray, level: float) -> Interval:
    """The interval that leaves equal tails of `values`, one a replicate, outside.

    Raises
    ------
    InputError
        If the level is not between 0 and 1.
    """
    require_level(level)
    low, high = np.quantile(values, (0.5 * (1.0 - level), 0.5 * (1.0 + level)))
    return Interval(estimate, float(low), float(high), level)


def bootstrap(
    fit: Fit,
    obs: Observations,
    *,
    replicates: int = 4000,
    seed: int = 0,
    by: str = "pairs",
) -> Bootstrap:
    """Fit again to rows, or clusters of rows, drawn with replacement.

    Parameters
    ----------
    fit
        The fit to start from; its method is used again.
    obs
        What it was fitted to.
    replicates
        R.
    seed
        Of the resampling.
    by
        `pairs` draws rows, `cluster` whole trunks or budgets.

    Raises
    ------
    InputError
        If there is no replicate, or by cluster fewer than five of them.

    Notes
    -----
    Resampling is by multinomial weights, so that all replicates share one set of rows and are
    solved together (`minimise.py`), each from the estimate of all rows.
    """
    if replicates < 1:
        raise InputError(f"a bootstrap has at least one replicate, not {replicates}")
    data = prepare(fit.law, obs)
    n = len(data.rows.log_n)  # without rows of weight 0
    counts = _counts(np.random.default_rng(seed), replicates, n, by, data.groups)
    begin = data.centred(fit.theta)
    theta = np.empty((replicates, len(NAMES)))
    objective, converged = np.empty(replicates), np.empty(replicates, dtype=bool)
    for first in range(0, replicates, CHUNK):
        chunk = slice(first, first + CHUNK)
        rows = data.rows._replace(weights=data.rows.weights * counts[chunk])
        found = minimise(
            fit.law,
            rows,
            np.tile(begin, (len(rows.weights), 1)),
            low=data.low,
            high=data.high,
            delta=fit.method.threshold,
        )
        theta[chunk] = data.uncentred(found.theta)
        objective[chunk], converged[chunk] = found.objective, found.converged
    return Bootstrap(
        fit=fit,
        theta=theta[converged],
        objective=objective[converged],
        failed=int(replicates - converged.sum()),
    )


def _counts(
    rng: np.random.Generator, replicates: int, n: int, by: str, groups: IntArray | None
) -> FloatArray:
    """How often each row is drawn, shape (replicates, n)."""
    if by == "pairs":
        drawn = rng.multinomial(n, np.full(n, 1.0 / n), size=replicates)
        return np.asarray(drawn, dtype=np.float64)
    if by != "cluster":
        raise InputError(f"the bootstrap is by {by!r}; it must be by pairs or cluster")
    clusters = 0 if groups is None else int(groups.max()) + 1
    if groups is None or clusters < _FEWEST_CLUSTERS:
        raise InputError(
            f"a bootstrap by cluster needs at least {_FEWEST_CLUSTERS} budgets or trunks, "
            f"and there are {clusters}"
        )
    drawn = rng.multinomial(clusters, np.full(clusters, 1.0 / clusters), size=replicates)
    return np.asarray(drawn[:, groups], dtype=np.float64)


def _constant(i: int, theta: FloatArray) -> FloatArray:
    return np.exp(theta[:, i]) if NAMES[i] in ("A", "B", "gamma") else theta[:, i]
