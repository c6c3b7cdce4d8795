"""The order in which trials start."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.capacity import estimated_seconds
from trainers.flops import trial_flops
from trainers.trial import Trial


def ordered(trials: Iterable[Trial]) -> list[Trial]:
    """Longest first, so that no long trial is left to run alone at the end (Graham 1969, LPT).

    Its makespan is within 4/3 of the best for trials of one slot. Ties by FLOPs, then key.
    """
    return sorted(trials, key=lambda t: (-estimated_seconds(t), -trial_flops(t), t.key))
