"""Learning-rate schedules: the rate at a step as a fraction of its peak."""

from __future__ import annotations

import math

LEAST_DECAY = 2
"""Steps of a branch: the first is at the peak, so that a single one would be no decay."""


def cosine(step: int, *, steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Linear warm-up times a cosine decay whose length is the horizon.

    The decay must end where training ends: Hoffmann et al. (2022), section 3.1, found that a
    cosine more than 25% longer than the horizon costs loss.

    Parameters
    ----------
    step
        From 0 to `steps` - 1.
    steps
        The horizon, in steps.
    warmup_steps
        Steps until the warm-up factor is 1.
    final_fraction
        What the cosine ends at, as a fraction of the peak.

    Examples
    --------
    >>> [round(cosine(s, steps=8, warmup_steps=2, final_fraction=0.1), 3) for s in (0, 1, 4, 7)]
    [0.5, 0.966, 0.55, 0.134]
    """
    decay = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / warmup_steps) * (final_fraction + (1 - final_fraction) * decay)


def trunk(step: int, *, warmup_steps: int) -> float:
    """Warm-up and then the peak, for as long as it takes: what branches decay from.

    >>> [trunk(s, warmup_steps=4) for s in (0, 3, 1000)]
    [0.25, 1.0, 1.0]
    """
    return min(1.0, (step + 1) / warmup_steps)


def branch(step: int, *, steps: int, decay: int, final_fraction: float) -> float:
    """The decay of a horizon: 1 - sqrt over the last `decay` of its `steps`.

    Hägele et al. (2024, arXiv 2405.18392), section 3: better than linear, and equal to a cosine of
    the same horizon from a decay over a tenth of it on.

    >>> [round(branch(s, steps=100, decay=16, final_fraction=0.0), 3) for s in (84, 88, 99)]
    [1.0, 0.5, 0.032]
    """
    share = math.sqrt((step - (steps - decay)) / decay)
    return 1 - (1 - final_fraction) * share


def decay_steps(steps: int, fraction: float) -> int:
    """Steps of the decay of a horizon of so many steps; at least one.

    >>> decay_steps(100, 0.2), decay_steps(2, 0.2)
    (20, 1)
    """
    return max(1, round(fraction * steps))
