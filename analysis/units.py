"""What is doubtful about the units of somebody else's numbers, in words.

Nothing is converted: a guess that is wrong would be worse than a warning.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from scipy.special import stdtr

from analysis.errors import InputError
from analysis.files import numbers
from analysis.loss_units import LossUnit
from analysis.numerals import PF_DAY
from analysis.observations import FloatArray
from analysis.statuses import plain_leaf

LARGEST_LOSS = 20.0
"""Nats/token; a model that knows nothing has ln(vocabulary), 12.5 for 256k symbols."""
LEAST_PARAMS = 1e3
LEAST_TOKENS = 1e5
"""Some seconds of one processor."""
LEAST_FLOPS = 1e9
"""What 1000 parameters take on 170 000 tokens: below it C counts something else."""
LEAST_RATIO = 1e-3
LARGEST_RATIO = 1e7
"""Tokens a parameter; published runs have 0.1 to 1e5."""
INCONSISTENT = 2.0
"""Factor between C and 6ND from which one of the three is doubted; attention and head give 1.4."""

_UNITS = {
    "PF-days (8.64e19 FLOPs)": PF_DAY,
    "thousands": 1e3,
    "millions": 1e6,
    "billions": 1e9,
    "trillions": 1e12,
    "1e15s": 1e15,
    "1e18s": 1e18,
    "1e21s": 1e21,
}


def doubts(
    params: FloatArray,
    tokens: FloatArray,
    flops: FloatArray,
    loss: FloatArray,
    names: Mapping[str, str],
) -> list[str]:
    """Sentences on what is hardly in the units that it should be in.

    Parameters
    ----------
    params, tokens, flops, loss
        N in parameters, D in tokens, C in FLOPs, L in nats/token, positive, shape (n,).
    names
        Where each was read, by `params`, `tokens`, `flops` and `loss`; one that is missing there
        was derived by C = 6ND.
    """
    found = []
    above = int(np.sum(loss > LARGEST_LOSS))
    if above:
        found.append(
            f"L ({names['loss']!r}) is above {LARGEST_LOSS:g} in {above} of {len(loss)} rows, up "
            f"to {loss.max():.4g}, too much for nats/token: if it is a perplexity, add "
            "--loss-unit perplexity"
        )
    middle = float(np.median(params))
    if middle < LEAST_PARAMS:
        found.append(_small("N", names.get("params"), middle, "parameters"))
    middle = float(np.median(tokens))
    if "tokens" in names and middle < LEAST_TOKENS:
        found.append(_small("D", names["tokens"], middle, "tokens"))
    middle = float(np.median(flops))
    if "flops" in names and middle < LEAST_FLOPS:
        found.append(_small("C", names["flops"], middle, "FLOPs"))
    found += _ratio(tokens / params, names)
    if {"params", "tokens", "flops"} <= set(names):
        found += _consistency(flops / (6.0 * params * tokens))
    return found


def above_vocabulary(loss: FloatArray, table: pa.Table, name: str, unit: LossUnit) -> list[str]:
    """Doubt a loss in nats/token that is above ln(vocabulary): a model that knows nothing has that.

    Parameters
    ----------
    loss
        L, shape (n,).
    table
        The rows, perhaps with a column of their vocabularies.
    name
        Where the loss was read.
    unit
        What it is measured in; where nobody says it may be nats/token.
    """
    if unit not in ("nats", "unknown"):
        return []
    for column in table.column_names:
        if (
            plain_leaf(column) in ("vocabulary", "vocab", "vocabsize", "nvocab")
            and table.column_names.count(column) == 1
        ):
            kind = table[column].type
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
                continue
            size = numbers(table, column)
            known = size > 1.0
            above = int(np.sum(loss[known] > np.log(size[known]) + 0.1))
            if above:
                return [
                    f"L ({name!r}) is above the logarithm of {column!r} in {above} of {len(loss)} "
                    "rows, and a model that knows nothing has that: it can hardly be nats/token; "
                    "say what it is with --loss-unit"
                ]
    return []


RISES = 0.999
"""Confidence that a loss rises with N and with D together from which it is refused."""


def require_falling(params: FloatArray, tokens: FloatArray, loss: FloatArray, name: str) -> None:
    """Refuse a loss that rises with N and D, as accuracies and other scores do.

    Parameters
    ----------
    params, tokens, loss
        N in parameters, D in tokens and L, positive, shape (n,).
    name
        Where the loss was read.

    Raises
    ------
    InputError
        If the plane through ln L over ln N and ln D falls in neither direction and rises in one.
    """
    axes = [x for x in (np.log(params), np.log(tokens)) if np.ptp(x) > 1e-6]
    if len(loss) < 4 + len(axes) or not axes:
        return
    design = np.stack([np.ones(len(loss)), *axes], axis=1)
    y = np.log(loss)
    slopes, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    if rank < design.shape[1]:
        return
    residual = y - design @ slopes
    dof = len(y) - rank
    variance = float(residual @ residual) / dof * np.diag(np.linalg.inv(design.T @ design))
    t = slopes[1:] / np.sqrt(np.maximum(variance[1:], 1e-30))
    rises = stdtr(dof, t)
    if rises.min() > 0.5 and rises.max() > RISES:
        raise InputError(
            f"the loss ({name!r}) rises with N and D, so that it is no loss: is it an accuracy or "
            "another score? Choose a column that falls with --columns loss=..."
        )


def _small(symbol: str, name: str | None, middle: float, unit: str) -> str:
    usual = "1e18s or PF-days" if symbol == "C" else "millions or billions"
    where = repr(name) if name else "from C = 6ND"
    return (
        f"{symbol} ({where}) is {middle:.4g} at the median: it should be a number of {unit}, not "
        f"{usual} or a logarithm"
    )


def _ratio(ratio: FloatArray, names: Mapping[str, str]) -> list[str]:
    """On D/N that nobody trains at."""
    where = f"({names['tokens']!r})" if "tokens" in names else "(from C = 6ND)"
    low, high = int(np.sum(ratio < LEAST_RATIO)), int(np.sum(ratio > LARGEST_RATIO))
    if low:
        return [
            f"D {where} is below N/1000 in {low} of {len(ratio)} rows, down to {ratio.min():.3g} "
            "tokens a parameter: is one of N, D and C in millions, billions or another unit?"
        ]
    if high:
        return [
            f"D {where} is above 1e7 N in {high} of {len(ratio)} rows, up to {ratio.max():.3g} "
            "tokens a parameter: is one of N, D and C in millions, billions or another unit?"
        ]
    return []


def _consistency(ratio: FloatArray) -> list[str]:
    """On C that is not about 6ND."""
    outside = int(np.sum((ratio > INCONSISTENT) | (ratio < 1.0 / INCONSISTENT)))
    if not outside:
        return []
    middle = float(np.median(ratio))
    hints = [
        f", as if {'N or D' if middle > 1 else 'C'} were in {unit}"
        for unit, size in _UNITS.items()
        if abs(np.log(max(middle, 1.0 / middle) / size)) < np.log(INCONSISTENT)
    ]
    return [
        f"C is not 6ND in {outside} of {len(ratio)} rows: it differs by more than "
        f"{INCONSISTENT:g}x, C/6ND being {middle:.3g} at the median{(hints or [''])[0]}"
    ]
