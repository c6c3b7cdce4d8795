"""Where the trials of a sweep run and in which order, on whole GPUs or on shares of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cluster.budget import Caps
from cluster.capacity import seconds
from cluster.machines import Cluster
from cluster.pace import Pace
from cluster.placement import Unplaceable, place
from cluster.queue import Job
from cluster.simulation import Schedule, simulate
from trainers.flops import trial_flops
from trainers.trial import Trial

Adjust = Callable[[list[Job]], list[Job]]


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Forecasts with and without shares of GPUs, where some trials could have had them."""

    trials: int
    """Number of trials that would share a GPU by choice."""
    used: bool
    """Whether they share: only if fewer trials are held back, or all are done sooner."""
    makespan: float
    """Seconds until all is done with shares."""
    gpu_seconds: float
    """GPU-seconds that all trials take with shares."""
    makespan_unshared: float
    """Seconds until all is done on whole GPUs."""
    gpu_seconds_unshared: float
    """GPU-seconds that all trials take on whole GPUs."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Every trial's class, and the schedule of all."""

    jobs: list[Job]
    refused: list[Unplaceable]
    schedule: Schedule
    sharing: Sharing | None
    """None where no trial would share a GPU, or shares one because it asks for that itself."""


def lay_out(
    trials: Iterable[Trial],
    cluster: Cluster,
    *,
    pace: Pace,
    slots: int | None = None,
    caps: Caps | None = None,
    adjust: Adjust = lambda jobs: jobs,
) -> Layout:
    """Place trials and schedule them, on shares of GPUs if all is done sooner so.

    Trials that fit nowhere are `refused`. `adjust` is applied to jobs before they are scheduled,
    for trials of which a part is done already.
    """
    trials = list(trials)
    jobs, refused = jobs_of(trials, cluster, pace)
    jobs = adjust(jobs)
    schedule = simulate(jobs, cluster, slots=slots, caps=caps)
    # Other trials have a share because they ask for one.
    by_choice = {trial.key for trial in trials if trial.trainer == "pretrain"}
    if not any(0 < job.placement.gpus < 1 and job.key in by_choice for job in jobs):
        return Layout(jobs=jobs, refused=refused, schedule=schedule, sharing=None)
    whole = adjust(jobs_of(trials, cluster, pace, shares=False)[0])
    sharers = sum(a.placement != b.placement for a, b in zip(jobs, whole, strict=True))
    unshared = simulate(whole, cluster, slots=slots, caps=caps)
    used = _rank(schedule) < _rank(unshared)
    sharing = Sharing(
        trials=sharers,
        used=used,
        makespan=schedule.makespan,
        gpu_seconds=_gpu_seconds(jobs, schedule),
        makespan_unshared=unshared.makespan,
        gpu_seconds_unshared=_gpu_seconds(whole, unshared),
    )
    return Layout(
        jobs=jobs if used else whole,
        refused=refused,
        schedule=schedule if used else unshared,
        sharing=sharing,
    )


def jobs_of(
    trials: Iterable[Trial], cluster: Cluster, pace: Pace, *, shares: bool = True
) -> tuple[list[Job], list[Unplaceable]]:
    """Return the trials as the queue sees them, and those that fit nowhere on `cluster`."""
    jobs, refused = [], []
    for trial in trials:
        placement = place(trial, cluster, pace, shares=shares)
        if isinstance(placement, Unplaceable):
            refused.append(placement)
            continue
        expected = seconds(trial, placement, cluster, pace)
        flops = trial_flops(trial)
        jobs.append(Job(key=trial.key, placement=placement, seconds=expected, flops=flops))
    return jobs, refused


def _rank(schedule: Schedule) -> tuple[int, float]:
    """The lower, the better: a schedule that starts more is better than one that ends sooner."""
    return len(schedule.held), schedule.makespan


def _gpu_seconds(jobs: list[Job], schedule: Schedule) -> float:
    return sum(job.gpu_seconds for job in jobs if job.key in schedule.starts)
