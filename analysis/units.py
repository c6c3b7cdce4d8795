"""What is doubtful about the units of somebody else's numbers, in words.

Nothing is converted: a guess that is wrong would be worse than a warning.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from analysis.observations import FloatArray

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
    "PF-days (8.64e19 FLOPs)": 8.64e19,
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
            f"to {loss.max():.4g}: it should be nats/token; of a perplexity take the logarithm"
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
