"""Estimates how long a trial takes where it is placed, from published or measured speeds."""

from __future__ import annotations

from cluster.effort import Effort
from cluster.machines import UNKNOWN_GPU, Cluster
from cluster.pace import Pace, Times
from cluster.placement import Placement
from trainers.flops import trial_flops
from trainers.gpus import GpuType
from trainers.simulated import SimulatedSettings
from trainers.trial import Trial

ACTOR_SECONDS = 2.5
"""From asking Ray for an actor of a new class to its first step: its placement group, and a new
process, whose imports take most of it."""
RANKS_SECONDS = 1.6
"""From there to the first step of a gang, whose ranks are new processes each time."""
LEAVE_SECONDS = 0.1
"""From the end of a trial to Ray's having the room of its actor again."""
GAP_SECONDS = 0.1
"""Between two trials of one class that follow each other in one actor."""


def times(trial: Trial, placement: Placement, cluster: Cluster, pace: Pace | None = None) -> Times:
    """Expected seconds of `trial` where it is placed, its actor being there.

    What a user's own program does before it trains is not known.
    """
    if trial.trainer == "simulated":
        return Times(compiling=0.0, training=SimulatedSettings.of(trial).seconds)
    effort, pace = Effort.of(trial), pace or Pace()
    if not placement.gpus:
        return Times(compiling=0.0, training=pace.on_a_core(effort))
    gpu, mps = slowest(placement, cluster), cluster.shares_by_mps(placement.gpu_type)
    if trial.command is not None:
        training = pace.other_on_gpus(effort, gpu, placement.gpus, mps=mps)
        return Times(compiling=0.0, training=training)
    return pace.on_gpus(effort, gpu, placement.gpus, mps=mps)


def seconds(
    trial: Trial, placement: Placement, cluster: Cluster, pace: Pace | None = None
) -> float:
    """Expected wall seconds of `trial` where it is placed, compilation included."""
    return times(trial, placement, cluster, pace).whole


def mfu(trial: Trial, placement: Placement, cluster: Cluster, pace: Pace | None = None) -> float:
    """Share of the peak, in its precision, that `trial` is expected to reach while it trains.

    Of the GPUs it holds, and of the whole GPU where it has a share of one. 0 where it has no GPU or
    does not compute.
    """
    if not placement.gpus or trial.trainer == "simulated":
        return 0.0
    gpu = slowest(placement, cluster)
    peak = gpu.training_flops(trial.hyperparameters.precision) * max(1.0, placement.gpus)
    return trial_flops(trial) / times(trial, placement, cluster, pace).training / peak


def slowest(placement: Placement, cluster: Cluster) -> GpuType:
    """The slowest type that `placement` may be given."""
    types = [node.gpu for node in cluster.of_type(placement.gpu_type)]
    return min(types, key=lambda gpu: (gpu.peak_flops, gpu.fp32_flops), default=UNKNOWN_GPU)


def estimated_seconds(trial: Trial) -> float:
    """Wall seconds of `trial` on one CPU core. Elsewhere right only in proportion."""
    if trial.trainer == "simulated":
        return SimulatedSettings.of(trial).seconds
    return Effort.of(trial).on_a_core()
