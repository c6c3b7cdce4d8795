"""What a trial needs to run: so far one core, and one GPU where there are any and it trains."""

from __future__ import annotations

from trainers.trial import Trial


def resources(trial: Trial, *, gpus: float) -> dict[str, float]:
    """Ray resources of `trial` on a cluster that has `gpus` GPUs."""
    if gpus >= 1 and trial.trainer != "simulated":
        return {"CPU": 1, "GPU": 1}
    return {"CPU": 1}
