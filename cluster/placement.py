"""What a trial needs to run: so far one core, and one GPU where there are any and it trains."""

from __future__ import annotations

import os

import psutil

from trainers.trial import Trial

WORKER_BYTES = 1.5e9
"""Memory to allow a CPU worker: Ray and torch take 0.6 GB of it, a mini trial the rest."""


def resources(trial: Trial, *, gpus: float) -> dict[str, float]:
    """Ray resources of `trial` on a cluster that has `gpus` GPUs."""
    if gpus >= 1 and trial.trainer != "simulated":
        return {"CPU": 1, "GPU": 1}
    return {"CPU": 1}


def cpu_slots() -> int:
    """Trials that this machine trains at once: one a core, as far as its memory goes."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, int(psutil.virtual_memory().total / WORKER_BYTES)))
