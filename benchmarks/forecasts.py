"""Makespans foretold, for `benchmarks.orchestration`: against bounds, and against a real Ray."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.sweeps import NAME, plan_of
from cluster.capacity import ACTOR_SECONDS
from cluster.machines import uniform
from cluster.placement import Placement
from cluster.queue import Job
from cluster.simulation import simulate
from orchestrator.connection import OBJECT_STORE_BYTES, machines
from orchestrator.estimate import Estimate, estimate
from orchestrator.gpu_reports import GpuReports
from orchestrator.lease import hold
from orchestrator.mirror import Mirror
from orchestrator.planner import Plan, Planned
from orchestrator.progress import Board, Progress
from orchestrator.project import Project, create_project
from orchestrator.sweep import train

CLASSES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""GPUs of a trial, each as often, in the event simulator."""
LIKENESS = 0.7
"""Correlation of a trial's class and its ln seconds: large models take more GPUs, and longer."""
SPREADS = (0.5, 1.0, 1.5)
"""Standard deviations of ln seconds: from nearly equal to a thousandfold."""
NODES, GPUS_PER_NODE = 8, 8

REAL_NODES = 3
REAL_NODE: dict[str, Any] = {
    "num_cpus": 16,
    "num_gpus": 2,
    "object_store_memory": OBJECT_STORE_BYTES,
}
"""Cores and GPUs that Ray is told of; nothing looks for them."""
REAL_CLASSES = ((1 / 4, 12), (1 / 2, 16), (1.0, 26), (2.0, 6))
"""GPUs of a trial, and how many trials of 60."""
SHORTEST, LONGEST = 8.0, 40.0
"""Seconds of a real trial."""


def makespans(trials: int, seeds: int) -> dict[str, Any]:
    """The event simulator on mixed classes: the worst makespan over the larger of two bounds."""
    over: dict[str, float] = {}
    for spread in SPREADS:
        for seed in range(seeds):
            jobs = _mixed(trials, seed, spread)
            work = sum(job.placement.gpus * job.seconds for job in jobs)
            longest = max(job.seconds for job in jobs)
            bound = max(work / (NODES * GPUS_PER_NODE), longest)
            found = simulate(jobs, uniform(nodes=NODES, gpus=GPUS_PER_NODE))
            over[f"spread {spread:g}, seed {seed}"] = found.makespan / bound
    return {"worst": max(over.values()), "each": over}


def _mixed(trials: int, seed: int, spread: float) -> list[Job]:
    rng = np.random.default_rng(seed)
    index = rng.integers(len(CLASSES), size=trials)
    middle = (len(CLASSES) - 1) / 2
    z = LIKENESS * (index - middle) / 2
    z = z + math.sqrt(1 - LIKENESS**2) * rng.standard_normal(trials)
    return [
        Job(key=f"{i:04}", placement=Placement(gpus=CLASSES[c]), seconds=600 * math.exp(spread * x))
        for i, (c, x) in enumerate(zip(index, z, strict=True))
    ]


def real(scale: float, directory: str) -> dict[str, Any]:
    """`isoflop plan`'s forecast and the same plan on a local cluster of several raylets.

    Both from the first trial's start to the last one's end. `scale` is how many of `REAL_CLASSES`
    there are.
    """
    project = create_project(directory)
    with _raylets() as address, Path(os.devnull).open("w") as nowhere:
        foretold = estimate(_uneven(scale), machines(GpuReports()))
        plan = foretold.plan
        with hold(project.storage, NAME) as lease:
            project.save_plan(plan)
            board = Board(plan)
            with (
                Mirror(project, plan.name) as tracking,
                Progress(board, Console(file=nowhere)) as progress,
            ):
                train(project, plan, lease, progress, tracking.finished, address=address)
    # The forecast counts from when the first actor is asked for, and rows from its first step.
    forecast = foretold.schedule.makespan - ACTOR_SECONDS
    took = _span(project)
    return {
        "trials": len(plan.trials),
        "classes": foretold.to_json()["classes"],
        "actors_at_once": _actors_at_once(foretold),
        "forecast_seconds": forecast,
        "seconds": took,
        "bound_seconds": foretold.schedule.bound,
        "error": abs(forecast - took) / took,
    }


def _uneven(scale: float) -> Plan:
    """Simulated trials of several classes, whose times are spread evenly in ln seconds."""
    gpus = [g for g, count in REAL_CLASSES for _ in range(round(scale * count))]
    plain = plan_of(25 * math.ceil(len(gpus) / 25), 0.0)
    rng = np.random.default_rng(0)
    seconds = rng.permutation(np.geomspace(SHORTEST, LONGEST, len(gpus)))
    planned = [
        _changed(p, gpus=g, seconds=round(float(s), 2))
        for p, g, s in zip(plain.planned, gpus, seconds, strict=False)
    ]
    limits = plain.spec.limits.model_copy(update={"slots": None})
    spec = plain.spec.model_copy(update={"limits": limits})
    return dataclasses.replace(plain, spec=spec, planned=tuple(planned))


def _changed(planned: Planned, **settings: float) -> Planned:
    told = {**dict(planned.trial.settings), **settings}
    trial = dataclasses.replace(planned.trial, settings=tuple(sorted(told.items())))
    return dataclasses.replace(planned, trial=trial)


def _actors_at_once(foretold: Estimate) -> int:
    """The most actors that the forecast has at one time; a gang has a leader and a rank a GPU."""
    change: Counter[float] = Counter()
    for key, item in foretold.placed.items():
        actors = 1 + (int(item.placement.gpus) if item.placement.gpus > 1 else 0)
        change[foretold.schedule.starts[key]] += actors
        change[foretold.schedule.ends[key]] -= actors
    return int(max(np.cumsum([change[at] for at in sorted(change)])))


def _span(project: Project) -> float:
    rows = project.ledger.read(columns=("finished_at", "seconds")).to_pylist()
    ends = [row["finished_at"].timestamp() for row in rows]
    starts = [end - row["seconds"] for end, row in zip(ends, rows, strict=True)]
    return float(max(ends) - min(starts))


@contextmanager
def _raylets() -> Iterator[str]:
    """A cluster of several nodes on this machine; gives its address."""
    import ray
    from ray.cluster_utils import Cluster

    head = {**REAL_NODE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(REAL_NODES - 1):
            cluster.add_node(**REAL_NODE)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.CRITICAL)
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call] # Ray leaves it so
