"""Learning-rate schedules: the rate at a step as a fraction of its peak."""

from __future__ import annotations

import math


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
