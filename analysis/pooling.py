"""Millions of rows as thousands: means of small cells of N and D, or some drawn at random."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from analysis.observations import FloatArray, IntArray, Observations

LARGEST = 50_000
"""Rows up to which each counts by itself."""
CELLS = (0.02, 0.04)
"""Widths of a cell in ln N and ln D, the second where the first leaves too many rows. What a mean
misses within it is some 1e-6 to 1e-5 in ln L."""


def pool(obs: Observations, largest: int = LARGEST) -> tuple[Observations, float]:
    """The observations themselves, or where there are more than `largest` means of their cells.

    Returns also the width of a cell in ln N and ln D, 0 where nothing was pooled.

    A cell's row has the weighted means of ln N, ln D, ln C and ln L and the sum of the weights, so
    that a weighted fit and its residual variance for a row of weight 1 stay what they were. Rows of
    different budgets or trunks are never in one cell.
    """
    if len(obs) <= largest:
        return obs, 0.0
    for width in CELLS:
        pooled = _pooled(obs, width)
        if len(pooled) <= largest:
            break
    return pooled, width


def _pooled(obs: Observations, width: float) -> Observations:
    """Means of cells of this width."""
    log_n, log_d = np.log(obs.params), np.log(obs.tokens)
    budget = np.unique(obs.budget, return_inverse=True)[1]
    trunks = np.unique(obs.trunk, return_inverse=True)[1]
    alone = trunks.max() + 1 == len(obs)
    key = np.zeros(len(obs), dtype=np.int64)
    for part in (_cells(log_n, width), _cells(log_d, width), budget, *([] if alone else [trunks])):
        key = np.unique(key * (int(part.max()) + 1) + part, return_inverse=True)[1]
    weight: FloatArray = np.asarray(np.bincount(key, obs.weight), dtype=np.float64)
    kept = weight > 0

    def mean(values: FloatArray) -> FloatArray:
        total = np.bincount(key, obs.weight * np.log(values))
        return np.asarray(np.exp(total[kept] / weight[kept]))

    first = np.full(len(weight), len(obs))
    np.minimum.at(first, key, np.arange(len(obs)))
    first = first[kept]
    return replace(
        obs,
        params=mean(obs.params),
        tokens=mean(obs.tokens),
        flops=mean(obs.flops),
        loss=mean(obs.loss),
        loss_stderr=np.full(len(first), np.nan),
        budget=obs.budget[first],
        weight=weight[kept],
        trunk=np.arange(len(first)) if alone else obs.trunk[first],
        rows=len(obs),
    )


def sample(obs: Observations, largest: int = LARGEST) -> Observations:
    """The observations themselves, or `largest` of them, drawn at random but always the same.

    For what means would spoil: among them a row that is far off is no longer told.
    """
    if len(obs) <= largest:
        return obs
    drawn = np.random.default_rng(0).choice(len(obs), largest, replace=False)
    return replace(obs.select(np.sort(drawn)), rows=len(obs))


def _cells(logs: FloatArray, width: float) -> IntArray:
    return np.asarray(np.floor((logs - logs.min()) / width), dtype=np.int64)
