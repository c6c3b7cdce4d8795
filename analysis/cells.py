"""Cells: rows whose N and D are equal but for vocabulary padding and rounding."""

from __future__ import annotations

import numpy as np

from analysis.observations import FloatArray, IntArray

TOLERANCE = 0.01
"""Largest relative difference of N, and of D, within one cell."""


def cells(params: FloatArray, tokens: FloatArray) -> IntArray:
    """Label the cell of each row, 0 to k - 1, shape (n,).

    Parameters
    ----------
    params, tokens
        N in parameters and D in tokens, positive, shape (n,).

    Notes
    -----
    Values that lie closer together than the tolerance form a chain. A chain no longer than the
    tolerance is one group; a longer one, as of sizes drawn at random, is cut into equal steps.

    Examples
    --------
    >>> n = np.array([1e8, 1.004e8, 2e8, 1e8])
    >>> cells(n, np.array([2e9, 2e9, 2e9, 3e9])).tolist()
    [0, 0, 2, 1]
    """
    size = _chained(np.log(params), np.zeros(len(params), dtype=np.int64))
    return _chained(np.log(tokens), size)


def _chained(logs: FloatArray, within: IntArray) -> IntArray:
    """Label values that differ by at most the tolerance, apart in each group of `within`."""
    if len(logs) == 0:
        return np.empty(0, dtype=np.int64)
    order = np.lexsort((logs, within))
    value, group = logs[order], within[order]
    new = np.concatenate([[True], (np.diff(group) > 0) | (np.diff(value) > TOLERANCE)])
    start = np.flatnonzero(new)
    step = (value - value[start][np.cumsum(new) - 1]) / TOLERANCE
    # A hair above 1, so that a chain of just the tolerance is one group.
    cut = np.floor(step / (1.0 + 1e-9)).astype(np.int64)
    label = np.empty(len(logs), dtype=np.int64)
    label[order] = np.cumsum(new | (np.diff(cut, prepend=0) > 0)) - 1
    return label
