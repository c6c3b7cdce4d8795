"""How long a trial takes."""

from __future__ import annotations

from trainers.flops import trial_flops
from trainers.simulated import SimulatedSettings
from trainers.trial import Trial

CPU_SECONDS_PER_BLOCK_STEP = 0.94e-3
CPU_SECONDS_PER_BLOCK_STEP_CUBIC = 2.25e-9
CPU_SECONDS_PER_TOKEN = 2.74e-6
CPU_FLOPS_PER_SECOND = 68e9
"""Fitted to 28 trials of widths 12 to 128 on one core: within 10% rms. Overhead of a step, its
Newton-Schulz (x width^3), work of a token that no matmul does, and the matmuls."""


def estimated_seconds(trial: Trial) -> float:
    """Wall seconds of `trial` on one CPU core. Elsewhere right only in proportion."""
    if trial.trainer == "simulated":
        return SimulatedSettings(**dict(trial.settings)).seconds
    block_steps = trial.hyperparameters.steps * trial.shape.depth
    return (
        CPU_SECONDS_PER_BLOCK_STEP * block_steps
        + CPU_SECONDS_PER_BLOCK_STEP_CUBIC * trial.shape.width**3 * block_steps
        + CPU_SECONDS_PER_TOKEN * trial.tokens
        + trial_flops(trial) / CPU_FLOPS_PER_SECOND
    )
