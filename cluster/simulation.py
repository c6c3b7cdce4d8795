"""The forecast of a makespan: the sweep's own queue, run against expected times."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.budget import Caps
from cluster.capacity import ACTOR_SECONDS, GAP_SECONDS, LEAVE_SECONDS, RANKS_SECONDS
from cluster.machines import Cluster
from cluster.queue import ORDERS, Job, Queue

CLOSE = 1.01
"""Makespan over bound at which no other order is tried."""


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """What the engine adds to trials, seconds."""

    actor: float = ACTOR_SECONDS
    """Before a trial that needs a new actor."""
    ranks: float = RANKS_SECONDS
    """Before a trial of several GPUs, once its actor is there."""
    gap: float = GAP_SECONDS
    """Before a trial that takes over the actor of another of its class."""
    leave: float = LEAVE_SECONDS
    """From the end of a trial, whose actor nobody takes over, until its room is free."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What is expected to run when."""

    order: str
    """The order of `cluster.queue.ORDERS` that was used."""
    makespan: float
    """Seconds from the first start to the last end."""
    bound: float
    """Seconds that no schedule of what is started can beat: all work spread over all GPUs (and all
    cores), or the longest trial."""
    idle: float
    """Share of the GPUs' time, or of the cores' where no trial needs a GPU, that none uses."""
    starts: dict[str, float]
    ends: dict[str, float]
    """By key, seconds."""
    held: dict[str, str]
    """By key, the cap that holds a trial back."""


def simulate(
    jobs: Iterable[Job],
    cluster: Cluster,
    *,
    order: str | None = None,
    slots: int | None = None,
    caps: Caps | None = None,
    overheads: Overheads | None = None,
) -> Schedule:
    """Run the queue on `cluster` until all that can run has ended.

    `order` is one of `ORDERS`; None tries each, until one is `CLOSE` to the best that can be, and
    keeps the one that is done first, or, of equals, the first. Deterministic. A job that fits on no
    node never starts, and is in neither `starts` nor `held`.
    """
    jobs, overheads = list(jobs), overheads or Overheads()
    tried: list[Schedule] = []
    for name in ORDERS if order is None else (order,):
        tried.append(_run(jobs, cluster, name, slots, caps, overheads))
        if not tried[-1].held and tried[-1].makespan <= CLOSE * tried[-1].bound:
            return tried[-1]
    # A schedule that starts more is better than one that ends sooner.
    return min(tried, key=lambda schedule: (len(schedule.held), schedule.makespan))


def _run(
    jobs: list[Job],
    cluster: Cluster,
    order: str,
    slots: int | None,
    caps: Caps | None,
    overheads: Overheads,
) -> Schedule:
    queue = Queue(jobs, cluster, order=order, slots=slots, caps=caps)
    by_key = {job.key: job for job in jobs}
    starts: dict[str, float] = {}
    ends: dict[str, float] = {}
    events: list[tuple[float, str]] = []
    leaving: set[str] = set()
    now = 0.0

    def start(key: str, before: float) -> None:
        job = by_key[key]
        starts[key] = now
        ends[key] = now + before + overheads.ranks * (job.placement.gpus > 1) + job.seconds
        heapq.heappush(events, (ends[key], key))

    while True:
        while (key := queue.next(now)) is not None:
            start(key, overheads.actor)
        if not events:
            break
        now, key = heapq.heappop(events)
        if key in leaving:
            queue.ended(key, now)
        elif (follower := queue.relay(key, now)) is not None:
            start(follower, overheads.gap)
        else:
            leaving.add(key)
            heapq.heappush(events, (now + overheads.leave, key))
    return _schedule(order, [by_key[key] for key in starts], cluster, starts, ends, queue)


def _schedule(
    order: str,
    ran: list[Job],
    cluster: Cluster,
    starts: dict[str, float],
    ends: dict[str, float],
    queue: Queue,
) -> Schedule:
    makespan = max(ends.values(), default=0.0)
    gpu_work = sum(job.gpu_seconds for job in ran)
    core_work = sum(job.placement.cpus * job.seconds for job in ran)
    work, there = (gpu_work, cluster.gpus) if gpu_work else (core_work, cluster.cpus)
    return Schedule(
        order=order,
        makespan=makespan,
        bound=max(
            gpu_work / max(1, cluster.gpus),
            core_work / max(1.0, cluster.cpus),
            max((job.seconds for job in ran), default=0.0),
        ),
        idle=1 - work / (there * makespan) if makespan and there else 0.0,
        starts=starts,
        ends=ends,
        held=dict(queue.held),
    )
